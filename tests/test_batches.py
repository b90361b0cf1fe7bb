"""Batches: shifts, the order of an epoch, buckets of length, and chunks that give results back in order."""

import itertools
import math

import numpy as np
import pytest

from codesign.errors import DataError
from codesign.experiments.batches import (
    TrainingBatches,
    bucket_numbers,
    chunks,
    gathered,
    row_lengths,
)
from codesign.experiments.data import Examples


def images(pixels: np.ndarray, labels: list[int]) -> Examples:
    return Examples(inputs={"pixels": pixels.astype(np.int32)}, labels=np.asarray(labels, np.int32))


def texts(lengths: list[int], longest: int, *, has_token_labels: bool = False) -> Examples:
    """Rows whose tokens are 1, 2, ... and whose label is the row's number."""
    valid = np.arange(longest) < np.asarray(lengths)[:, None]
    tokens = np.where(valid, np.arange(1, longest + 1), 0).astype(np.int32)
    labels = np.arange(len(lengths), dtype=np.int32)
    return Examples(
        inputs={"tokens": tokens, "valid": valid}, labels=tokens + 1 if has_token_labels else labels
    )


def all_shifts(pixels: np.ndarray, reach: int) -> np.ndarray:
    """Every shift of every image as one array, shift by shift, rows of shifts first."""
    size = pixels.shape[1]
    pad = [(0, 0), (reach, reach), (reach, reach)] + [(0, 0)] * (pixels.ndim - 3)
    padded = np.pad(pixels, pad)
    moves = [(row, column) for row in range(2 * reach + 1) for column in range(2 * reach + 1)]
    return np.concatenate([padded[:, r : r + size, c : c + size] for r, c in moves])


def test_shifts_move_zeros_in() -> None:
    pixels = np.arange(1, 10).reshape(1, 3, 3)
    moved = gathered(images(pixels, [4]), np.arange(9), reach=1)
    assert len(moved) == 9 and np.all(moved.labels == 4)
    # The window starts at (row, column) of the padded image; (1, 1) is the image itself.
    np.testing.assert_array_equal(moved.inputs["pixels"][4], pixels[0])
    np.testing.assert_array_equal(moved.inputs["pixels"][0], [[0, 0, 0], [0, 1, 2], [0, 4, 5]])
    np.testing.assert_array_equal(moved.inputs["pixels"][8], [[5, 6, 0], [8, 9, 0], [0, 0, 0]])
    still = gathered(images(pixels, [0]), np.arange(1), reach=0)
    np.testing.assert_array_equal(still.inputs["pixels"], pixels)


@pytest.mark.parametrize("reach", [0, 1, 2])
@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 4, 4, 3)])
def test_image_batches_are_those_of_the_shifted_set(reach: int, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 9, shape).astype(np.int32)
    everything, labels = all_shifts(pixels, reach), np.tile(np.arange(5), (2 * reach + 1) ** 2)
    batches = TrainingBatches(images(pixels, list(range(5))), batch_size=3, seed=7, reach=reach)
    assert batches.num_examples == len(everything)
    assert batches.per_epoch == len(everything) // 3
    for step in range(2 * batches.per_epoch):
        # One permutation per epoch, its consecutive parts.
        epoch, position = divmod(step, len(everything) // 3)
        order = np.random.default_rng([7, epoch]).permutation(len(everything))
        chosen = order[3 * position : 3 * position + 3]
        batch = batches.batch(step)
        assert list(batch) == ["pixels", "labels"] and batches.key(step) == (None, chosen.tobytes())
        np.testing.assert_array_equal(batch["pixels"], everything[chosen])
        np.testing.assert_array_equal(batch["labels"], labels[chosen])


def test_batches_are_a_pure_function_of_the_step_and_cover_an_epoch() -> None:
    def epoch(number: int, seed: int = 3) -> np.ndarray:
        batches = TrainingBatches(images(np.zeros((20, 2, 2)), [0] * 20), batch_size=4, seed=seed)
        return np.stack([batches.indices(step)[0] for step in range(5 * number, 5 * number + 5)])

    first = epoch(0)
    assert first.shape == (5, 4)
    np.testing.assert_array_equal(np.sort(first, axis=None), np.arange(20))
    np.testing.assert_array_equal(first, epoch(0))
    assert not np.array_equal(first, epoch(1)) and not np.array_equal(first, epoch(0, seed=4))
    # What does not fill a batch is left to another epoch's order.
    batches = TrainingBatches(images(np.zeros((23, 2, 2)), [0] * 23), batch_size=4, seed=0)
    assert len({int(i) for step in range(5) for i in batches.indices(step)[0]}) == 20
    # A batch larger than the data is all of it.
    batches = TrainingBatches(images(np.zeros((3, 2, 2)), [0] * 3), batch_size=8, seed=0)
    np.testing.assert_array_equal(np.sort(batches.indices(5)[0]), np.arange(3))


def test_rows_go_to_the_shortest_bucket_that_holds_them() -> None:
    lengths = np.asarray([1, 3, 4, 5, 8])
    np.testing.assert_array_equal(bucket_numbers(lengths, (4, 8)), [0, 0, 0, 1, 1])
    with pytest.raises(DataError, match="a row of 8 tokens exceeds the last bucket, 7"):
        bucket_numbers(lengths, (4, 7))
    with pytest.raises(DataError, match=r"`buckets` must rise, got \(8, 4\)"):
        bucket_numbers(lengths, (8, 4))
    np.testing.assert_array_equal(row_lengths(texts([1, 3, 8], 8)), [1, 3, 8])
    # Not the number of valid tokens: none may be cut off behind a gap.
    gap = Examples(inputs={"valid": np.asarray([[True, False, True, False]])}, labels=np.zeros(1))
    np.testing.assert_array_equal(row_lengths(gap), [3])


@pytest.mark.parametrize("seed", range(5))
def test_bucketed_batches(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 17, 200)
    examples = texts(list(lengths), 16)
    batches = TrainingBatches(examples, batch_size=8, seed=seed, buckets=(4, 8, 16))
    counts = np.bincount(np.searchsorted([4, 8, 16], lengths), minlength=3)
    assert batches.per_epoch == np.sum(counts // 8)
    order, seen = [], []
    for step in range(batches.per_epoch):
        batch, (indices, width) = batches.batch(step), batches.indices(step)
        assert batch["tokens"].shape == batch["valid"].shape == (8, width)
        assert batches.key(step) == (width, indices.tobytes())
        # Nothing of a row is cut off, and no row would have fitted a shorter bucket.
        np.testing.assert_array_equal(np.sum(batch["valid"], axis=1), lengths[indices])
        assert np.all(np.searchsorted([4, 8, 16], lengths[indices]) == [4, 8, 16].index(width))
        np.testing.assert_array_equal(batch["labels"], indices)
        order.append(width)
        seen += indices.tolist()
    assert len(seen) == len(set(seen)) == 8 * batches.per_epoch
    # The buckets of an epoch are mixed, not one after the other.
    assert sum(before != after for before, after in itertools.pairwise(order)) > 2
    again = TrainingBatches(examples, batch_size=8, seed=seed, buckets=(4, 8, 16))
    np.testing.assert_array_equal(again.indices(11)[0], batches.indices(11)[0])
    other = [
        batches.indices(step)[0].tolist()
        for step in range(batches.per_epoch, 2 * batches.per_epoch)
    ]
    assert sorted(map(sorted, other)) != sorted(
        sorted(batches.indices(step)[0].tolist()) for step in range(batches.per_epoch)
    )


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        # Three long rows: the longest of the shorter ones fill their batch (4 of 4, 5 of 8 left).
        ([2] * 5 + [4] * 4 + [16] * 3, {4: 8, 16: 4}),
        # Three short ones join the middle bucket.
        ([2] * 3 + [8] * 4 + [16] * 4, {8: 7, 16: 4}),
        # Three short ones join the last bucket, the middle one being empty.
        ([2] * 3 + [16] * 4, {16: 7}),
        # Fewer than a batch in all: one batch of the longest bucket in use.
        ([2, 2, 8], {8: 3}),
        # A filled bucket leaves another too small: it joins too.
        ([2] * 4 + [16] * 3, {16: 7}),
    ],
)
def test_no_example_is_left_out_for_ever(lengths: list[int], counts: dict[int, int]) -> None:
    batches = TrainingBatches(texts(lengths, 16), batch_size=4, seed=0, buckets=(4, 8, 16))
    seen: dict[int, set[int]] = {}
    for step in range(60 * batches.per_epoch):
        indices, width = batches.indices(step)
        assert len(indices) == min(4, len(lengths))
        seen.setdefault(width, set()).update(indices.tolist())
    assert {width: len(rows) for width, rows in seen.items()} == counts
    # Rows that move up are the longest ones.
    for shorter, longer in itertools.pairwise(sorted(seen)):
        assert max(lengths[i] for i in seen[shorter]) <= min(lengths[i] for i in seen[longer])
    assert set().union(*seen.values()) == set(range(len(lengths)))


def test_token_labels_are_cut_with_their_rows() -> None:
    examples = texts([3, 3, 6, 7], 8, has_token_labels=True)
    batches = TrainingBatches(examples, batch_size=2, seed=0, buckets=(4, 8))
    widths = set()
    for step in range(20):
        batch = batches.batch(step)
        np.testing.assert_array_equal(batch["labels"], batch["tokens"] + 1)
        widths.add(batch["labels"].shape[1])
    assert widths == {4, 8}


@pytest.mark.parametrize("most", [1, 3, 7, 50])
@pytest.mark.parametrize("buckets", [(), (4, 8, 16), (16,)])
def test_chunks_give_results_back_in_order(most: int, buckets: tuple[int, ...]) -> None:
    def size(num_tokens: int) -> int:
        return max(1, most * 4 // num_tokens)

    lengths = np.random.default_rng(1).integers(1, 17, 23)
    sums, seen = np.full(23, -1), set()
    for inputs, indices in chunks(texts(list(lengths), 16), size, buckets):
        tokens = inputs["tokens"]
        seen.add(tokens.shape)
        assert 1 <= len(indices) <= len(tokens)
        filled = tokens[len(indices) :]
        np.testing.assert_array_equal(filled, np.repeat(tokens[:1], len(filled), axis=0))
        assert np.all(sums[indices] == -1)
        sums[indices] = np.sum(tokens, axis=1)[: len(indices)]
    np.testing.assert_array_equal(sums, lengths * (lengths + 1) // 2)
    numbers = np.searchsorted(buckets or (16,), lengths)
    assert seen == {
        (min(size(width), 2 ** math.ceil(math.log2(count))), width)
        for width, count in zip(buckets or (16,), np.bincount(numbers), strict=True)
    }


def test_chunks_of_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 9, (5, 4, 4)).astype(np.int32)
    asked, result = [], np.zeros_like(pixels)

    def size(num_tokens: int) -> int:
        asked.append(num_tokens)
        return 3

    for inputs, indices in chunks(images(pixels, [0] * 5), size):
        assert inputs["pixels"].shape == (3, 4, 4)
        result[indices] = inputs["pixels"][: len(indices)]
    np.testing.assert_array_equal(result, pixels)
    assert asked == [1]


def test_text_is_not_moved() -> None:
    batches = TrainingBatches(texts([2, 4, 4, 3], 4), batch_size=2, seed=0, buckets=(4,), reach=1)
    assert batches.num_examples == 4 and batches.per_epoch == 2
