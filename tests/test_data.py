"""Tasks: the split of digits, checks of raw data, shifts, and the order of batches."""

import numpy as np
import pytest

from codesign.errors import DataError, UnknownNameError
from codesign.experiments.data import Examples, batch_indices, checked, digits, load_task, shifted


def test_digits_are_split_in_three_disjoint_stratified_parts() -> None:
    task = digits()
    sizes = {name: len(part) for name, part in task.parts.items()}
    # 60 / 20 / 20 of 1,797.
    assert sizes == {"train": 1078, "validation": 359, "test": 360}
    everything = np.concatenate([part.labels for part in task.parts.values()])
    shares = np.bincount(everything) / len(everything)
    for part in task.parts.values():
        assert part.pixels.shape == (len(part), 8, 8) and part.pixels.dtype == np.int32
        assert part.pixels.min() == 0 and part.pixels.max() == 16
        np.testing.assert_allclose(np.bincount(part.labels) / len(part), shares, atol=2 / len(part))
    images = {name: {image.tobytes() for image in part.pixels} for name, part in task.parts.items()}
    assert not images["train"] & images["test"] and not images["validation"] & images["test"]
    again = digits()
    for name, part in task.parts.items():
        np.testing.assert_array_equal(part.pixels, again.parts[name].pixels)


def test_unknown_task_is_named() -> None:
    with pytest.raises(UnknownNameError, match="task `mnist` does not exist: choose one of digits"):
        load_task("mnist")


@pytest.mark.parametrize(
    ("pixel", "label", "message"),
    [
        (np.nan, 0, r"x: pixel \(1, 2, 3\) is nan"),
        (-np.inf, 0, r"x: pixel \(1, 2, 3\) is -inf"),
        (0.5, 0, "whole numbers"),
        (1.0, 10, r"label 10 of image 1 is outside 0\.\.9"),
        (1.0, -1, r"label -1 of image 1 is outside 0\.\.9"),
    ],
)
def test_bad_values_are_named(pixel: float, label: int, message: str) -> None:
    pixels, labels = np.zeros((3, 8, 8)), np.zeros(3, int)
    pixels[1, 2, 3], labels[1] = pixel, label
    with pytest.raises(DataError, match=message):
        checked(pixels, labels, 10, "x")


@pytest.mark.parametrize(("images", "labels"), [(0, 0), (3, 2)])
def test_empty_or_unequal_parts_are_refused(images: int, labels: int) -> None:
    with pytest.raises(DataError, match=f"{images} images and {labels} labels"):
        checked(np.zeros((images, 8, 8)), np.zeros(labels, int), 10, "x")


def test_good_values_become_int32() -> None:
    examples = checked(np.full((2, 3, 3), 7.0), np.asarray([0, 9]), 10, "x")
    assert examples.pixels.dtype == examples.labels.dtype == np.int32
    assert len(examples.first(1)) == 1 and len(examples.first(None)) == 2


def test_shifts_move_zeros_in() -> None:
    pixels = np.arange(1, 10, dtype=np.int32).reshape(1, 3, 3)
    moved = shifted(Examples(pixels=pixels, labels=np.asarray([4], np.int32)), reach=1)
    assert len(moved) == 9 and np.all(moved.labels == 4)
    # The window starts at (row, column) of the padded image; (1, 1) is the image itself.
    np.testing.assert_array_equal(moved.pixels[4], pixels[0])
    np.testing.assert_array_equal(moved.pixels[0], [[0, 0, 0], [0, 1, 2], [0, 4, 5]])
    np.testing.assert_array_equal(moved.pixels[8], [[5, 6, 0], [8, 9, 0], [0, 0, 0]])
    still = shifted(Examples(pixels=pixels, labels=np.zeros(1, np.int32)), reach=0)
    np.testing.assert_array_equal(still.pixels, pixels)


def test_shifts_of_coloured_images_keep_their_channels() -> None:
    pixels = np.random.default_rng(0).integers(0, 9, (2, 4, 4, 3)).astype(np.int32)
    moved = shifted(Examples(pixels=pixels, labels=np.asarray([0, 1], np.int32)), reach=1)
    assert moved.pixels.shape == (18, 4, 4, 3)
    np.testing.assert_array_equal(moved.pixels[8:10], pixels)
    np.testing.assert_array_equal(moved.labels, np.tile([0, 1], 9))


def test_batches_are_a_pure_function_of_the_step_and_cover_an_epoch() -> None:
    def epoch(number: int, seed: int = 3) -> np.ndarray:
        steps = range(5 * number, 5 * (number + 1))
        return np.stack([batch_indices(20, 4, step, seed) for step in steps])

    first = epoch(0)
    assert first.shape == (5, 4)
    np.testing.assert_array_equal(np.sort(first, axis=None), np.arange(20))
    np.testing.assert_array_equal(first, epoch(0))
    assert not np.array_equal(first, epoch(1)) and not np.array_equal(first, epoch(0, seed=4))
    # What does not fill a batch is left to another epoch's order.
    assert len({int(i) for step in range(5) for i in batch_indices(23, 4, step, 0)}) == 20
    # A batch larger than the data is all of it.
    np.testing.assert_array_equal(np.sort(batch_indices(3, 8, 5, 0)), np.arange(3))
