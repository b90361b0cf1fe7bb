"""Reference results read from CSV files, and what a comparison with them yields; no JAX."""

import csv
import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign.errors import DataError

Floats = NDArray[np.float64]
PERCENT = 100.0


@dataclass(frozen=True, kw_only=True)
class ValidationRow:
    """How far we are from a reference in one respect.

    Attributes:
      reference: What was compared with.
      metric: In which respect; larger is worse wherever there is a limit.
      value: The figure.
      unit: Its unit.
      limit: The largest acceptable value; None: reported only.
      rows: Reference rows behind it, at least 1.
    """

    reference: str
    metric: str
    value: float
    unit: str
    limit: float | None
    rows: int

    @property
    def is_met(self) -> bool:
        """Whether the value is within its limit, if it has one."""
        return self.limit is None or self.value <= self.limit


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of a CSV file whose columns have been checked, as text, with the line of each."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator["Table"]:
        """Yields every row as a table of its own."""
        for index in range(len(self)):
            yield self.take(np.arange(len(self)) == index)

    def require(self, *columns: str) -> None:
        """Does nothing if all columns are there.

        Raises:
          DataError: If one is not; names it.
        """
        missing = [f"`{column}`" for column in columns if column not in self.columns]
        if missing:
            raise DataError(
                f"'{self.path}' lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: "
                "give the file its published columns"
            )

    def texts(self, column: str) -> tuple[str, ...]:
        """Returns a column, without blanks round the cells."""
        return tuple(row[column].strip() for row in self.rows)

    def take(self, keep: NDArray[np.bool_]) -> "Table":
        """Returns the rows that are marked, `[N]`."""
        chosen = np.flatnonzero(keep)
        return dataclasses.replace(
            self,
            rows=tuple(self.rows[index] for index in chosen),
            lines=tuple(self.lines[index] for index in chosen),
        )

    def where(self, column: str, value: str) -> "Table":
        """Returns the rows whose cell is `value`."""
        return self.take(np.array([text == value for text in self.texts(column)], bool))

    def floats(self, column: str, *, may_be_empty: bool = False) -> Floats:
        """Returns a column of finite numbers; if cells may be empty, NaN for those.

        Raises:
          DataError: If a cell is something else; names line and column.
        """
        found = np.full(len(self), np.nan)
        for index, text in enumerate(self.texts(column)):
            if may_be_empty and not text:
                continue
            try:
                found[index] = float(text)
            except ValueError:
                raise self.fault(index, column, "a number") from None
            if not np.isfinite(found[index]):
                raise self.fault(index, column, "a finite number")
        return found

    def sizes(self, column: str) -> NDArray[np.int_]:
        """Returns a column of whole numbers from 1 on.

        Raises:
          DataError: If a cell is something else; names line and column.
        """
        numbers = self.floats(column)
        whole = (numbers >= 1) & (numbers == np.floor(numbers))
        if not np.all(whole):
            raise self.fault(int(np.argmin(whole)), column, "a whole number from 1 on")
        return numbers.astype(int)

    def number(self, column: str) -> float:
        """Returns a number of the only row; raises as `floats`."""
        (value,) = self.floats(column)
        return float(value)

    def size(self, column: str) -> int:
        """Returns a whole number from 1 on of the only row; raises as `sizes`."""
        (value,) = self.sizes(column)
        return int(value)

    def decimals(self, column: str) -> int:
        """Returns the most decimals that a cell shows."""
        return max(len(text.partition(".")[2]) for text in self.texts(column))

    def fault(self, index: int, column: str, wanted: str) -> DataError:
        """Returns the error of a cell that is not what is wanted."""
        got = self.rows[index][column]
        return DataError(
            f"'{self.path}', line {self.lines[index]}: column `{column}` must be {wanted}, got {got!r}: correct the file"
        )


def read_text(path: Path) -> str:
    """Returns the text of a file, unpacked if its name ends in `.gz`.

    Raises:
      DataError: If it cannot be read.
    """
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            f"'{path}' cannot be read ({error}): replace it by the published file"
        ) from error


def read_table(path: Path, columns: Sequence[str] = ()) -> Table:
    """Returns the rows of a CSV file, gzipped or not.

    Args:
      path: The file.
      columns: Columns that must be there; others may be.

    Raises:
      DataError: If it cannot be read, lacks a column or has no rows.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    rows, lines = [], []
    try:
        for row in reader:
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"'{path}' is not a CSV file ({error}): replace it") from error
    table = Table(
        path=path, columns=tuple(reader.fieldnames or ()), rows=tuple(rows), lines=tuple(lines)
    )
    table.require(*columns)
    if not rows:
        raise DataError(f"'{path}' has no rows: give at least one")
    for row, line in zip(rows, lines, strict=True):
        # Cells too many stand under None, cells too few are None.
        if None in row or None in row.values():
            raise DataError(f"'{path}', line {line}: as many cells as columns are needed: mend it")
    return table


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file, gzipped or not.

    Raises:
      DataError: If it cannot be read.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise DataError(
            f"'{path}' is not JSON ({error}): replace it by the published file"
        ) from error


def largest_relative(found: Floats, wanted: Floats, printed: float = 0.0) -> float:
    """Returns the largest difference over the wanted value, beyond what rounding in print explains.

    Args:
      found: Ours, any shape.
      wanted: The reference, same shape.
      printed: Half a unit of the last decimal that the reference shows.
    """
    excess = np.maximum(np.abs(found - wanted) - printed, 0.0)
    scale = np.where(wanted == 0, 1.0, np.abs(wanted))
    return float(np.max(excess / scale))
