"""Labelled text from a file: CSV, JSON lines (also gzipped) or Parquet, with named columns."""

import csv
import dataclasses
import functools
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign.errors import DataError
from codesign.experiments.text import decoded

Label = int | str
Row = tuple[str, Any, Any]
"""Where a row is ("line 3"), its text and its label, both unchecked."""
WHOLE_NUMBER = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")
FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]*[1-9][0-9]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserData:
    """Files of labelled text and how to read them."""

    # `.csv`, `.jsonl`, `.jsonl.gz` or `.parquet`.
    path: Path
    # Names of the columns.
    text_column: str = "text"
    label_column: str = "label"
    # A second file for the validation part; None: part of `path` is held out.
    validation_path: Path | None = None
    # Part of every class that is held out, (0, 1); and the seed that chooses it, >= 0.
    validation_fraction: float = 0.2
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """N rows of a file in its order: texts, labels (all whole numbers or all strings), and where each row is."""

    path: Path
    texts: tuple[str, ...]
    labels: tuple[Label, ...]
    places: tuple[str, ...]

    def take(self, indices: NDArray[np.int64]) -> "LabelledTexts":
        """Returns the rows of these indices."""
        return LabelledTexts(
            path=self.path,
            texts=tuple(self.texts[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            places=tuple(self.places[i] for i in indices),
        )

    def classes(self) -> tuple[Label, ...]:
        """Returns the different labels, sorted; as numbers if every one is, or spells, a whole number (1, 1.0)."""
        numbers = {_whole_number(label) for label in self.labels}
        if None not in numbers:
            return tuple(sorted(number for number in numbers if number is not None))
        return tuple(sorted({str(label) for label in self.labels}))

    def class_numbers(self, classes: Sequence[Label]) -> NDArray[np.int32]:
        """Returns the place of each label among `classes`, which are all numbers or all strings, `[N]`.

        Raises:
          DataError: If a label is not among them; names the row.
        """
        number = {label: index for index, label in enumerate(classes)}
        are_numbers = isinstance(classes[0], int)
        result = np.zeros(len(self.labels), np.int32)
        for row, label in enumerate(self.labels):
            key = _whole_number(label) if are_numbers else label
            if key is None or key not in number:
                raise DataError(
                    f"`{self.path}`, {self.places[row]}: label {label!r} is not one of {_some(classes)}: correct it"
                )
            result[row] = number[key]
        return result


def load_user_data(data: UserData) -> tuple[LabelledTexts, LabelledTexts, tuple[Label, ...]]:
    """Returns the training part, the validation part and the classes, sorted.

    Raises:
      DataError: If a file cannot be read or holds a bad row, if there is one class only, or a class is too small to split.
    """
    rows = read_labelled(data.path, data.text_column, data.label_column)
    classes = rows.classes()
    if len(classes) < 2:
        raise DataError(
            f"`{data.path}`: every label in column `{data.label_column}` is {classes[0]!r}: "
            "give rows of at least two classes"
        )
    if data.validation_path is None:
        train, validation = _held_out(rows, classes, data)
    else:
        train = rows
        validation = read_labelled(data.validation_path, data.text_column, data.label_column)
    return train, validation, classes


def read_labelled(path: Path, text_column: str, label_column: str) -> LabelledTexts:
    """Returns the rows of a file after checking every one.

    Raises:
      DataError: If the file or a row is not as it must be; one line with file, row and how to mend it.
    """
    if text_column == label_column:
        raise DataError(
            f"`{text_column}` is named as text and as label: give `--text-column` or `--label-column` another"
        )
    if not path.is_file():
        raise DataError(f"data `{path}` is not a file: give a CSV, JSONL or Parquet file")
    readers: dict[str, Callable[[Path, str, str], Iterable[Row]]] = {
        ".csv": _csv_rows,
        ".jsonl": _json_rows,
        ".jsonl.gz": _json_rows,
        ".parquet": _parquet_rows,
    }
    suffix = next((known for known in readers if path.name.lower().endswith(known)), None)
    if suffix is None:
        raise DataError(f"data `{path}` must end in one of {', '.join(readers)}: convert it")
    if path.stat().st_size == 0:
        raise DataError(f"`{path}` is empty: give a file with rows")
    return checked_rows(
        path, readers[suffix](path, text_column, label_column), text_column, label_column
    )


def checked_rows(
    path: Path, rows: Iterable[Row], text_column: str, label_column: str
) -> LabelledTexts:
    """Returns rows after checking every one.

    Raises:
      DataError: If there is none, or a text or a label is missing or malformed; names the row.
    """
    texts: list[str] = []
    labels: list[Label] = []
    places: list[str] = []
    for place, text, label in rows:
        where = f"`{path}`, {place}"
        texts.append(_checked_text(text, text_column, where))
        labels.append(_checked_label(label, label_column, where))
        places.append(place)
        if isinstance(labels[0], str) != isinstance(labels[-1], str):
            raise DataError(
                f"{where}: label {labels[-1]!r} after {labels[0]!r}: make all numbers or all text"
            )
    if not texts:
        raise DataError(f"`{path}` has no rows: give at least two, of two classes")
    return LabelledTexts(path=path, texts=tuple(texts), labels=tuple(labels), places=tuple(places))


def _csv_rows(path: Path, text_column: str, label_column: str) -> list[Row]:
    content = _content(path)
    # The default limit, 131,072 characters, is below a long e-mail; the setting is global, so it is put back.
    limit = csv.field_size_limit(max(len(content), csv.field_size_limit()))
    rows = []
    try:
        reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        header = reader.fieldnames or ()
        _require_columns(path, header, text_column, label_column)
        _refuse_repeated(f"`{path}`", header)
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row:
                raise DataError(
                    f"`{path}`, {place}: more cells than the header has columns: quote cells with commas"
                )
            rows.append((place, row[text_column], row[label_column]))
    except csv.Error as error:
        raise DataError(
            f"`{path}`, after line {reader.line_num}: {error}: mend the quotes"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _whole_number(label: Label) -> int | None:
    """Returns the number that a label is or spells; None if it spells none."""
    if isinstance(label, int):
        return label
    spelled = WHOLE_NUMBER.fullmatch(label)
    return int(spelled[1]) if spelled else None


def _json_rows(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    for number, line in enumerate(_content(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            hook = functools.partial(_object, f"`{path}`, {place}")
            row = json.loads(line, object_pairs_hook=hook)
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"`{path}`, {place} is not JSON ({error}): correct it") from error
        if not isinstance(row, dict):
            raise DataError(
                f'`{path}`, {place} is not an object: write {{"{text_column}": ..., "{label_column}": ...}}'
            )
        _require_columns(path, list(row), text_column, label_column, place)
        yield place, row[text_column], row[label_column]


def _parquet_rows(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"reading `{path}` needs pyarrow: `pip install 'codesign[parquet]'`, or convert it to CSV or JSONL"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_columns(path, file.schema_arrow.names, text_column, label_column)
            table = file.read(columns=[text_column, label_column])
            columns = [table.column(name).to_pylist() for name in (text_column, label_column)]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"`{path}` is not a readable Parquet file ({error}): write it again"
        ) from error
    for number, (text, label) in enumerate(zip(*columns, strict=True), start=1):
        yield f"row {number}", text, label


def _content(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"`{path}` cannot be read ({error}): write it again") from error
    return decoded(content, path)


def _object(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated(where, [name for name, _ in pairs])
    return dict(pairs)


def _refuse_repeated(where: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: column `{repeated[0]}` stands there twice: rename one")


def _require_columns(
    path: Path, present: Sequence[str], text_column: str, label_column: str, place: str = ""
) -> None:
    for option, name in (("text", text_column), ("label", label_column)):
        if name not in present:
            where = f"`{path}`, {place}" if place else f"`{path}`"
            raise DataError(
                f"{where} has no column `{name}` (it has {_some(present)}): name it with `--{option}-column`"
            )


def _checked_text(text: Any, column: str, where: str) -> str:
    if not isinstance(text, str):
        kind = "missing" if text is None else f"of type {type(text).__name__}, not text"
        raise DataError(f"{where}: `{column}` is {kind}: correct or remove the row")
    if not text.strip():
        raise DataError(f"{where}: `{column}` is empty: fill or remove the row")
    if "\0" in text:
        raise DataError(f"{where}: `{column}` holds a NUL character: correct or remove the row")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: `{column}` holds half a surrogate pair: correct or remove the row"
        ) from error
    return text


def _checked_label(label: Any, column: str, where: str) -> Label:
    if isinstance(label, str):
        label = label.strip()
    if label is None or label == "" or (isinstance(label, float) and math.isnan(label)):
        raise DataError(f"{where}: `{column}` is missing: fill it or remove the row")
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # Whole numbers beside missing ones are often written as 1.0.
    if not isinstance(label, int | str) or (isinstance(label, str) and FRACTION.fullmatch(label)):
        raise DataError(
            f"{where}: `{column}` is {label}, neither a whole number nor text: give the row a class"
        )
    return int(label) if isinstance(label, int) else label


def _held_out(
    rows: LabelledTexts, classes: Sequence[Label], data: UserData
) -> tuple[LabelledTexts, LabelledTexts]:
    """Returns the rows in two parts with the classes in equal shares, at least one row of each class in each part."""
    generator = np.random.default_rng(data.seed)
    numbers = rows.class_numbers(classes)
    held = np.zeros(len(numbers), np.bool_)
    for number, label in enumerate(classes):
        own = np.flatnonzero(numbers == number)
        if len(own) < 2:
            raise DataError(
                f"`{data.path}`, {rows.places[own[0]]}: class {label!r} has one row, too few to hold one out: "
                f"check that `{data.label_column}` holds the label, add rows, or give a validation file"
            )
        count = min(max(1, round(data.validation_fraction * len(own))), len(own) - 1)
        held[generator.permutation(own)[:count]] = True
    return rows.take(np.flatnonzero(~held)), rows.take(np.flatnonzero(held))


def _some(names: Sequence[Any], most: int = 10) -> str:
    """Returns the first names for a message."""
    shown = ", ".join(f"`{name}`" for name in list(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "none"
