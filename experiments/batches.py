"""Batches of one shape: rows in buckets of length, images shifted as they are read, order a pure function of the step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign.errors import DataError
from codesign.experiments.data import Examples

Inputs = dict[str, NDArray[Any]]
"""`pixels`, or `tokens` and `valid`, as in `Examples`."""
Indices = NDArray[np.int64]


class TrainingBatches:
    """The training batches of a set of examples, each a pure function of the step.

    Every epoch is another permutation. Rows go to the shortest bucket that holds them; a batch is of one bucket, and the
    batches of an epoch are shuffled across buckets. What does not fill a batch of its bucket is left to another epoch's
    order. A bucket with fewer rows than a batch takes the longest of the shorter rows or, if they are too few, joins
    the next longer bucket, so that every example is read.

    Args:
      examples: N examples.
      batch_size: Examples of a batch; more than there are: all of them.
      seed: Seed of the order.
      buckets: Lengths, rising; none: rows are not cut.
      reach: Images are moved by up to this many pixels each way: (2 reach + 1)^2 N examples, shift by shift. Text is not.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
        buckets: tuple[int, ...] = (),
        reach: int = 0,
    ):
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.buckets = buckets
        self.reach = reach if "pixels" in examples.inputs else 0

    @property
    def num_examples(self) -> int:
        """Examples of an epoch, shifts included."""
        return (2 * self.reach + 1) ** 2 * len(self.examples)

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        counts = np.bincount(self._bucket_numbers)
        return max(1, int(np.sum(counts // self.batch_size)))

    @functools.cached_property
    def _bucket_numbers(self) -> NDArray[np.int64]:
        """The bucket of every example, so chosen that no bucket with examples has fewer than a batch, `[N]`."""
        if not self.buckets:
            return np.zeros(self.num_examples, np.int64)
        lengths = row_lengths(self.examples)
        numbers = bucket_numbers(lengths, self.buckets)
        for number in reversed(range(len(self.buckets))):
            missing = self.batch_size - int(np.sum(numbers == number))
            if not 0 < missing < self.batch_size:
                continue
            shorter = np.flatnonzero(numbers < number)
            longest_first = shorter[np.argsort(-lengths[shorter], kind="stable")]
            numbers[longest_first[:missing]] = number
            longer = numbers[numbers > number]
            if len(shorter) < missing and len(longer):
                numbers[numbers == number] = np.min(longer)
        return numbers

    def indices(self, step: int) -> tuple[Indices, int | None]:
        """Returns the flat indices of a step and the length of its rows; None without buckets."""
        epoch, position = divmod(step, self.per_epoch)
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.num_examples)
        if not self.buckets:
            return order[position * self.batch_size : (position + 1) * self.batch_size], None
        numbers = self._bucket_numbers[order]
        parts: list[tuple[Indices, int]] = []
        for number, length in enumerate(self.buckets):
            own = order[numbers == number]
            size = min(self.batch_size, len(self.examples))
            full = len(own) // size
            parts += [(part, length) for part in own[: full * size].reshape(full, size)]
        return parts[int(generator.permutation(len(parts))[position])]

    def key(self, step: int) -> tuple[int | None, bytes]:
        """Returns what tells the inputs of a step's batch from others of the same examples and reach."""
        indices, length = self.indices(step)
        return length, indices.tobytes()

    def batch(self, step: int) -> dict[str, NDArray[Any]]:
        """Returns the inputs and `labels` of a step, cut to the bucket."""
        indices, length = self.indices(step)
        chosen = gathered(self.examples, indices, reach=self.reach, length=length)
        return chosen.inputs | {"labels": chosen.labels}


def row_lengths(examples: Examples) -> NDArray[np.int64]:
    """Returns the tokens of each row up to its last valid one, `[N]`."""
    valid = examples.inputs["valid"]
    positions = np.arange(1, valid.shape[1] + 1)
    result: NDArray[np.int64] = np.max(valid * positions, axis=1, initial=0)
    return result


def bucket_numbers(lengths: NDArray[np.int64], buckets: Sequence[int]) -> NDArray[np.int64]:
    """Returns the number of the shortest bucket that holds each row, `[N]`.

    Raises:
      DataError: If the buckets do not rise, or a row is longer than the last one.
    """
    if list(buckets) != sorted(set(buckets)):
        raise DataError(f"`buckets` must rise, got {tuple(buckets)}: sort them")
    numbers = np.searchsorted(np.asarray(buckets), lengths)
    if np.any(numbers == len(buckets)):
        raise DataError(
            f"a row of {int(np.max(lengths))} tokens exceeds the last bucket, {buckets[-1]}: raise it"
        )
    return numbers


def gathered(
    examples: Examples, indices: Indices, *, reach: int = 0, length: int | None = None
) -> Examples:
    """Returns the examples of flat indices, images shifted, rows cut.

    Flat index f is example f mod N with shift f div N = row * (2 reach + 1) + column: the window that starts at (row,
    column) of the image with `reach` zeros around it.

    Args:
      examples: N examples.
      indices: Flat indices below (2 reach + 1)^2 N, `[B]`.
      reach: Largest shift in pixels; 0 for text.
      length: Tokens that are kept of each row; None: all.
    """
    shift, example = np.divmod(indices, len(examples))
    chosen = examples.take(example)
    if reach:
        moved = _moved(chosen.inputs["pixels"], *np.divmod(shift, 2 * reach + 1), reach)
        chosen = dataclasses.replace(chosen, inputs=chosen.inputs | {"pixels": moved})
    if length is not None:
        labels = chosen.labels[:, :length] if chosen.labels.ndim > 1 else chosen.labels
        inputs = {name: values[:, :length] for name, values in chosen.inputs.items()}
        chosen = Examples(inputs=inputs, labels=labels)
    return chosen


def _moved(pixels: NDArray[Any], rows: Indices, columns: Indices, reach: int) -> NDArray[Any]:
    """Returns the window of each zero-padded image that starts at its row and column, in the shape of `pixels`."""
    size = pixels.shape[1]
    around = [(0, 0), (reach, reach), (reach, reach)] + [(0, 0)] * (pixels.ndim - 3)
    image = np.arange(len(pixels))[:, None, None]
    down = (rows[:, None] + np.arange(size))[:, :, None]
    right = (columns[:, None] + np.arange(size))[:, None, :]
    moved: NDArray[Any] = np.pad(pixels, around)[image, down, right]
    return moved


def chunks(
    examples: Examples, size: Callable[[int], int], buckets: Sequence[int] = ()
) -> Iterator[tuple[Inputs, Indices]]:
    """Yields all examples, bucket by bucket, in chunks with the same number of rows in each bucket.

    A bucket of fewer examples than a chunk holds takes the next power of two instead, so that few examples cost little and
    still few shapes are compiled.

    `result[indices] = output[: len(indices)]` puts results back in order.

    Args:
      examples: N examples.
      size: Most rows of a chunk, >= 1, by the tokens of a row; by 1 for images.
      buckets: Lengths, rising; none: rows are not cut.

    Yields:
      Inputs of as many rows, and the indices `[n]` of the first n of them; the rest repeat the first row.
    """
    everything = np.arange(len(examples))
    groups: list[tuple[Indices, int | None]] = [(everything, None)]
    if buckets:
        numbers = bucket_numbers(row_lengths(examples), buckets)
        groups = [(everything[numbers == number], own) for number, own in enumerate(buckets)]
    uncut = examples.inputs["tokens"].shape[1] if "tokens" in examples.inputs else 1
    for group, length in groups:
        most = size(uncut if length is None else length)
        rows = min(most, 1 << max(len(group) - 1, 0).bit_length())
        for start in range(0, len(group), rows):
            indices = group[start : start + rows]
            filled = np.concatenate([indices, np.repeat(indices[:1], rows - len(indices))])
            yield gathered(examples, filled, length=length).inputs, indices
