"""Gemmini's mappings, commands and cycles: by hand, against a walk of every block, against measurements."""

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.errors import DataError, UnknownNameError
from codesign.experiments import calibrate_machine, validation_rtl
from codesign.hw.calibrate import FitSettings
from codesign.hw.gemmini_counts import GemminiCounts, count_commands
from codesign.hw.gemmini_mapping import DIMENSIONS, LEVELS, parse_mappings
from codesign.hw.gemmini_rtl import CACHE_BYTES, CALIBRATED, FACTORS, cycles, missing

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((Path(__file__).resolve().parent / "golden" / "firesim_rows.json").read_text())
ROWS: list[Mapping[str, str]] = GOLDEN["rows"]
PRODUCT = "L3[WIO] K2 - L2[WI] N1 K16X - L1[O] K2 C8 P16 C16X - L0[W] P8"
KERNEL_OF_2 = "L3[WIO] Q7 P7 K8 - L2[WI] N1 K16X - L1[O] K4 S2 R2 C64 Q2 P2 C16X - L0[W] Q4 P4"
QUICK = FitSettings(num_starts=3, num_steps=200)


def counts_of(*texts: str, stride: int = 1, **choices: Any) -> GemminiCounts:
    nests = parse_mappings(texts)
    return count_commands(nests, np.full(len(texts), stride), **choices)


total_of = jax.jit(
    lambda factors, counts, **choices: cycles(factors, counts, **choices).total,
    static_argnames=("smoothness", "overlap"),
)


def of_factor(name: str, scale: float) -> dict[str, float]:
    return dict(CALIBRATED) | {name: CALIBRATED[name] * scale}


# --- mappings


@pytest.mark.smoke
def test_mapping_by_hand():
    nests = parse_mappings([PRODUCT, KERNEL_OF_2])
    assert nests.sizes.tolist() == [[1, 1, 128, 1, 128, 64, 1], [2, 2, 56, 56, 1024, 512, 1]]
    assert nests.tiles.tolist() == [[1, 1, 128, 1, 128, 32, 1], [2, 2, 8, 8, 1024, 64, 1]]
    dram, scratchpad = LEVELS.index("dram"), LEVELS.index("scratchpad")
    place = dict(zip(DIMENSIONS, nests.place[1, dram].tolist(), strict=True))
    assert place == {"Q": 0, "P": 1, "K": 2, "R": -1, "S": -1, "C": -1, "N": -1}
    assert nests.spatial[0, scratchpad].tolist() == [1, 1, 1, 1, 1, 16, 1]
    assert nests.temporal[0, scratchpad].tolist() == [1] * 7


@pytest.mark.parametrize(
    "text", ["", "L3[WIO] K2", PRODUCT.replace("K2", "K0", 1), PRODUCT.replace("C8", "X8"), "\n"]
)
def test_bad_mapping_names_its_row(text: str):
    with pytest.raises(DataError, match="mapping of row 2"):
        parse_mappings([PRODUCT, text, PRODUCT])


# --- commands


@pytest.mark.smoke
def test_product_by_hand():
    """128 x 128 by 128 x 64 in two blocks of 32 columns."""
    counts = counts_of(PRODUCT)
    assert counts.blocks.sum() == 2 and counts.blocks[0, 0] == 2
    assert counts.weight_tiles == 2 * 8
    assert counts.pairs[0, 0] == 8  # 128 rows, 16 at a time
    assert counts.rows[0, 0] == 128
    # 128 rows of 32 bytes of weights, 128 rows of 128 bytes of inputs: 1 and 2 requests, 2 and 8 beats.
    assert counts.reads[0, 0].tolist() == [128, 256]
    assert counts.read_beats[0, 0].tolist() == [256, 1024]
    assert counts.writes[0, 0] == 128 and counts.write_beats[0, 0] == 256
    assert counts.blocks_per_output == 1
    # Inputs are used again in the second block; half lines of weights and outputs are completed there. Each block touches
    # 128 lines of weights, 256 of inputs and 128 of outputs, and they are the same ones.
    assert counts.reuse_steps[0, :, 0].tolist() == [2, 2, 2]  # K, the innermost loop
    assert np.all(counts.reuse_steps[..., 1:] == 1)
    assert counts.reuse_bytes[0, :, 0].tolist() == [(128 + 256 + 128) * 64] * 3
    assert counts.total_bytes == (128 + 256 + 128) * 64


def test_kernel_of_two_by_hand():
    """57 x 57 outputs in tiles of 8 x 8: 7 of 8 and one of 1 along each axis; 8 blocks of 64 channels each."""
    counts = counts_of(KERNEL_OF_2)
    kinds = counts.blocks[0].reshape(3, 3)
    assert kinds.tolist() == [[8, 48, 8], [48, 288, 48], [8, 48, 8]]
    assert counts.weight_tiles == 4 * 4 * 64
    # One command a row of the tile; the first one waits for 16 rows of weights.
    assert counts.pairs[0].reshape(3, 3).tolist() == [[8, 8, 1]] * 3
    assert counts.rows[0].reshape(3, 3).tolist() == [[72, 72, 16], [72, 72, 16], [44, 44, 16]]
    # Padded by one: the first tile loads 8 columns, others 9, the last one only the 56th.
    side = np.array([8, 9, 1])
    assert counts.reads[0, :, 1].reshape(3, 3).tolist() == (side[:, None] * side * 16).tolist()
    assert counts.reads[0, 0, 0] == 4 * 1024
    assert counts.writes[0].reshape(3, 3).tolist() == [[64, 64, 8], [64, 64, 8], [8, 8, 1]]
    # Weights: K, innermost, brings other lines; P and Q the same ones.
    assert counts.reuse_steps[0, 0, :3].tolist() == [1, 8, 8]
    weights = 4 * 1024 * 512
    # Between two steps of P: all weights, 9 of 56 rows of inputs, 8 of 57 rows of outputs.
    assert counts.reuse_bytes[0, 0, 1] == weights + 9 * 56 * 1024 + 8 * 57 * 512
    # Inputs are used again by every K.
    assert counts.reuse_steps[0, 1, :3].tolist() == [8, 1, 1]
    assert counts.reuse_bytes[0, 1, 0] == weights + 9 * 9 * 1024 + 8 * 8 * 512
    assert counts.total_bytes == weights + 56 * 56 * 1024 + 57 * 57 * 512


def walked(layer: Mapping[str, int], tile: Mapping[str, int], stride: int) -> dict[str, int]:
    """Counts of a layer from every block, command and pixel of a padded convolution."""
    padding = layer["R"] // 2
    inputs, outputs = ({}, {})
    for name in "PQ":
        inputs[name] = layer[name] * stride
        outputs[name] = (inputs[name] + 2 * padding - layer["R"]) // stride + 1
    ends = layer | outputs
    loops = [range(0, ends[name], tile[name]) for name in DIMENSIONS]
    found = dict.fromkeys(("blocks", "pairs", "rows", "weights", "inputs", "writes", "beats"), 0)
    for begin in itertools.product(*loops):
        at = dict(zip(DIMENSIONS, begin, strict=True))
        size = {name: min(tile[name], ends[name] - at[name]) for name in DIMENSIONS}
        found["blocks"] += 1
        tiles = -(-size["K"] // 16) * size["R"] * size["S"] * -(-size["C"] // 16)
        fresh, pairs, rows = True, 0, 0
        for _ in range(size["N"] * size["Q"]):
            for column in range(0, size["P"], 16):
                pairs += 1
                rows += 16 if fresh else max(min(16, size["P"] - column), 4)
                fresh = False
        found["pairs"] += tiles * pairs
        found["rows"] += tiles * rows
        found["weights"] += size["R"] * size["S"] * size["C"] * -(-size["K"] // 64)

        def loaded(output: str, kernel: str, at: Any = at, size: Any = size) -> int:
            first = at[output] * stride + at[kernel] - padding
            reach = size[output] * stride + size[kernel] - 1
            return sum(0 <= pixel < inputs[output] for pixel in range(first, first + reach))

        pixels = loaded("P", "R") * loaded("Q", "S") * size["N"]
        found["inputs"] += pixels * -(-size["C"] // 64)
        if all(at[name] + tile[name] >= layer[name] for name in "RSC"):
            pixels = size["P"] * size["Q"] * size["N"]
            found["writes"] += pixels * -(-size["K"] // 64)
            found["beats"] += pixels * -(-size["K"] // 16)
    return found


@pytest.mark.parametrize(
    "text,stride",
    [
        ("L3[WIO] Q3 K2 - L2[WI] N1 K16X - L1[O] R2 S2 C3 P7 C16X - L0[W] Q2", 1),
        ("L3[WIO] R3 P2 C2 - L2[WI] N1 K16X - L1[O] K5 S3 Q5 P3 C16X - L0[W] P6", 1),
        ("L3[WIO] S3 Q2 K2 P5 - L2[WI] N1 K12X - L1[O] R3 Q3 C5 - L0[W] P4", 2),
        ("L3[WIO] N2 P2 - L2[WI] N1 K16X - L1[O] N2 Q7 P9 C16X - L0[W] N1", 2),
    ],
)
def test_counts_are_those_of_a_walk(text: str, stride: int):
    nests = parse_mappings([text])
    counts = count_commands(nests, np.array([stride]))
    layer, tile = (
        dict(zip(DIMENSIONS, values[0].tolist(), strict=True))
        for values in (nests.sizes, nests.tiles)
    )
    blocks, once = counts.blocks, counts.blocks_per_output
    totals = {
        "blocks": np.sum(blocks),
        "pairs": np.sum(blocks * counts.weight_tiles * counts.pairs),
        "rows": np.sum(blocks * counts.weight_tiles * counts.rows),
        "weights": np.sum(blocks * counts.reads[..., 0]),
        "inputs": np.sum(blocks * counts.reads[..., 1]),
        "writes": np.sum(blocks / once * counts.writes),
        "beats": np.sum(blocks / once * counts.write_beats),
    }
    # Loads are means over the positions of the kernel: float64.
    assert totals == pytest.approx(walked(layer, tile, stride), rel=1e-12)


def test_without_padding_outputs_are_those_of_the_mapping():
    counts = counts_of(KERNEL_OF_2, padding="none")
    assert counts.blocks.sum() == 7 * 7 * 8
    assert np.all(counts.reads[0, counts.blocks[0] > 0, 1] == 81 * 16)


def test_bad_counts_are_named():
    with pytest.raises(DataError, match="`stride`"):
        counts_of(PRODUCT, stride=0)
    with pytest.raises(UnknownNameError, match="unknown padding `same`"):
        counts_of(PRODUCT, padding="same")


# --- cycles


def test_missing_lines():
    ratio = jnp.asarray([0.1, 0.9, 1.5, 2.0, 3.0, 1e4])
    found = missing(ratio, 1.0)
    # Sizes of the giant component of a random graph, the same equation: 0.5828, 0.7968, 0.9405.
    np.testing.assert_allclose(found, [0, 0, 0.58281, 0.79681, 0.94048, 1.0], atol=1e-5)
    np.testing.assert_allclose(found, 1.0 - jnp.exp(-found * ratio), atol=1e-6)
    assert 0.0 <= float(missing(jnp.asarray([1.0]), 1.0)[0]) < 1e-3


def test_cycles_by_hand():
    """The product above, warm: 4096 cycles of the array, in two blocks; loads and stores hide behind them."""
    counts = counts_of(PRODUCT)
    factors = dict.fromkeys(CALIBRATED, 0.0) | {"start_cycles": 100.0, "read_request_cycles": 2.0}
    compute, load, store = 16 * 128, 256 + 1024 + 2 * (128 + 256), 256
    found = cycles(factors, counts, smoothness=None)
    assert float(found.total[0]) == 100 + compute + compute + load + store
    assert float(cycles(factors, counts, overlap="none").total[0]) == 100 + 2 * (
        compute + load + store
    )
    assert float(found.compute[0]) == 2 * compute and float(found.misses[0]) == 0.0
    # No cache: all lines of all three tensors miss, each once a block.
    cold = cycles(
        factors | {"read_miss_cycles": 1.0, "write_miss_cycles": 10.0}, counts, cache_bytes=1.0
    )
    assert float(cold.misses[0]) == pytest.approx(2 * (384 + 10 * 128), rel=1e-6)


@pytest.mark.parametrize("factor", [factor.name for factor in FACTORS])
@pytest.mark.parametrize("smoothness", [None, 8.0])
def test_more_of_any_factor_takes_longer(factor: str, smoothness: float | None):
    counts = golden_counts()
    found = [
        np.asarray(total_of(of_factor(factor, scale), counts, smoothness=smoothness))
        for scale in (0.0, 0.5, 1.0, 2.0, 4.0)
    ]
    steps = np.diff(found, axis=0)
    # Where another limit binds, float32 rounding is what is left.
    assert np.all(steps >= -1e-6 * found[0]) and np.any(steps > 0.0)


def test_smaller_caches_and_less_overlap_take_longer():
    counts = golden_counts()
    by_size = [total_of(CALIBRATED, counts, cache_bytes=2.0**n * 1024) for n in (20, 10, 8, 5)]
    assert np.all(np.diff(by_size, axis=0) >= 0.0)
    by_overlap = [
        total_of(CALIBRATED, counts, smoothness=None, overlap=overlap)
        for overlap in ("engines", "memory_in_series", "none")
    ]
    assert np.all(np.diff(by_overlap, axis=0) >= 0.0)


def test_gradients_are_those_of_finite_differences():
    """Of all factors and the cache's capacity, by its logarithm."""
    counts = golden_counts()
    names = [*CALIBRATED, "cache_bytes"]

    @jax.jit
    def log_total(logs: jax.Array) -> jax.Array:
        values = dict(zip(names, jnp.exp(logs), strict=True))
        cache = values.pop("cache_bytes")
        return jnp.log(cycles(values, counts, cache_bytes=cache).total)

    with jax.enable_x64(True):
        start = jnp.log(jnp.asarray([*CALIBRATED.values(), CACHE_BYTES], jnp.float64))
        step = 1e-5 * jnp.eye(len(names), dtype=jnp.float64)
        exact = np.asarray(jax.jacfwd(log_total)(start))
        backward = np.asarray(jax.jacrev(log_total)(start))
        ends = [np.asarray([log_total(start + sign * one) for one in step]) for sign in (1.0, -1.0)]
    central = (ends[0] - ends[1]).T / 2e-5
    assert np.all(np.any(exact != 0.0, axis=0))
    # Central differences of the fifth digit, in float64.
    np.testing.assert_allclose(exact, central, atol=1e-8)
    np.testing.assert_allclose(backward, exact, atol=1e-12)


def test_bad_factors_are_named():
    counts = counts_of(PRODUCT)
    with pytest.raises(UnknownNameError, match="`factors` must be pair_issue_cycles"):
        cycles({"pair_issue_cycles": 8.0}, counts)
    with pytest.raises(UnknownNameError, match="unknown overlap `all`"):
        cycles(CALIBRATED, counts, overlap="all")  # type: ignore[arg-type]


def golden_counts() -> GemminiCounts:
    nests = parse_mappings([row["mapping.mapping"] for row in ROWS])
    return count_commands(nests, np.array([int(row["prob.Wstride"]) for row in ROWS]))


def test_calibrated_factors_predict_the_golden_rows():
    """Within 25 %: a few times the mean error of docs/validation_rtl.md."""
    measured = np.array([float(row["target.gemmini_cycle"]) for row in ROWS])
    total = np.asarray(cycles(CALIBRATED, golden_counts()).total)
    np.testing.assert_allclose(total, measured, rtol=0.25)


# --- reference data


@pytest.fixture
def validation() -> Path:
    """The folder of reference results."""
    folder = os.environ.get("CODESIGN_VALIDATION")
    if not folder:
        pytest.skip("set CODESIGN_VALIDATION to the folder of reference results")
    return Path(folder)


def test_held_out_errors_are_within_their_limits(validation: Path):
    rows = validation_rtl.validation_rows(validation / "firesim_gemmini.csv.gz", settings=QUICK)
    limited = [row for row in rows if row.limit is not None]
    assert len(limited) == 4
    for row in limited:
        assert row.limit is not None and row.value <= row.limit, row.metric
    errors = {row.metric: row.value for row in rows if row.unit == "%"}
    shipped, timeloop, model, constant = errors.values()
    assert shipped < model < constant < timeloop


def test_every_mapping_of_the_timeloop_set_is_read(validation: Path):
    columns = calibrate_machine.read_columns(validation / "timeloop_gemmini.csv.gz")
    nests = parse_mappings(columns["mapping.mapping"])
    sizes = np.array([columns[f"prob.{name}"] for name in DIMENSIONS], np.int64).T
    np.testing.assert_array_equal(nests.sizes, sizes)
    stride = np.array(columns["prob.Wstride"], np.int64)
    counts = count_commands(nests, stride)
    assert np.all(counts.rows * counts.blocks >= counts.pairs * counts.blocks)


def test_document_has_the_figures_of_the_record():
    record = json.loads((ROOT / "docs" / "validation_rtl.json").read_text())
    text = (ROOT / "docs" / "validation_rtl.md").read_text()
    assert validation_rtl.updated(text, record) == text
    for factor in record["factors"]:
        assert CALIBRATED[factor["name"]] == pytest.approx(factor["value"], rel=0.01)
