"""Calibrates a machine model to measurements in a CSV file: fitted factors, and the error on groups left out of the fit.

Models: `gemmini-rtl` takes mappings (Timeloop's text) and strides; `sum` is a factor times each of some columns
(energy from counts of accesses), `max` the largest of them (cycles from counts and throughputs).
"""

import csv
import gzip
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign import gates
from codesign.errors import CodesignError, DataError, UnknownNameError
from codesign.experiments.tables import print_json, print_table
from codesign.hw.calibrate import (
    CrossValidation,
    Errors,
    Factor,
    FitSettings,
    Floats,
    Predict,
    cross_validate,
    errors,
)
from codesign.hw.gemmini_counts import count_commands
from codesign.hw.gemmini_mapping import parse_mappings
from codesign.hw.gemmini_rtl import FACTORS, SMOOTHNESS, cycles

Columns = dict[str, list[str]]

MACHINES = ("gemmini-rtl", "sum", "max")
MAPPING_COLUMN, STRIDE_COLUMN = "mapping.mapping", "prob.Wstride"
"""Columns that `gemmini-rtl` reads, as DOSA's data sets name them."""
PERCENT = 100.0


@dataclass(frozen=True, kw_only=True)
class MachineModel:
    """A model to calibrate, with what it reads of each row, and the group of each row."""

    name: str
    factors: tuple[Factor, ...]
    predict: Predict = field(repr=False)
    data: Any = field(repr=False)
    groups: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class FittedFactor:
    """A factor fitted to all rows, and the range of the fits that left a fold out."""

    name: str
    unit: str
    meaning: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a calibration found.

    Attributes:
      rows: Rows of the file.
      groups: Groups that are held out as a whole.
      num_folds: Folds of each cross-validation.
      factors: Fitted factors.
      fitted: Errors on the rows that all factors were fitted to.
      held_out: Errors on rows whose group the fit has not seen, one for each assignment of groups to folds.
      predicted: Held-out predictions of the first assignment, `[N]`.
    """

    rows: int
    groups: int
    num_folds: int
    factors: tuple[FittedFactor, ...]
    fitted: Errors
    held_out: tuple[Errors, ...]
    predicted: Floats = field(repr=False)


def read_columns(path: Path) -> Columns:
    """Returns the columns of a CSV file, gzipped or not, as text.

    Raises:
      DataError: If the file cannot be read, has no rows, or rows of unequal length.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        table = list(csv.reader(io.StringIO(content.decode("utf-8"), newline="")))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"`{path}`: {error}: give a CSV file in UTF-8, gzipped or not") from error
    if len(table) < 2:
        raise DataError(f"`{path}` has no rows: give a heading and at least one row")
    heading, *rows = table
    for number, row in enumerate(rows, start=2):
        if len(row) != len(heading):
            raise DataError(
                f"`{path}`, line {number}: {len(row)} values under {len(heading)} headings: correct the line"
            )
    return dict(zip(heading, map(list, zip(*rows, strict=True)), strict=True))


def text_column(columns: Columns, name: str) -> list[str]:
    """Returns a column.

    Raises:
      DataError: If there is none of this name.
    """
    if name not in columns:
        raise DataError(f"no column `{name}`: choose from {', '.join(columns)}")
    return columns[name]


def number_column(columns: Columns, name: str) -> Floats:
    """Returns a column of positive finite numbers, `[N]`.

    Raises:
      DataError: If there is no such column, or a value is not a positive finite number.
    """
    text = text_column(columns, name)
    try:
        values = np.array(text, np.float64)
    except ValueError as error:
        raise DataError(f"column `{name}`: {error}: give numbers, or leave the row out") from error
    wrong = ~(np.isfinite(values) & (values > 0.0))
    if np.any(wrong):
        row = int(np.argmax(wrong))
        raise DataError(
            f"column `{name}`, row {row + 1}: {text[row]!r} is not a positive finite number: leave the row out"
        )
    return values


def gemmini_model(columns: Columns, *, predict: Predict | None = None) -> MachineModel:
    """Returns the model of Gemmini's RTL; rows of one layer shape are a group.

    Args:
      columns: Columns with mappings and strides.
      predict: Another function of factors and counts; None: `codesign.hw.gemmini_rtl.cycles`.
    """
    nests = parse_mappings(text_column(columns, MAPPING_COLUMN))
    stride = number_column(columns, STRIDE_COLUMN).astype(np.int64)
    return MachineModel(
        name="gemmini-rtl",
        factors=FACTORS,
        predict=predict or (lambda factors, counts: cycles(factors, counts).total),
        data=count_commands(nests, stride),
        groups=tuple(map(str, np.column_stack([nests.sizes, stride]).tolist())),
    )


def column_model(
    columns: Columns, rule: str, counts: Sequence[str], groups: Sequence[str], measured: str
) -> MachineModel:
    """Returns a model with one factor for each column of counts.

    Args:
      columns: All columns.
      rule: `sum`, or `max`: a smooth maximum.
      counts: Columns of positive numbers.
      groups: Columns whose values together name a row's group.
      measured: The column that is modelled; starts are of its size.
    """
    if not counts or not groups:
        raise CodesignError(
            f"machine `{rule}` needs columns of counts and columns of groups: name at least one of each"
        )
    table = np.stack([number_column(columns, name) for name in counts], axis=-1)
    share = np.median(number_column(columns, measured)) / len(counts) / np.median(table, axis=0)

    def predict(factors: dict[str, jax.Array], table: jax.Array) -> jax.Array:
        terms = table * jnp.stack([factors[name] for name in counts])[None]
        return jnp.sum(terms, axis=-1) if rule == "sum" else gates.smooth_max(terms, SMOOTHNESS)

    return MachineModel(
        name=rule,
        factors=tuple(
            Factor(name=name, unit=f"{measured} per {name}", start=start, meaning="fitted")
            for name, start in zip(counts, share, strict=True)
        ),
        predict=predict,
        data=jnp.asarray(table, jnp.float32),
        groups=tuple(map(str, zip(*(text_column(columns, name) for name in groups), strict=True))),
    )


def machine_model(
    columns: Columns,
    machine: str,
    *,
    measured: str,
    counts: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> MachineModel:
    """Returns the model of a name of `MACHINES`; see `gemmini_model` and `column_model`."""
    match machine:
        case "gemmini-rtl":
            return gemmini_model(columns)
        case "sum" | "max":
            return column_model(columns, machine, counts, groups, measured)
        case _:
            raise UnknownNameError(f"unknown machine `{machine}`: use one of {', '.join(MACHINES)}")


def calibrate(
    model: MachineModel,
    measured: Floats,
    *,
    num_folds: int = 10,
    assignments: Sequence[int] = (0,),
    settings: FitSettings | None = None,
) -> Calibration:
    """Returns the calibration of a model to measurements `[N]`, > 0, in the model's unit."""
    found = cross_validate(
        model.predict,
        model.factors,
        model.data,
        measured,
        model.groups,
        num_folds=num_folds,
        assignments=assignments,
        settings=settings,
    )
    return Calibration(
        rows=len(measured),
        groups=len(set(model.groups)),
        num_folds=num_folds,
        factors=fitted_factors(model.factors, found),
        fitted=errors(found.fitted, measured),
        held_out=tuple(errors(predicted, measured) for predicted in found.predicted),
        predicted=found.predicted[0],
    )


def fitted_factors(factors: Sequence[Factor], found: CrossValidation) -> tuple[FittedFactor, ...]:
    """Returns each factor with its range over the folds."""
    return tuple(
        FittedFactor(
            name=factor.name,
            unit=factor.unit,
            meaning=factor.meaning,
            value=found.whole[factor.name],
            low=float(found.factors[factor.name].min()),
            high=float(found.factors[factor.name].max()),
        )
        for factor in factors
    )


def scaled(values: Floats, groups: Sequence[str]) -> MachineModel:
    """Returns another tool's predictions `[N]` times one fitted factor."""
    factor = Factor(name="scale", unit="1", start=1.0, meaning="of another tool's predictions")
    return MachineModel(
        name="scaled",
        factors=(factor,),
        predict=lambda factors, values: factors["scale"] * values,
        data=jnp.asarray(values, jnp.float32),
        groups=tuple(groups),
    )


def calibrate_command(
    path: Path,
    *,
    machine: str,
    measured: str,
    counts: Sequence[str] = (),
    groups: Sequence[str] = (),
    num_folds: int = 10,
    assignments: Sequence[int] = (0,),
    as_json: bool = False,
    settings: FitSettings | None = None,
) -> int:
    """Calibrates a machine to a CSV file and prints its factors and errors.

    Args:
      path: CSV file, gzipped or not.
      machine: A name of `MACHINES`.
      measured: Column of the measurements: cycles, energy, anything positive.
      counts: Columns that `sum` and `max` multiply with their factors.
      groups: Columns that name a row's group, for `sum` and `max`.
      num_folds: Folds; whole groups are left out.
      assignments: Seeds, each of which deals the groups to folds anew.
      as_json: Whether to print JSON instead of tables.
      settings: How fits descend.
    """
    columns = read_columns(path)
    model = machine_model(columns, machine, measured=measured, counts=counts, groups=groups)
    found = calibrate(
        model,
        number_column(columns, measured),
        num_folds=num_folds,
        assignments=assignments,
        settings=settings,
    )
    if as_json:
        print_json(asdict(found) | {"predicted": found.predicted.tolist()})
        return 0
    print_table(
        f"Factors of {machine}, {found.rows} rows",
        ("factor", "unit", "value", "least fold", "largest fold"),
        [
            (
                factor.name,
                factor.unit,
                *(f"{x:.4g}" for x in (factor.value, factor.low, factor.high)),
            )
            for factor in found.factors
        ],
        text_columns=2,
    )
    print_table(
        f"Errors, {found.num_folds} folds of {found.groups} groups",
        ("rows", "mean, %", "median, %", "largest, %", "Spearman"),
        [
            ("fitted to all", *error_cells(found.fitted)),
            *(("held out", *error_cells(one)) for one in found.held_out),
        ],
    )
    return 0


def error_cells(found: Errors) -> tuple[str, str, str, str]:
    """Returns mean, median and largest error in %, and Spearman's correlation, as text."""
    parts = (found.mean, found.median, found.largest)
    mean, median, largest = (f"{PERCENT * part:.1f}" for part in parts)
    return mean, median, largest, f"{found.spearman:.4f}"
