"""Sorted-updating attention: SOFA's worked example, any order and split, and the operations of each order."""

import numpy as np
import pytest

from codesign.references.sorted_attention import (
    KINDS,
    ORDERS,
    issue_order,
    joined,
    new_references,
    products,
    segment_sums,
    sorted_attention,
)


def softmax_output(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return np.asarray(weights @ values / weights.sum())


def test_the_worked_example() -> None:
    """Specification: segments s = (2, 1 | 3, 0), V = (1, 2 | 3, 4)."""
    scores, values = np.asarray([2.0, 1.0, 3.0, 0.0]), np.asarray([[1.0], [2.0], [3.0], [4.0]])
    parts = [segment_sums(scores[part], values[part]) for part in (slice(0, 2), slice(2, 4))]
    for (total, output), wanted in zip(
        parts, ((1.36788, 1.73576), (1.04979, 3.19915)), strict=True
    ):
        assert (total, output[0]) == pytest.approx(wanted, abs=1e-5)
    total, output = joined(
        scores[[0, 2]], np.asarray([one for one, _ in parts]), np.stack([o for _, o in parts])
    )
    assert total == pytest.approx(1.55300, abs=1e-5) and output[0] == pytest.approx(
        3.83770, abs=1e-5
    )
    segments = issue_order(np.asarray([2, 1, 3, 0]), np.ones(4, bool), 2)
    whole = sorted_attention(scores, values, segments)
    assert whole[0] == pytest.approx(2.47115, abs=1e-5)
    np.testing.assert_allclose(whole, softmax_output(scores, values), rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_and_any_split_are_the_softmax_of_what_is_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, values = 3.0 * rng.standard_normal(50), rng.standard_normal((50, 6))
    kept = rng.random(50) < 0.4
    wanted = softmax_output(scores[kept], values[kept])
    chosen = rng.permutation(np.flatnonzero(kept))
    for cuts in ([], [1], [3, 4, 11], list(range(1, len(chosen)))):
        found = sorted_attention(scores, values, np.split(chosen, cuts))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    # The predicted order may be wrong: here it is the opposite.
    predicted = np.rint(-100 * scores).astype(np.int64)
    for length in (1, 7, 64):
        found = sorted_attention(scores, values, issue_order(predicted, kept, length))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_keys_are_issued_from_the_best_down_ties_by_index() -> None:
    predicted = np.asarray([4, 9, 4, 1, 7, 7, 0, 2])
    kept = np.asarray([1, 0, 1, 1, 1, 1, 0, 0], bool)
    order = issue_order(predicted, kept, 4)
    assert [segment.tolist() for segment in order] == [[0, 2, 3], [4, 5]]
    assert [one.tolist() for one in issue_order(predicted, kept, 2)] == [[0], [2, 3], [4, 5]]


def counted_loop(order: str, tiles: list[list[float]], head_dim: int) -> dict[str, int]:
    """Operations of one row, by running it: `tiles` hold scores in order of issue."""
    count = dict.fromkeys(KINDS, 0)
    reference: float | None = None

    def rescale() -> None:
        count["add"] += 1
        count["exp"] += 1
        count["multiply"] += head_dim + 1

    for tile in (one for one in tiles if one):
        if order == "ascending_by_key":
            for _ in tile:
                count["add"] += 2
                count["exp"] += 1
                count["multiply"] += 1
            continue
        is_flash = order.startswith("flash")
        candidate = max(tile) if is_flash or order == "ascending_by_tile" else tile[0]
        count["compare"] += len(tile) if is_flash else 1
        always = order in ("flash", "ascending_by_tile", "descending_joined")
        if always or reference is None or candidate > reference:
            rescale()
            reference = candidate if reference is None else max(candidate, reference)
        if order == "descending_joined":
            count["add"] += head_dim + 1
        count["add"] += 2 * len(tile)
        count["exp"] += len(tile)
    return count


@pytest.mark.parametrize("order", ORDERS)
def test_operations_are_those_of_a_plain_loop(order: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(5):
        tiles = [rng.integers(0, 30, rng.integers(0, 5)).tolist() for _ in range(6)]
        tiles[2] = [31]
        num_keys = np.asarray([len(tile) for tile in tiles])
        pick = max if order.startswith("flash") else (lambda tile: tile[0])
        offered = np.asarray([pick(tile) if tile else 0 for tile in tiles])
        found = ORDERS[order](num_keys, new_references(offered, num_keys), 8)
        assert {kind: int(value) for kind, value in found.items()} == counted_loop(order, tiles, 8)


def test_one_comparison_in_four_is_the_published_quarter() -> None:
    """Without rescales, FlashAttention does four operations per key, and falling order three."""
    keys, none = np.asarray([10**6]), np.asarray([True])
    flash, falling = (
        sum(int(value) for value in ORDERS[name](keys, none, 64).values())
        for name in ("flash", "descending_in_sequence")
    )
    assert 1.0 - falling / flash == pytest.approx(0.25, abs=1e-3)


def test_products_are_the_same_in_every_order() -> None:
    found = products(np.asarray([[3, 2], [0, 1]]), 4)
    np.testing.assert_array_equal(found["multiply"], [40, 8])
    np.testing.assert_array_equal(found["add"], found["multiply"])


def test_a_reference_rises_only_above_all_before_it() -> None:
    rises = new_references(np.asarray([5, 99, 5, 7, 6, 7]), np.asarray([1, 0, 2, 1, 1, 1]))
    np.testing.assert_array_equal(rises, [True, False, False, True, False, False])
