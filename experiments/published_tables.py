"""Tables of the study of published figures: titles, columns and cells, for the terminal and for the documents."""

from collections.abc import Mapping, Sequence
from typing import Any

from codesign.experiments.prediction_tables import PERCENT, StudyTable
from codesign.experiments.published_rows import ROWS, Row

NONE = "-"
SUFFIX = {"percent": " %", "times": " times", "ms": " ms", "gops": " GOPS"}
"""What follows a figure, by form."""


def published_tables(record: dict[str, Any]) -> dict[str, StudyTable]:
    """Returns the tables of a record of `codesign reproduce published-figures`, by name."""
    return {"published_figures": _figures(record), "published_scaling": _scaling(record)}


def _number(value: float, form: str, quality_name: str) -> str:
    """Returns a figure without what follows it."""
    if form == "loss":
        return f"{PERCENT * value:.1f}" if quality_name == "accuracy" else f"{value + 0.0:.3f}"
    if form == "percent":
        return f"{PERCENT * value:.1f}"
    if form == "gops":
        return f"{value:.0f}"
    return f"{value:.3f}" if form == "ms" else f"{value:.2f}"


def _suffix(form: str, quality_name: str) -> str:
    """Returns the unit, with a space before it."""
    if form == "loss":
        return " points" if quality_name == "accuracy" else " bit"
    return SUFFIX[form]


def _published(row: Row) -> str:
    """Returns the published figure or range, with the loss beside it, workload and source."""
    if not row.published:
        return "not published"
    numbers = " to ".join(_number(one, row.form, "accuracy") for one in row.published)
    text = f"{numbers}{_suffix(row.form, 'accuracy')}"
    if row.published_loss is not None:
        text += f", loss {_number(row.published_loss, 'loss', 'accuracy')} points"
    return f"{text}: {row.workload} ({row.source})"


def _cell(figure: Mapping[str, Any] | None, form: str, quality_name: str) -> str:
    """Returns a mean with its deviation over heads, or its interval over examples where heads are not told apart."""
    if figure is None:
        return NONE
    mean = _number(figure["mean"], form, quality_name)
    spread = ""
    if figure.get("deviation") is not None:
        spread = f" ± {_number(figure['deviation'], form, quality_name)}"
    elif figure.get("low") is not None:
        low, high = (_number(figure[name], form, quality_name) for name in ("low", "high"))
        spread = f" [{low}, {high}]"
    return f"{mean}{spread}{_suffix(form, quality_name)}"


def _task_cell(task: Mapping[str, Any], name: str, form: str) -> str:
    """Returns a task's figure, with the loss of the setting where something is saved."""
    figures, quality_name = task["figures"], task["quality_name"]
    text = _cell(figures.get(name), form, quality_name)
    place, _, kind = name.rpartition(".")
    if kind == "saved" and text != NONE:
        text += f", loss {_cell(figures[f'{place}.loss'], 'loss', quality_name)}"
    return text


def _figures(record: dict[str, Any]) -> StudyTable:
    tasks = record["tasks"]
    rows = []
    for row in ROWS:
        worked_out = record["arithmetic"].get(row.figure)
        cells = [NONE if worked_out is None else _cell({"mean": worked_out}, row.form, "accuracy")]
        cells += [_task_cell(task, row.figure, row.form) for task in tasks]
        if any(cell != NONE for cell in cells):
            rows.append((f"{row.mechanism}: {row.quantity}", _published(row), *cells, row.why))
    sizes = [
        f"{task['task']} ({task['num_examples']} examples, {_seeds(task['seeds'])})"
        for task in tasks
    ]
    return StudyTable(
        title="Published figures and ours; ± over heads, [] of 95 % over examples",
        columns=("figure", "published", "arithmetic", *sizes, "why they differ"),
        rows=rows,
        text_columns=len(tasks) + 4,
    )


def _seeds(seeds: Sequence[int]) -> str:
    """Returns the number of seeds."""
    return f"{len(seeds)} seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _scaling(record: dict[str, Any]) -> StudyTable:
    columns = ("core_gops_per_watt", "device_gops_per_watt", "gops_per_mm2", "latency_ms")
    rows = []
    for system in record["scaling"]:
        cells = [f"{system['node_nm']:g}", f"{system['effective_gops']:g}"]
        for name in columns:
            printed, derived = system[name], system["derived"][name]
            cells.append(NONE if printed is None else f"{derived:.1f} ({printed:g})")
        rows.append((system["name"], *cells))
    return StudyTable(
        title="Efficiencies scaled to 28 nm and 1 V, derived (printed: SOFA, arXiv 2407.10416, Table II)",
        columns=(
            *("machine", "nm", "GOPS", "core, GOPS/W", "device, GOPS/W", "GOPS/mm2"),
            "latency, ms",
        ),
        rows=rows,
    )
