"""The model of Gemmini's RTL against FPGA-accelerated simulation: held-out errors, and what each part is worth.

`python -m codesign.experiments.validation_rtl --path firesim_gemmini.csv.gz --out docs/validation_rtl.json
--document docs/validation_rtl.md` makes the study of that document; `codesign validate` takes `validation_rows`.

Data: mappings of DOSA (Hong et al., MICRO 2023, ucb-bar/dosa, BSD-2-Clause) on a 16 x 16 Gemmini in FireSim.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from codesign.experiments.calibrate_machine import (
    MAPPING_COLUMN,
    PERCENT,
    Columns,
    MachineModel,
    calibrate,
    gemmini_model,
    number_column,
    read_columns,
    scaled,
    text_column,
)
from codesign.experiments.reference_tables import ValidationRow
from codesign.hw.calibrate import (
    Errors,
    Factor,
    FitSettings,
    Floats,
    errors,
    nested_cross_validate,
)
from codesign.hw.gemmini_rtl import CACHE_BYTES, CALIBRATED, FACTORS, cycles

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

MEASURED, TIMELOOP = "target.gemmini_cycle", "target.cycle"
MEAN_LIMIT, RANK_LIMIT = 18.0, 0.02
"""Most that may be reached: held-out mean error in %, and 1 - Spearman's correlation."""
NUM_FOLDS = 10
ASSIGNMENTS = (0, 1, 2, 3, 4)
"""Seeds that deal the layer shapes to folds in the study."""
NESTED = ("the model", "maximum not smooth", "reads, then writes", "nothing overlaps")
"""Variants among which nested cross-validation chooses."""
NUM_WORST = 10
BUFFER_COLUMNS = ("arch.mem1_entries", "arch.mem2_entries")


def validation_rows(path: Path, *, settings: FitSettings | None = None) -> list[ValidationRow]:
    """Returns how far the cycles are from the RTL's: with the shipped factors, and with ones fitted to other layer shapes.

    Raises:
      DataError: If the file cannot be read or lacks a column.
    """
    columns = read_columns(path)
    model, measured = gemmini_model(columns), number_column(columns, MEASURED)
    timeloop = number_column(columns, TIMELOOP)
    shipped = {name: jnp.asarray(value) for name, value in CALIBRATED.items()}
    found = {
        "shipped factors": errors(np.asarray(model.predict(shipped, model.data)), measured),
        "Timeloop": errors(timeloop, measured),
    }
    num_folds = min(NUM_FOLDS, len(set(model.groups)))
    if num_folds > 1:
        apart = f"{num_folds} folds of layer shapes"
        one, other = (
            calibrate(one, measured, num_folds=num_folds, settings=settings).held_out[0]
            for one in (model, scaled(timeloop, model.groups))
        )
        found |= {f"held out, {apart}": one, f"Timeloop times a constant, held out, {apart}": other}
    return [
        ValidationRow(
            reference="Gemmini's RTL (FireSim)",
            metric=f"cycles, {what}: {name}",
            value=value,
            unit=unit,
            limit=None if name.startswith("Timeloop") else limit,
            rows=len(measured),
        )
        for name, one in found.items()
        for what, value, unit, limit in (
            ("mean error", PERCENT * one.mean, "%", MEAN_LIMIT),
            ("1 - Spearman", 1.0 - one.spearman, "1", RANK_LIMIT),
        )
    ]


def variants(columns: Columns) -> dict[str, MachineModel]:
    """Returns the model, with other modelling choices, with a factor too few, and with one more."""
    plain = gemmini_model(columns)

    def variant(factors: Sequence[Factor] = FACTORS, **choices: Any) -> MachineModel:
        def predict(values: dict[str, jax.Array], counts: Any) -> jax.Array:
            own = {factor.name: values.get(factor.name, 0.0) for factor in FACTORS}
            fitted = {name: value for name, value in values.items() if name not in own}
            return cycles(own, counts, **(choices | fitted)).total

        return dataclasses.replace(plain, factors=tuple(factors), predict=predict)

    cache = Factor(name="cache_bytes", unit="byte", start=CACHE_BYTES, meaning="capacity")
    found = {
        "the model": plain,
        "maximum not smooth": variant(smoothness=None),
        "reads, then writes": variant(overlap="memory_in_series"),
        "nothing overlaps": variant(overlap="none"),
        "cache of 256 KiB": variant(cache_bytes=CACHE_BYTES / 2),
        "cache of 1 MiB": variant(cache_bytes=CACHE_BYTES * 2),
        "cache of 4 MiB": variant(cache_bytes=CACHE_BYTES * 8),
        "capacity fitted too": variant((*FACTORS, cache)),
    }
    for left_out in FACTORS:
        rest = [factor for factor in FACTORS if factor is not left_out]
        found[f"without `{left_out.name}`"] = variant(rest)
    return found


def repeats(columns: Columns, measured: Floats) -> dict[str, float]:
    """Returns how much runs of one mapping differ, from their mean: this no model of the mapping predicts.

    Returns:
      Number of rows whose mapping was run more than once, mean and largest deviation as fractions.
    """
    _, inverse, number = np.unique(
        text_column(columns, MAPPING_COLUMN), return_inverse=True, return_counts=True
    )
    mean = np.bincount(inverse, measured) / number
    again = number[inverse] > 1
    deviation = np.abs(measured / mean[inverse] - 1.0)[again]
    return {
        "rows": int(again.sum()),
        "mean": float(deviation.mean()),
        "largest": float(deviation.max()),
    }


def networks(columns: Columns, layers: Sequence[str]) -> tuple[str, ...]:
    """Returns a name for the networks of each row: layers that ran with the same buffers belong together, `[N]`."""
    buffers = zip(*(text_column(columns, name) for name in BUFFER_COLUMNS), strict=True)
    kinds = [
        np.unique(names, return_inverse=True)[1] for names in (layers, list(map(str, buffers)))
    ]
    label, before = np.arange(len(layers)), np.full(len(layers), -1)
    while np.any(label != before):
        before = label
        for kind in kinds:
            least = np.full(len(layers), len(layers))
            np.minimum.at(least, kind, label)
            label = least[kind]
    return tuple(map(str, label))


def study(path: Path, *, settings: FitSettings | None = None) -> dict[str, Any]:
    """Returns all figures of docs/validation_rtl.md."""
    columns = read_columns(path)
    measured, timeloop = (number_column(columns, name) for name in (MEASURED, TIMELOOP))
    models = variants(columns)
    plain = models["the model"]
    tested: dict[str, dict[str, Any]] = {
        "Timeloop": {"factors": 0, "fitted": asdict(errors(timeloop, measured)), "held_out": []}
    }
    found = {}
    for name, model in (
        {"Timeloop times a constant": scaled(timeloop, plain.groups)} | models
    ).items():
        found[name] = calibrate(
            model, measured, num_folds=NUM_FOLDS, assignments=ASSIGNMENTS, settings=settings
        )
        tested[name] = {
            "factors": len(model.factors),
            "fitted": asdict(found[name].fitted),
            "held_out": [asdict(one) for one in found[name].held_out],
        }
    predicted, chosen = nested_cross_validate(
        {name: models[name].predict for name in NESTED},
        plain.factors,
        plain.data,
        measured,
        plain.groups,
        num_folds=NUM_FOLDS,
        settings=settings,
    )
    own = found["the model"]
    apart = dataclasses.replace(plain, groups=networks(columns, plain.groups))
    num_networks = len(set(apart.groups))
    by_network = calibrate(apart, measured, num_folds=num_networks, settings=settings).held_out[0]
    return {
        "rows": own.rows,
        "groups": own.groups,
        "folds": NUM_FOLDS,
        "variants": tested,
        "factors": [asdict(factor) for factor in own.factors],
        "capacity": asdict(found["capacity fitted too"].factors[-1]),
        "nested": asdict(errors(predicted, measured)) | {"chosen": list(chosen)},
        "by_network": asdict(by_network) | {"networks": num_networks},
        "repeats": repeats(columns, measured),
        "worst": _worst(columns, own.predicted, measured),
    }


def _worst(columns: Columns, predicted: Floats, measured: Floats) -> list[dict[str, Any]]:
    ratio = predicted / measured
    order = np.argsort(-np.abs(np.log(ratio)))[:NUM_WORST]
    mappings = text_column(columns, MAPPING_COLUMN)
    sizes = [text_column(columns, f"prob.{name}") for name in "RPQCK"]
    strides = text_column(columns, "prob.Wstride")
    return [
        {
            "layer": "x".join(size[row] for size in sizes) + f", stride {strides[row]}",
            "mapping": mappings[row],
            "measured": measured[row],
            "ratio": float(ratio[row]),
        }
        for row in order
    ]


def error_table(record: dict[str, Any]) -> Table:
    """Returns heading and rows of the errors by variant; held-out figures are means over the assignments."""

    def row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
        own: Sequence[Errors] = [Errors(**part) for part in one["held_out"]]
        fitted = Errors(**one["fitted"])
        if not own:
            return name, "0", f"{PERCENT * fitted.mean:.1f}", "-", "-", f"{fitted.spearman:.4f}"
        means = [PERCENT * part.mean for part in own]
        return (
            name,
            str(one["factors"]),
            f"{PERCENT * fitted.mean:.1f}",
            f"{np.mean(means):.1f} ({min(means):.1f} to {max(means):.1f})",
            f"{PERCENT * np.mean([part.median for part in own]):.1f}",
            f"{min(part.spearman for part in own):.4f}",
        )

    rows = [row(name, one) for name, one in record["variants"].items()]
    for name, key in (
        ("chosen by nested cross-validation", "nested"),
        ("the model, whole networks left out", "by_network"),
    ):
        one = record[key]
        mean, median = (f"{PERCENT * one[part]:.1f}" for part in ("mean", "median"))
        number = str(len(record["factors"]))
        rows.append((name, number, "-", mean, median, f"{one['spearman']:.4f}"))
    heading = (
        "variant",
        "fitted factors",
        "fitted to all, %",
        "held out, %",
        "median, %",
        "Spearman",
    )
    return heading, rows


def factor_table(record: dict[str, Any]) -> Table:
    """Returns heading and rows of the factors, with their range over all folds of all assignments."""
    rows: list[tuple[str, ...]] = [
        (
            f"`{factor['name']}`",
            f"{factor['value']:.3g}",
            f"{factor['low']:.3g} to {factor['high']:.3g}",
            factor["unit"],
            factor["meaning"],
        )
        for factor in record["factors"]
    ]
    return ("factor", "value", "over folds", "unit", "cycles ..."), rows


def worst_table(record: dict[str, Any]) -> Table:
    """Returns heading and rows of the largest held-out errors of the first assignment."""
    rows: list[tuple[str, ...]] = [
        (one["layer"], f"`{one['mapping']}`", f"{one['measured']:,.0f}", f"{one['ratio']:.2f}")
        for one in record["worst"]
    ]
    return ("layer R x P x Q x C x K", "mapping", "measured", "predicted / measured"), rows


TABLES = {"errors": error_table, "factors": factor_table, "worst": worst_table}
MARKED = re.compile(rf"(<!-- ({'|'.join(TABLES)}) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text: str, record: dict[str, Any]) -> str:
    """Returns a document with the tables of the study between `<!-- NAME -->` and `<!-- end -->`."""

    def filled(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        heading, rows = TABLES[name](record)
        lines = [heading, ["---"] * len(heading), *rows]
        return begin + "".join(f"| {' | '.join(line)} |\n" for line in lines) + end

    return MARKED.sub(filled, text)


def write_study(path: Path, out: Path, document: Path | None = None) -> None:
    """Writes the study, and its tables into a document.

    Args:
      path: The CSV file of mappings and measured cycles.
      out: JSON file to write.
      document: Markdown file whose tables are replaced.
    """
    record = study(path)
    out.write_text(json.dumps(record, indent=1) + "\n")
    if document is not None:
        document.write_text(updated(document.read_text(), record))


if __name__ == "__main__":
    tyro.cli(write_study)
