"""Dense products with other tools' switches: worked numbers, the tools' own answers, what each switch does, faults."""

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codesign.errors import CodesignError, UnknownNameError
from codesign.experiments import peer_tools
from codesign.hw.loop_nests import COLS, INNER, ROWS, UNUSED, Nests
from codesign.hw.nest_search import all_orders, best_cuts, limited_factors, tiled_nests
from codesign.hw.port_timing import Transfer, loading, stall, union_cycles
from codesign.hw.tool_models import ACCELFORGE, SCALE_SIM, TOOLS, ZIGZAG, gemm_cost
from codesign.hw.tool_switches import Dataflow, ToolModel

GOLDEN = json.loads((Path(__file__).resolve().parent / "golden" / "dense_gemm.json").read_text())
FLOAT64 = 1e-12
SINGLE = 1e-6
"""AccelForge computes in single precision."""


def cost(
    model: ToolModel, sizes: tuple[int, int, int], side: int, dataflow: Dataflow
) -> tuple[float, float]:
    found = gemm_cost(model, np.array([sizes]), np.array([side]), dataflow)
    return found.cycles[0], np.nan if found.energy_pj is None else found.energy_pj[0]


def switched(model: ToolModel, **switches: Any) -> ToolModel:
    return dataclasses.replace(model, switches=dataclasses.replace(model.switches, **switches))


# --- worked by hand


def test_tiles_in_turn():
    # ceil(K/16) ceil(N/16) (3*16 + M - 2) - 1, and so on.
    product = (128, 768, 768)
    assert cost(SCALE_SIM, product, 16, "weight_stationary")[0] == 48 * 48 * 174 - 1 == 400_895
    assert cost(SCALE_SIM, product, 16, "output_stationary")[0] == 8 * 48 * 798 - 1
    assert cost(SCALE_SIM, product, 16, "input_stationary")[0] == 48 * 8 * 814 - 1
    ahead = switched(SCALE_SIM, weights_prefetched=True)
    assert cost(ahead, product, 16, "weight_stationary")[0] == 48 * 48 * 128 + 46 == 294_958
    ideal = switched(SCALE_SIM, fill_and_drain=False)
    assert cost(ideal, product, 16, "weight_stationary")[0] == 128 * 768 * 768 / 256
    # An idle part of the last tile takes its time.
    assert cost(SCALE_SIM, (5, 17, 33), 16, "weight_stationary")[0] == 3 * 2 * 51 - 1


def test_perfect_overlap():
    cycles, energy = cost(ACCELFORGE, (64, 64, 64), 32, "weight_stationary")
    values = 64 * 64
    by_hand = {
        "multiplications": 0.2 * 64**3,
        "main memory": 4 * 8 * 3 * values,
        "weight registers": 0.08 * values,
        "inputs written and read twice": (2.0 + 2 * 1.6) * values,
        "sums written twice, read once, then results read": (2 * 2.0 + 1.6 + 1.6) * values,
    }
    assert cycles == 64**3 / 32**2
    assert energy == pytest.approx(sum(by_hand.values()), rel=FLOAT64)
    # One row: main memory sets the time, 64 bytes per cycle.
    assert cost(ACCELFORGE, (1, 768, 768), 32, "weight_stationary")[0] == (768 * 768 + 2 * 768) / 64
    # No divisor of 31 but itself and 1 fits 8 columns.
    assert cost(ACCELFORGE, (100, 31, 300), 8, "weight_stationary")[0] == 100 * 31 * 300 / 6


def test_stalls_and_loading():
    cycles, energy = cost(ZIGZAG, (64, 64, 64), 32, "weight_stationary")
    # 4 tiles of 64 rows; between them 1024 weights enter at 64 bytes per cycle, 15 cycles longer than the one that a
    # single register allows; before them all inputs, 4096 bytes; after them one step to the buffer and one out of it.
    assert cycles == 4 * 64 + 3 * 15 + 64 + 2
    values, sums = 64 * 64, 2 * 64 * 64
    by_hand = {
        "multiplications": 0.2 * 64**3,
        "main memory": 4 * 8 * 3 * values,
        "weight registers": 0.08 * values,
        "inputs written and read twice": (2.0 + 2 * 1.6) * values,
        # 32 bits each, and the first one, zero, is read too.
        "sums to the buffer and back": 32 * (0.25 + 0.2) * sums,
        "sums in registers, in and out on both sides": 4 * 0.02 * sums,
        "results read": 1.6 * values,
    }
    assert energy == pytest.approx(sum(by_hand.values()), rel=FLOAT64)
    # Outputs in place: results of 32 x 32 places, 8 bits each, leave in 4 cycles, and one more out of the buffer.
    assert cost(ZIGZAG, (64, 64, 64), 32, "output_stationary")[0] == 256 + 64 + 4 + 1


# --- the tools' own answers


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: f"{row['tool']}-{row['sizes']}")
def test_rows_of_the_tools(row: dict[str, Any]):
    model = TOOLS[row["tool"]]
    cycles, energy = cost(model, tuple(row["sizes"]), row["side"], row["dataflow"])
    rounding = SINGLE if model is ACCELFORGE else FLOAT64
    assert cycles == pytest.approx(row["cycles"], rel=rounding if model is ACCELFORGE else 0.0)
    if row["energy_pj"] is not None:
        assert energy == pytest.approx(row["energy_pj"], rel=rounding)


def test_rows_at_once_are_rows_alone():
    rows = [row for row in GOLDEN["rows"] if row["tool"] == "zigzag"]
    rows = [row for row in rows if row["dataflow"] == "output_stationary"]
    sizes, sides = np.array([row["sizes"] for row in rows]), np.array([row["side"] for row in rows])
    together = gemm_cost(ZIGZAG, sizes, sides, "output_stationary")
    np.testing.assert_array_equal(together.cycles, [row["cycles"] for row in rows])


def test_published_rows():
    folder = os.environ.get("CODESIGN_VALIDATION")
    if not folder or not (Path(folder) / "dense_gemm_tools.csv").exists():
        pytest.skip("set CODESIGN_VALIDATION to the folder of reference results")
    with (Path(folder) / "dense_gemm_tools.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sizes = np.array([[int(row[name]) for name in "MNK"] for row in rows])
    sides = np.array([int(row["array"].partition("x")[0]) for row in rows])
    for tool, short, tolerance in (
        ("scale_sim", "scalesim", 0.0),
        ("zigzag", "zigzag", 1e-9),
        ("accelforge", "accelforge", SINGLE),
    ):
        for dataflow, letters in (("weight_stationary", "ws"), ("output_stationary", "os")):
            if dataflow not in TOOLS[tool].dataflows:
                continue
            found = gemm_cost(TOOLS[tool], sizes, sides, dataflow)
            column = [float(row[f"{short}_{letters}_cycles"]) for row in rows]
            np.testing.assert_allclose(found.cycles, column, rtol=tolerance)
            if found.energy_pj is not None:
                column = [float(row[f"{short}_{letters}_energy_pJ"]) for row in rows]
                np.testing.assert_allclose(found.energy_pj, column, rtol=tolerance)


# --- switches

PRODUCT, SIDE = (197, 96, 320), 16


def test_each_switch_moves_what_it_names():
    cycles, energy = cost(ZIGZAG, PRODUCT, SIDE, "weight_stationary")

    def other(**switches: Any) -> tuple[float, float]:
        return cost(switched(ZIGZAG, **switches), PRODUCT, SIDE, "weight_stationary")

    assert other(on_and_off_loading=False)[0] < cycles
    assert other(perfect_overlap=True)[0] < other(on_and_off_loading=False)[0]
    assert other(partial_sum_bits=8.0)[1] < energy
    assert other(reads_first_partial_sum=False)[1] < energy
    assert other(whole_words=False)[1] >= energy
    # 197 rows are not a multiple of anything; along the array 96 and 320 are multiples of 16.
    assert other(exact_divisors=True) == (cycles, energy)
    # A row alone: an input is wanted by one tile after another, and is read for each unless it is held.
    row = (1, 96, 320)
    held = cost(ZIGZAG, row, SIDE, "weight_stationary")
    again = cost(switched(ZIGZAG, holds_last_value=False), row, SIDE, "weight_stationary")
    assert again[1] >= held[1]


def test_costs_fall_with_better_memories():
    def with_memory(name: str, **changes: float) -> ToolModel:
        memories = dict(ACCELFORGE.memories)
        memories[name] = dataclasses.replace(memories[name], **changes)
        return dataclasses.replace(ACCELFORGE, memories=memories)

    product = (1024, 768, 768)
    base = cost(ACCELFORGE, product, 32, "weight_stationary")
    twice = with_memory("sram", capacity_bits=2 * ACCELFORGE.memories["sram"].capacity_bits)
    assert cost(twice, product, 32, "weight_stationary")[1] < base[1]
    slow = with_memory("dram", port_bits=8.0)
    assert cost(slow, product, 32, "weight_stationary")[0] > base[0]
    dear = with_memory("dram", read_pj=8.0, write_pj=8.0)
    assert cost(dear, product, 32, "weight_stationary")[1] > base[1]


# --- parts


def test_factors_of_an_order():
    assert limited_factors((1, 2, 3)) == [(COLS, 2), (INNER, 3)]
    # 2^7 and 2^3 * 3: eleven factors become six.
    found = limited_factors((128, 24, 1))
    assert len(found) == 6
    assert np.prod([size for dim, size in found if dim == ROWS]) == 128
    assert np.prod([size for dim, size in found if dim == COLS]) == 24
    nests, product = all_orders(np.array([[4, 3, 1], [1, 1, 1]]))
    # Three loops, two alike: 3 orders; nothing to loop over: one.
    assert product.tolist() == [0, 0, 0, 1]
    assert np.all(np.prod(nests.rounds, axis=1) == [12, 12, 12, 1])


def test_cuts_of_a_nest():
    # From the innermost: M 2, K 3, M 5, N 7.
    nests = Nests(
        dims=np.array([[ROWS, INNER, ROWS, COLS]]), rounds=np.array([[2.0, 3.0, 5.0, 7.0]])
    )
    np.testing.assert_array_equal(nests.values("input"), [[1, 2, 6, 30, 30]])
    np.testing.assert_array_equal(nests.values("output"), [[1, 2, 2, 10, 70]])
    one = np.array([1])
    # Weights kept while M runs; outputs while K does.
    assert nests.stays("weight", 0 * one) == 1
    assert nests.stays("output", one) == 2
    assert nests.has_inner(one) and not nests.has_inner(2 * one)
    assert nests.outermost("weight", 0 * one, 3 * one, concerned=False) == 5
    assert nests.outermost("input", 0 * one, 3 * one, concerned=True) == 30
    assert nests.outermost("input", 2 * one, 3 * one, concerned=True) == 5
    # A memory of 32 bits for outputs of 1 bit: beyond 10 values the N loop does not fit.
    cuts, fits = best_cuts(nests, {"output": 0 * one}, {"output": nests.values("output")}, 32.0)
    assert fits and cuts["output"] == 3
    _, fits = best_cuts(nests, {"output": 4 * one}, {"output": nests.values("output")}, 32.0)
    assert not fits


def test_tilings_are_exact():
    rounds = np.array([[12, 6, 10], [7, 1, 9]])
    nests, cuts, product = tiled_nests(rounds)
    for dim in (ROWS, COLS, INNER):
        total = np.prod(np.where(nests.dims == dim, nests.rounds, 1.0), axis=1)
        np.testing.assert_array_equal(total, rounds[product, dim])
    assert np.all(nests.rounds[nests.dims == UNUSED] == 1)
    assert set(cuts) == {"input", "weight", "output"}


def transfer(**given: float) -> Transfer:
    base = {
        "needed": 0.0,
        "window": 1.0,
        "period": 1.0,
        "count": 1.0,
        "rate_bits": 0.0,
        "least": 0.0,
    }
    arrays = {name: np.array([value]) for name, value in (base | given).items()}
    return Transfer(**arrays, is_loading=True)


@pytest.mark.parametrize("seed", range(8))
def test_union_of_windows(seed: int):
    rng = np.random.default_rng(seed)
    periods = np.cumprod(rng.integers(1, 6, size=3))
    windows = [int(rng.integers(0, period + 1)) for period in periods]
    total = int(periods[-1] * rng.integers(1, 4))
    cycle = np.arange(total)
    is_open = [cycle % period < window for period, window in zip(periods, windows, strict=True)]
    transfers = [
        transfer(window=window, period=period, count=total / period)
        for period, window in zip(periods, windows, strict=True)
    ]
    rng.shuffle(transfers)
    found = union_cycles(transfers, np.array([float(total)]))
    assert found == np.sum(np.any(is_open, axis=0))


def test_stalls_of_a_port():
    # 5 cycles needed of a window of 3, the first of 4 transfers before the run.
    late = transfer(needed=5, window=3, period=10, count=4)
    assert stall([late], np.array([40.0])) == 2 * 3
    # A second one spares 3 * 4 cycles of the same windows' union, which is the whole run: nothing more is lost.
    spare = transfer(needed=6, window=10, period=10, count=4)
    assert stall([late, spare], np.array([40.0])) == 2 * 3
    # One that needs more than is left of the run: 30 - 12 + 9 spare and windows, 40 cycles of union.
    wide = transfer(needed=10, window=10, period=10, count=4)
    assert stall([late, wide], np.array([30.0])) == 2 * 3 + (3 * 10 + 3 * 3 - 30)


def test_loading_borrows_from_the_run():
    once = transfer(needed=20, count=1, least=4)
    often = transfer(needed=2, count=5, rate_bits=6)
    # A quarter of 8 bits a cycle is free for 40 cycles: 10 of the 16 cycles that may move.
    first, second = loading([once, often], 8.0, np.array([40.0]))
    assert first == 10 and second == 2
    (all_moved,) = loading([once], 8.0, np.array([40.0]))
    assert all_moved == 4


# --- faults, and what the tools are given


def test_faults_are_named():
    with pytest.raises(UnknownNameError, match="no dataflow `input_stationary`: choose one of"):
        cost(ZIGZAG, (8, 8, 8), 8, "input_stationary")
    with pytest.raises(CodesignError, match="below 1"):
        cost(ZIGZAG, (0, 8, 8), 8, "weight_stationary")
    sram = dataclasses.replace(ACCELFORGE.memories["sram"], capacity_bits=8.0)
    small = dataclasses.replace(ACCELFORGE, memories=ACCELFORGE.memories | {"sram": sram})
    with pytest.raises(CodesignError, match="no loop nest of a product of 64x64x64 fits"):
        cost(small, (64, 64, 64), 32, "weight_stationary")


def test_files_for_the_tools_state_the_machine():
    files = peer_tools.zigzag_files(ZIGZAG, (3, 4, 5), 16, "weight_stationary")
    memories = files["accelerator"]["memories"]
    assert list(memories) == ["weight_register", "output_register", "sram", "dram"]
    assert memories["sram"]["r_cost"] == pytest.approx(0.2 * 2048)
    assert len(memories["dram"]["ports"]) == 1 and len(memories["sram"]["ports"]) == 4
    assert files["workload"][0]["loop_sizes"] == [3, 4, 5]
    assert files["mapping"][0]["spatial_mapping"] == {"D1": ["K, 16"], "D2": ["C, 16"]}
    texts = peer_tools.accelforge_files(ACCELFORGE, (3, 4, 5), 16)
    assert "size: inf" in texts["arch"] and "0 <= k < 5" in texts["workload"]
