"""Dense products: our model with another tool's switches against that tool's answers."""

from pathlib import Path

import numpy as np

from codesign.experiments.reference_tables import (
    PERCENT,
    Table,
    ValidationRow,
    largest_relative,
    read_table,
)
from codesign.hw.tool_models import TOOLS, gemm_cost
from codesign.hw.tool_switches import Dataflow

DATAFLOWS: dict[str, Dataflow] = {
    "ws": "weight_stationary",
    "os": "output_stationary",
    "is": "input_stationary",
}
COLUMN_NAMES = {"scale_sim": "scalesim", "zigzag": "zigzag", "accelforge": "accelforge"}
LIMITS_PERCENT = {"zigzag": 10.0, "accelforge": 2.0}
OPTIONAL = ("scalesim_is",)
"""Dataflows of a tool that a file may leave out."""


def dense_gemm_tools(path: Path) -> list[ValidationRow]:
    """Compares cycles and energy of every product with each tool's, dataflow by dataflow.

    A cell may be empty where a tool was not run.
    """
    table = read_table(path, ("M", "N", "K", "array"))
    found = []
    for tool, name in COLUMN_NAMES.items():
        for letters, dataflow in DATAFLOWS.items():
            prefix = f"{name}_{letters}"
            is_left_out = prefix in OPTIONAL and f"{prefix}_cycles" not in table.columns
            if dataflow in TOOLS[tool].dataflows and not is_left_out:
                compare = _simulated if tool == "scale_sim" else _priced
                found += compare(table, tool, letters)
    return found


def _simulated(table: Table, tool: str, letters: str) -> list[ValidationRow]:
    """Compares cycles to the cycle: simulated ones, and those of the closed form."""
    prefix = f"scalesim_{letters}"
    table.require(f"{prefix}_cycles", f"{prefix}_source")
    sources = np.array(table.texts(f"{prefix}_source"))
    rows = []
    for source, kind in (("sim", "simulated"), ("closed_form", "closed form")):
        part = _measured(table.take(sources == source), f"{prefix}_cycles")
        if not len(part):
            continue
        cycles, _ = _ours(part, tool, letters)
        rows.append(
            ValidationRow(
                reference=f"{TOOLS[tool].name}, {_words(letters)}, {kind}",
                metric="cycles, largest difference",
                value=float(np.max(np.abs(cycles - part.floats(f"{prefix}_cycles")))),
                unit="cycle",
                limit=0.0,
                rows=len(part),
            )
        )
    return rows


def _priced(table: Table, tool: str, letters: str) -> list[ValidationRow]:
    """Compares cycles and energy, in percent."""
    prefix = f"{COLUMN_NAMES[tool]}_{letters}"
    columns = (f"{prefix}_cycles", f"{prefix}_energy_pJ")
    table.require(*columns)
    part = _measured(table, *columns)
    if not len(part):
        return []
    ours = _ours(part, tool, letters)
    return [
        ValidationRow(
            reference=f"{TOOLS[tool].name}, {_words(letters)}",
            metric=f"{what}, largest error",
            value=PERCENT * largest_relative(own, part.floats(column)),
            unit="%",
            limit=LIMITS_PERCENT[tool],
            rows=len(part),
        )
        for what, column, own in zip(("cycles", "energy"), columns, ours, strict=True)
    ]


def _measured(table: Table, *columns: str) -> Table:
    """Returns the rows whose cells in all these columns are filled."""
    filled = np.ones(len(table), bool)
    for column in columns:
        filled &= np.isfinite(table.floats(column, may_be_empty=True))
    return table.take(filled)


def _ours(table: Table, tool: str, letters: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns our cycles and energies, pJ, `[R]`; energies of NaN where the tool states none."""
    sides = []
    for index, text in enumerate(table.texts("array")):
        rows, _, cols = text.partition("x")
        if rows != cols or not rows.isdigit() or int(rows) < 1:
            raise table.fault(index, "array", "a square such as 16x16")
        sides.append(int(rows))
    sizes = np.stack([table.sizes(name) for name in "MNK"], axis=1)
    cost = gemm_cost(TOOLS[tool], sizes, np.array(sides), DATAFLOWS[letters])
    energy = np.full(len(table), np.nan) if cost.energy_pj is None else cost.energy_pj
    return cost.cycles, energy


def _words(letters: str) -> str:
    return DATAFLOWS[letters].replace("_", " ")
