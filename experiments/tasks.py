"""The known tasks by name, each a function of its settings.

The test part is read by `codesign evaluate --part test` and by the curve's last measurement, by nothing else.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign.errors import DataError, UnknownNameError
from codesign.experiments.checkpoint_sources import MINILM
from codesign.experiments.data import (
    DataSettings,
    Examples,
    ImageInput,
    Part,
    Task,
    TextInput,
)
from codesign.experiments.sources import folder_of, hub_splits, read_arrays, required
from codesign.experiments.text import (
    character_numbers,
    load_word_pieces,
    next_character_windows,
    read_characters,
)
from codesign.experiments.user_data import (
    Label,
    LabelledTexts,
    UserData,
    checked_rows,
    load_user_data,
    read_labelled,
)

SPLIT_SEED = 0
"""Seed of the stratified 60 / 20 / 20 split of digits."""
CHARACTERS = "characters"
"""Name of the tokenizer whose tokens are the training part's characters."""
TRAIN_TENTHS = 9
"""Tenths of a text that are its training part; the rest is its validation part."""


def digits(settings: DataSettings) -> Task:
    """Returns the 8 x 8 handwritten digits bundled with scikit-learn: 1,797 images, 17 grey levels, 10 classes.

    Split 60 / 20 / 20, stratified, seed 0. Reads none of the settings.
    """
    del settings
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
        kind="classification",
        num_outputs=10,
        input=ImageInput(image_size=8, channels=1, pixel_offset=8, pixel_scale=1.0 / 8.0),
        origin="scikit-learn's digits",
        classes=tuple("0123456789"),
    )


def mnist(settings: DataSettings) -> Task:
    """Returns 28 x 28 handwritten digits, 256 grey levels, 10 classes, from `train.npz`, `validation.npz`.

    Each has `image`, uint8 `[N, 28, 28]`, and `label`, `[N]`. From the hub: the last 10,000 training images are the
    validation part.
    """
    folder = folder_of("mnist", settings.data)
    arrays: dict[Part, list[NDArray[Any]]] = {}
    if folder is not None:
        for name in _parts_in(folder, "mnist", "{}.npz"):
            arrays[name] = read_arrays(folder / f"{name}.npz", "image", "label")
    else:
        train, test = hub_splits("mnist")
        splits: dict[Part, Any] = {"train": train, "test": test}
        for name, split in splits.items():
            images = np.stack([np.asarray(image, np.uint8) for image in split["image"]])
            arrays[name] = [images, np.asarray(split["label"])]
        held = min(10_000, len(arrays["train"][0]) // 6)
        arrays["validation"] = [values[-held:] for values in arrays["train"]]
        arrays["train"] = [values[:-held] for values in arrays["train"]]
    parts: dict[Part, Examples] = {}
    for name, (images, labels) in arrays.items():
        origin = f"mnist, {name}"
        if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or labels.ndim != 1:
            raise DataError(
                f"{origin}: images are {images.dtype} {list(images.shape)} and labels {list(labels.shape)}: "
                "give uint8 [N, 28, 28] and [N]"
            )
        parts[name] = checked(images, labels, 10, origin)
    return Task(
        name="mnist",
        parts=parts,
        kind="classification",
        num_outputs=10,
        input=ImageInput(image_size=28, channels=1, pixel_offset=128, pixel_scale=1.0 / 128.0),
        origin=_origin(folder),
        classes=tuple("0123456789"),
    )


def sst2(settings: DataSettings) -> Task:
    """Returns sentences of film reviews, negative or positive, from `train.jsonl.gz`, `validation.jsonl.gz`.

    Word pieces, at most 64 unless set. The hub's training part also holds phrases: 67,349 rows.
    """
    return _text_classes("sst2", settings, 64, ("negative", "positive"))


def spamassassin(settings: DataSettings) -> Task:
    """Returns e-mails, ham or spam, from `train.jsonl.gz`, `validation.jsonl.gz`.

    Word pieces, at most 256 unless set; half of the mails are longer than about 300.
    """
    return _text_classes("spamassassin", settings, 256, ("ham", "spam"))


def tinyshakespeare(settings: DataSettings) -> Task:
    """Returns the next character in Shakespeare's plays, from `input.txt`: first 90 % train, last 10 % validation.

    Windows of 256 characters unless set, without overlap; every character but a part's first is a target once.
    """
    length = settings.max_tokens or 256
    folder = folder_of("tinyshakespeare", settings.data)
    texts: dict[Part, str] = {}
    if folder is not None:
        text = read_characters(required(folder / "input.txt", "tinyshakespeare"))
        if (folder / "test.txt").is_file():
            texts["test"] = read_characters(folder / "test.txt")
    else:
        text = "".join("".join(split["text"]) for split in hub_splits("tinyshakespeare"))
    cut = len(text) * TRAIN_TENTHS // 10
    if min(cut, len(text) - cut) < 2:
        raise DataError(
            f"tinyshakespeare, {_origin(folder)}: {len(text)} characters are too few for two parts: give more"
        )
    texts["train"], texts["validation"] = text[:cut], text[cut:]
    vocabulary = "".join(sorted(set(texts["train"])))
    parts: dict[Part, Examples] = {}
    for name, own in texts.items():
        numbers = character_numbers(own, vocabulary, origin=f"tinyshakespeare, {name}")
        tokens, targets, valid = next_character_windows(numbers, length)
        parts[name] = Examples(inputs={"tokens": tokens, "valid": valid}, labels=targets)
    return Task(
        name="tinyshakespeare",
        parts=parts,
        kind="language",
        num_outputs=len(vocabulary),
        input=TextInput(
            vocabulary_size=len(vocabulary),
            max_tokens=length,
            tokenizer=CHARACTERS,
            pad_id=0,
        ),
        origin=_origin(folder),
    )


def user_text(settings: DataSettings) -> Task:
    """Returns your own labelled text: a CSV, JSONL or Parquet file given with `--data`.

    Word pieces, at most 128 unless set. Labels are whole numbers or strings; classes are sorted.
    """
    if settings.data is None:
        raise DataError("task `user_text` needs `--data FILE`: give a CSV, JSONL or Parquet file")
    own = UserData(
        path=settings.data,
        text_column=settings.text_column,
        label_column=settings.label_column,
        validation_path=settings.validation_data,
        validation_fraction=settings.validation_fraction,
        seed=settings.split_seed,
    )
    train, validation, classes = load_user_data(own)
    return _encoded(
        "user_text",
        {"train": train, "validation": validation},
        classes,
        tuple(str(label) for label in classes),
        settings,
        128,
        f"`{settings.data}`",
    )


TASKS: dict[str, Callable[[DataSettings], Task]] = {
    "digits": digits,
    "mnist": mnist,
    "sst2": sst2,
    "spamassassin": spamassassin,
    "tinyshakespeare": tinyshakespeare,
    "user_text": user_text,
}


def load_task(name: str, settings: DataSettings | None = None) -> Task:
    """Returns a task by name.

    Raises:
      UnknownNameError: If there is none of that name.
      DataError: If its data is absent or malformed.
    """
    if name not in TASKS:
        raise UnknownNameError(
            f"task `{name}` does not exist: choose one of {', '.join(sorted(TASKS))}"
        )
    return TASKS[name](settings or DataSettings())


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
    return Examples(inputs={"pixels": values.astype(np.int32)}, labels=classes.astype(np.int32))


def _parts_in(folder: Path, task: str, pattern: str) -> list[Part]:
    """Returns the parts whose files a folder holds; the first two must be there."""
    for name in ("train", "validation"):
        required(folder / pattern.format(name), task)
    has_test = (folder / pattern.format("test")).is_file()
    return ["train", "validation", "test"] if has_test else ["train", "validation"]


def _origin(folder: Path | None) -> str:
    return f"`{folder}`" if folder is not None else "the Hugging Face hub"


def _text_classes(name: str, settings: DataSettings, own: int, classes: tuple[str, ...]) -> Task:
    """Returns a task of labelled texts whose labels are the numbers of the classes."""
    folder = folder_of(name, settings.data)
    rows: dict[Part, LabelledTexts] = {}
    if folder is not None:
        for part in _parts_in(folder, name, "{}.jsonl.gz"):
            rows[part] = read_labelled(folder / f"{part}.jsonl.gz", "text", "label")
    else:
        train, validation = hub_splits(name)
        splits: dict[Part, Any] = {"train": train, "validation": validation}
        for part, split in splits.items():
            cells = zip(split["sentence"], split["label"], strict=True)
            numbered = ((f"row {index}", *cell) for index, cell in enumerate(cells, start=1))
            rows[part] = checked_rows(Path(f"{name}, {part}"), numbered, "sentence", "label")
    return _encoded(name, rows, range(len(classes)), classes, settings, own, _origin(folder))


def _encoded(
    name: str,
    rows: dict[Part, LabelledTexts],
    labels: Sequence[Label],
    classes: tuple[str, ...],
    settings: DataSettings,
    own: int,
    origin: str,
) -> Task:
    """Returns a task of labelled texts as word pieces, in rows of `own` tokens unless set."""
    length = settings.max_tokens or own
    pieces = load_word_pieces(settings.tokenizer or MINILM)
    parts: dict[Part, Examples] = {}
    for part, labelled in rows.items():
        numbers = labelled.class_numbers(labels)
        tokens, valid = pieces.encode(
            labelled.texts,
            max_tokens=length,
            truncate=settings.truncate,
            places=labelled.places,
            origin=f"`{labelled.path}`",
        )
        parts[part] = Examples(inputs={"tokens": tokens, "valid": valid}, labels=numbers)
    return Task(
        name=name,
        parts=parts,
        kind="classification",
        num_outputs=len(classes),
        input=TextInput(
            vocabulary_size=pieces.vocabulary_size,
            max_tokens=length,
            tokenizer=str(pieces.path),
            pad_id=pieces.pad_id,
        ),
        origin=origin,
        classes=classes,
    )
