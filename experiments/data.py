"""Tasks: a data set in three parts, and the vision model that fits its images.

The test part is read by `codesign evaluate --part test` and by the curve's last measurement, by nothing else.
"""

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from codesign.errors import DataError, UnknownNameError

Part = Literal["train", "validation", "test"]
SPLIT_SEED = 0
"""Seed of the stratified 60 / 20 / 20 split of digits."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Raw integer images `[N, image, image]` or with channels last, and labels `[N]`."""

    pixels: NDArray[np.int32]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    def first(self, number: int | None) -> "Examples":
        """Returns the first examples; all if `number` is None."""
        return Examples(pixels=self.pixels[:number], labels=self.labels[:number])


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task on images.

    A pixel p enters the model as (p - pixel_offset) * pixel_scale.
    """

    name: str
    parts: dict[Part, Examples]
    image_size: int
    channels: int
    num_classes: int
    pixel_offset: int
    pixel_scale: float


def digits() -> Task:
    """Returns the 8 x 8 handwritten digits bundled with scikit-learn: 1,797 images, 17 grey levels, 10 classes.

    Split 60 / 20 / 20, stratified, seed 0.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    pixels, labels = bundle.images, bundle.target
    train, rest, train_labels, rest_labels = train_test_split(
        pixels, labels, test_size=0.4, stratify=labels, random_state=SPLIT_SEED
    )
    validation, test, validation_labels, test_labels = train_test_split(
        rest, rest_labels, test_size=0.5, stratify=rest_labels, random_state=SPLIT_SEED
    )
    return Task(
        name="digits",
        parts={
            "train": checked(train, train_labels, 10, "digits, train"),
            "validation": checked(validation, validation_labels, 10, "digits, validation"),
            "test": checked(test, test_labels, 10, "digits, test"),
        },
        image_size=8,
        channels=1,
        num_classes=10,
        pixel_offset=8,
        pixel_scale=1.0 / 8.0,
    )


TASKS = {"digits": digits}


def load_task(name: str) -> Task:
    """Returns a task by name.

    Raises:
      UnknownNameError: If there is none of that name.
    """
    if name not in TASKS:
        raise UnknownNameError(
            f"task `{name}` does not exist: choose one of {', '.join(sorted(TASKS))}"
        )
    return TASKS[name]()


def checked(
    pixels: NDArray[np.generic], labels: NDArray[np.generic], num_classes: int, origin: str
) -> Examples:
    """Returns examples with int32 arrays after checking every value.

    Raises:
      DataError: If a pixel is not finite or not whole, a label is out of range, or lengths differ.
    """
    values = np.asarray(pixels, np.float64)
    if len(values) != len(labels) or len(values) == 0:
        raise DataError(
            f"{origin}: {len(values)} images and {len(labels)} labels: give one label per image, at least one"
        )
    bad = ~np.isfinite(values)
    if bad.any():
        where = tuple(int(index) for index in np.argwhere(bad)[0])
        raise DataError(f"{origin}: pixel {where} is {values[where]}: remove or repair that image")
    if np.any(values != np.rint(values)):
        raise DataError(f"{origin}: pixels must be whole numbers: give the raw integer images")
    classes = np.asarray(labels)
    if np.any((classes < 0) | (classes >= num_classes)):
        worst = int(np.argmax((classes < 0) | (classes >= num_classes)))
        raise DataError(
            f"{origin}: label {classes[worst]} of image {worst} is outside 0..{num_classes - 1}: correct it"
        )
    return Examples(pixels=values.astype(np.int32), labels=classes.astype(np.int32))


def shifted(examples: Examples, *, reach: int) -> Examples:
    """Returns every image moved by up to `reach` pixels each way, zeros moved in: (2 reach + 1)^2 times as many.

    The images of one shift stay together, in the original order.
    """
    size = examples.pixels.shape[1]
    pad = [(0, 0), (reach, reach), (reach, reach)] + [(0, 0)] * (examples.pixels.ndim - 3)
    padded = np.pad(examples.pixels, pad)
    moves = [(row, column) for row in range(2 * reach + 1) for column in range(2 * reach + 1)]
    pixels = [padded[:, row : row + size, column : column + size] for row, column in moves]
    return Examples(
        pixels=np.concatenate(pixels), labels=np.tile(examples.labels, len(moves)).astype(np.int32)
    )


def batch_indices(num_examples: int, batch_size: int, step: int, seed: int) -> NDArray[np.int64]:
    """Returns the examples of one step: consecutive parts of a permutation per epoch, a pure function of the step."""
    per_epoch = max(1, num_examples // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order[position * batch_size : (position + 1) * batch_size]
