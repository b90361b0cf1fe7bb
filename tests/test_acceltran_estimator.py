"""AccelTran's closed form and its loop-order study: worked numbers, published rows, faults."""

import csv
import dataclasses
import gzip
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from codesign.errors import CodesignError, PresetError, UnknownNameError
from codesign.hw.acceltran_estimator import (
    ENERGY_COLUMNS,
    Estimate,
    Layer,
    Machine,
    area_mm2,
    estimate,
)
from codesign.hw.loop_order import ORDERS, loop_order_cost
from codesign.hw.spec import load_preset

EDGE = Machine.from_spec(load_preset("acceltran-edge"))
SERVER = Machine.from_spec(load_preset("acceltran-server"))
GOLDEN = Path(__file__).resolve().parent / "golden" / "transcode_rows.json"
NUM_TOKENS = 128
# Sums of a few hundred float64 terms, in another order.
FLOAT64 = 1e-9


def bert(layers: int, width: int, heads: int, hidden: int) -> list[Layer]:
    operators = (f"sa_sdp_{width // heads}",) * heads
    return [Layer(width=width, heads=operators, hidden=(hidden,))] * layers


MODELS = {
    "bert_tiny": bert(2, 128, 2, 512),
    "bert_base": bert(12, 768, 12, 3072),
    "bert_nano": bert(1, 32, 2, 64),
}


def run(model: str, machine: Machine, activations: float = 0.5, weights: float = 0.5) -> Estimate:
    return estimate(
        MODELS[model],
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


def machine_of(row: Mapping[str, str]) -> Machine:
    return dataclasses.replace(
        EDGE,
        processing_elements=int(row["pe"]),
        lanes=int(row["lanes_per_pe"]),
        multipliers=int(row["mac_per_lane"]),
        softmax_units=int(row["softmax_per_pe"]),
        tile_b=int(row["tile_b"]),
        tile_x=int(row["tile_x"]),
        tile_y=int(row["tile_y"]),
        batch=int(row["batch_size"]),
        activation_mb=float(row["act_buf_MB"]),
        weight_mb=float(row["wgt_buf_MB"]),
        mask_mb=float(row["mask_buf_MB"]),
        memory=list(EDGE.constants.memories)[int(row["mem_idx"])],
    )


PUBLISHED_COLUMNS = ("E_buffer_nJ", "E_main_memory_nJ") + tuple(
    f"E_{part}_{kind}_nJ"
    for part in ("mac", "sftm", "ln", "sparsity", "others")
    for kind in ("dyn", "leak")
)


def check_row(row: Mapping[str, str], model: Mapping[str, Any]) -> None:
    """Cycles to the integer, area and every energy to rounding."""
    layers = [
        Layer(width=width, heads=tuple(heads), hidden=tuple(hidden))
        for width, heads, hidden in zip(model["h"], model["o"], model["f"], strict=True)
    ]
    result = estimate(
        layers,
        machine_of(row),
        num_tokens=NUM_TOKENS,
        activation_sparsity=0.5,
        weight_sparsity=0.5,
    )
    assert result.cycles == int(row["cycles"])
    assert result.area_mm2 == pytest.approx(float(row["area_mm2"]), rel=FLOAT64)
    for column, published in zip(ENERGY_COLUMNS, PUBLISHED_COLUMNS, strict=True):
        value = float(row[published])
        assert result.energy_nj[column] == pytest.approx(value, rel=FLOAT64), column


def golden_rows() -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = json.loads(GOLDEN.read_text())["rows"]
    return rows


@pytest.mark.parametrize("index", range(3))
def test_published_transcode_rows(index: int):
    """Tiles of 8, 32 and 16; all operators; widths that change from layer to layer."""
    row = golden_rows()[index]
    check_row(row["machine"], row["model"])


@pytest.fixture
def validation() -> Path:
    """The folder of published runs."""
    folder = os.environ.get("CODESIGN_VALIDATION")
    if not folder:
        pytest.skip("set CODESIGN_VALIDATION to the folder of published runs")
    return Path(folder)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_all_transcode_rows(validation: Path):
    models = json.loads(gzip.decompress((validation / "transcode_models.json.gz").read_bytes()))
    checked = 0
    for row in read_rows(validation / "transcode_accelerators.csv"):
        model = models[row["id"]]["model_dict"]
        # 10 bits per weight that is half zero, in the weight buffer's bits.
        if (30_522 + NUM_TOKENS) * model["h"][0] * 10 > float(row["wgt_buf_MB"]) * 2**23:
            continue
        check_row(row, model)
        checked += 1
    assert checked >= 159


RUN_COLUMNS = {
    "buffer": "E_fast_buffer",
    "main_memory": "E_fast_mainmem",
    "mac_dynamic": "E_mac_dyn_nJ",
    "mac_leakage": "E_mac_leak_nJ",
    "softmax_dynamic": "E_softmax_dyn_nJ",
    "softmax_leakage": "E_softmax_leak_nJ",
    "norm_dynamic": "E_ln_dyn_nJ",
    "norm_leakage": "E_ln_leak_nJ",
}


def test_all_runs_of_the_published_estimator(validation: Path):
    rows = [
        row
        for row in read_rows(validation / "acceltran_runs.csv")
        if row["simulator_mode"] == "fast"
    ]
    assert len(rows) >= 9
    for row in rows:
        machine = EDGE if row["pe"] == "64.0" else SERVER
        result = run(row["model"], machine, float(row["act_sparsity"]), float(row["wgt_sparsity"]))
        assert result.cycles == int(float(row["cycles"])), row["name"]
        assert result.area_mm2 == pytest.approx(float(row["area_mm2"]), abs=5e-5)
        # Printed to two decimals.
        for column, published in RUN_COLUMNS.items():
            expected = float(row[published])
            assert result.energy_nj[column] == pytest.approx(expected, abs=0.0051), column
        for part in ("sparsity", "others"):
            total = result.energy_nj[f"{part}_dynamic"] + result.energy_nj[f"{part}_leakage"]
            assert total == pytest.approx(float(row[f"E_fast_{part}"]), abs=0.0051)
        total = sum(result.energy_nj.values())
        assert total == pytest.approx(float(row["E_total_nJ"]), abs=0.0051)


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


def test_published_loop_order_runs(validation: Path):
    rows = read_rows(validation / "acceltran_dataflow_runs.csv")
    assert {row["loop_order"] for row in rows} == set(ORDERS)
    for row in rows:
        rows_, inner, cols = (int(size) for size in row["matmul_i_k_j(batch4)"].split("_"))
        result = loop_order_cost(row["loop_order"], (rows_, inner, cols), EDGE)
        assert (result.reuse, result.cycles) == (int(row["reuse"]), int(row["cycles"]))
        assert result.dynamic_nj == pytest.approx(float(row["dyn_energy_nJ"]), abs=6e-4)
        assert result.leakage_nj == pytest.approx(float(row["leak_energy_nJ"]), abs=6e-5)


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
