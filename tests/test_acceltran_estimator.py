"""AccelTran's closed form and its loop-order study: worked numbers, faults; published rows: test_validation.py."""

import dataclasses
import math

import pytest

from codesign.errors import CodesignError, PresetError, UnknownNameError
from codesign.experiments.validate_acceltran import bert
from codesign.hw.acceltran_estimator import (
    ENERGY_COLUMNS,
    Estimate,
    Layer,
    Machine,
    area_mm2,
    estimate,
)
from codesign.hw.loop_order import loop_order_cost
from codesign.hw.spec import load_preset

EDGE = Machine.from_spec(load_preset("acceltran-edge"))
SERVER = Machine.from_spec(load_preset("acceltran-server"))
NUM_TOKENS = 128


def run(model: str, machine: Machine, activations: float = 0.5, weights: float = 0.5) -> Estimate:
    return estimate(
        bert(model),
        machine,
        num_tokens=NUM_TOKENS,
        activation_sparsity=activations,
        weight_sparsity=weights,
    )


@pytest.mark.smoke
@pytest.mark.parametrize(
    "model,machine,sparsity,cycles",
    [
        ("bert_tiny", EDGE, 0.5, 167_596),
        ("bert_tiny", EDGE, 0.3, 208_916),
        ("bert_tiny", EDGE, 0.7, 126_312),
        ("bert_tiny", SERVER, 0.5, 14_368),
        ("bert_base", SERVER, 0.5, 8_049_525),
    ],
)
def test_published_cycles(model: str, machine: Machine, sparsity: float, cycles: int):
    assert run(model, machine, sparsity).cycles == cycles


def test_published_energies_of_bert_tiny_on_edge():
    spent = run("bert_tiny", EDGE).energy_nj
    assert tuple(spent) == ENERGY_COLUMNS
    published = {
        "mac_dynamic": 786_050.77,
        "mac_leakage": 48_258.19,
        "softmax_dynamic": 810.64,
        "norm_dynamic": 1_026.06,
        "main_memory": 165_123.38,
        "buffer": 4_870.66,
    }
    for column, value in published.items():
        assert spent[column] == pytest.approx(value, abs=0.005), column
    for part, value in (("sparsity", 174_928.10), ("others", 212_901.06)):
        total = spent[f"{part}_dynamic"] + spent[f"{part}_leakage"]
        assert total == pytest.approx(value, abs=0.005)


def test_area_and_its_parts():
    assert area_mm2(EDGE) == pytest.approx(54.064, abs=5e-4)
    assert area_mm2(SERVER) == pytest.approx(1829.696, abs=5e-4)
    elements, lanes = EDGE.processing_elements, EDGE.processing_elements * EDGE.lanes
    module = {name: block.area.base for name, block in EDGE.spec.modules.items()}
    parts = {
        9.645: lanes * module["lane_16"],
        22.419: elements * EDGE.softmax_units * module["softmax_tile_16"],
        7.576: lanes * (module["pre_sparsity"] + module["post_sparsity"]),
        5.191: elements * module["layer_norm_tile_16"],
        4.861: elements * module["dataflow"],
        0.496: lanes * module["fifo"],
    }
    for published, value in parts.items():
        assert value == pytest.approx(published, abs=5e-4)


def test_bandwidths_take_a_byte_for_a_word():
    def bits_per_cycle(gigabytes: float) -> float:
        return gigabytes * 1024**3 * 20 / 700e6

    memories = EDGE.constants.memories
    assert bits_per_cycle(25.6) == pytest.approx(785.365, abs=1e-3)
    assert memories["dram_32_2_1"].bandwidth.value == pytest.approx(785.365, abs=1e-3)
    for name in ("rram_32_2_1", "hbm_32_1_4"):
        assert memories[name].bandwidth.value == pytest.approx(bits_per_cycle(256), abs=0.005)
    assert EDGE.constants.buffer_bandwidth.value == pytest.approx(bits_per_cycle(370), abs=0.005)


def head_cycles(operator: str, machine: Machine = EDGE) -> float:
    """Cycles that one head adds to a layer without any."""
    layers = [Layer(width=128, heads=(operator,), hidden=(128,))]
    empty = [dataclasses.replace(layers[0], heads=())]
    with_head, without = (
        estimate(net, machine, num_tokens=128, activation_sparsity=0.5, weight_sparsity=0.5)
        for net in (layers, empty)
    )
    return with_head.cycles - without.cycles


def test_cycles_of_every_operator():
    # A lone head takes its operations one by one: projections, QK, softmax, PV, output.
    assert head_cycles("sa_sdp_64") == 3 * 1024 + 512 + 16 + 1024 + 512
    assert head_cycles("sa_wma_64") - head_cycles("sa_sdp_64") == 256
    assert head_cycles("l_dft_64") == head_cycles("l_dct_64") == 2048
    assert [head_cycles(f"c_{taps}_64") for taps in (5, 9, 13)] == [2, 1, 1]
    small = dataclasses.replace(EDGE, tile_x=8, tile_y=8)
    assert head_cycles("c_13_64", small) < 0


# --- loop order


@pytest.mark.parametrize(
    "shape,order,reuse,energy_nj",
    [
        ((64, 64, 64), "bijk", 432, 293.94),
        ((64, 64, 64), "bikj", 0, 567.92),
        ((64, 64, 128), "bijk", 944, 537.15),
        ((128, 64, 64), "bijk", 880, 577.74),
    ],
)
def test_loop_orders(shape: tuple[int, int, int], order: str, reuse: int, energy_nj: float):
    result = loop_order_cost(order, shape, EDGE)
    tiles = math.prod(shape) // 16**3 * 4
    assert result.reuse == reuse
    assert result.dynamic_nj == pytest.approx(energy_nj, abs=0.005)
    # Per tile 128 cycles of 5.1955 mW at 700 MHz; per read 4 blocks at twice the energy of 1 MB.
    by_hand = 0.95003 * tiles + 0.63420 * (2 * tiles - reuse)
    assert result.dynamic_nj == pytest.approx(by_hand, rel=1e-5)
    assert result.cycles == tiles // 4 * 129


# --- faults


def test_faults_are_named():
    with pytest.raises(UnknownNameError, match="unknown operator `sa_max_64`"):
        head_cycles("sa_max_64")
    with pytest.raises(UnknownNameError, match="unknown operator `c_7_64`"):
        head_cycles("c_7_64")
    with pytest.raises(UnknownNameError, match="unknown operator `sa_sdp_x`"):
        head_cycles("sa_sdp_x")
    with pytest.raises(CodesignError, match="embedding.*does not fit"):
        run("bert_base", EDGE)
    with pytest.raises(UnknownNameError, match="no module `softmax_tile_4`"):
        run("bert_tiny", dataclasses.replace(EDGE, tile_x=4))
    with pytest.raises(UnknownNameError, match="unknown main memory `dram`"):
        run("bert_tiny", dataclasses.replace(EDGE, memory="dram"))
    with pytest.raises(UnknownNameError, match="unknown loop order `bijj`"):
        loop_order_cost("bijj", (64, 64, 64), EDGE)
    with pytest.raises(PresetError, match="energon: the closed form needs"):
        Machine.from_spec(load_preset("energon"))
