"""Tables of the study of predictions: titles, columns and cells, for the terminal and for the documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PERCENT = 100.0
CODES = {"hybrid_log": "hybrid log", "leading_one": "leading one"}
PAIRS = {"adjacent": "neighbours", "window": "windows"}
PREDICTIONS = {
    "one_leading_one": "one leading one",
    "two_leading_ones": "two",
    "one_hybrid_log": "one hybrid log",
    "two_hybrid_logs": "two",
    "chain": "SOFA's chain",
}
ERRORS = {
    "exact": "exact",
    "dealt": "exact, dealt out in turn",
    "random": "random rows",
    "predicted": "predicted, of the same",
    "total": "predicted, of the exact",
}
OTHERS = {
    "flash": "Flash",
    "flash_tiles": "by 16",
    "flash_on_demand": "on demand",
    "ascending_by_key": "rising",
    "ascending_by_tile": "by tile",
}
ORDERS = {"descending_in_sequence": "in sequence", "descending_joined": "joined"}
WEIGHTINGS = {"unit": "1", "bits": "bits"}
FETCHES = {
    "cold": "nothing shared",
    "in_order_8": "in order, 8 held",
    "in_order_32": "32 held",
    "stream": "all streamed",
}


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """One table: `rows` of cells under `columns`, the first `text_columns` of them text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


def study_tables(record: dict[str, Any]) -> dict[str, StudyTable]:
    """Returns the tables of a record of `codesign reproduce prediction-claims`, by name."""
    return {
        "similarity": _similarity(record),
        "recall": _recall(record),
        "segments": _segments(record),
        "operations": _operations(record),
        "fetches": _fetches(record),
    }


def _value(task: dict[str, Any], name: str, scale: float, digits: int) -> str:
    """Returns a figure's mean; a dash where there is none."""
    mean = task["figures"].get(name, {}).get("mean")
    # Adding 0 makes a rounded -0 a 0.
    return "-" if mean is None else f"{round(scale * mean, digits) + 0.0:.{digits}f}"


def _spread(task: dict[str, Any], name: str, scale: float, digits: int) -> str:
    """Returns a figure's mean and its standard deviation over heads and seeds."""
    deviation = task["figures"].get(name, {}).get("deviation")
    mean = _value(task, name, scale, digits)
    return mean if deviation is None else f"{mean} ± {scale * deviation:.{digits}f}"


def _similarity(record: dict[str, Any]) -> StudyTable:
    rows = []
    for task in record["tasks"]:
        for pairs, rows_name in PAIRS.items():
            for code, code_name in CODES.items():
                won = _value(task, f"{pairs}.hybrid_log_wins.error", PERCENT, 0)
                rows.append(
                    (
                        f"{task['task']}, {rows_name}",
                        code_name,
                        _spread(task, f"{pairs}.error.{code}", 1.0, 3),
                        _spread(task, f"{pairs}.pearson.{code}", 1.0, 3),
                        _spread(task, f"{pairs}.spearman.{code}", 1.0, 3),
                        _value(task, f"{pairs}.similar.0.25.{code}", PERCENT, 1),
                        _value(task, f"{pairs}.similar.0.25.exact", PERCENT, 1),
                        _value(task, f"{pairs}.agree.0.25.{code}", PERCENT, 1),
                        _value(task, f"{pairs}.f1.0.25.{code}", 1.0, 2),
                        won if code == "hybrid_log" else "",
                    )
                )
    return StudyTable(
        title="Distances of rows from predicted scores; % similar (up to 0.25), decided as from exact ones, heads won",
        columns=(
            *("rows", "codes", "error", "Pearson", "Spearman", "similar", "exact"),
            *("alike", "F1", "won"),
        ),
        rows=rows,
        text_columns=2,
    )


def _recall(record: dict[str, Any]) -> StudyTable:
    rows = [
        (
            f"{task['task']}, top {PERCENT * share:g} %",
            _value(task, "segments.keys.1", 1.0, 0),
            *(_spread(task, f"recall.{share:g}.{name}", PERCENT, 1) for name in PREDICTIONS),
            _value(task, f"recall.{share:g}.one_wins", PERCENT, 0),
        )
        for task in record["tasks"]
        for share in (0.25, 0.1)
    ]
    return StudyTable(
        title="Exact largest keys found, and heads where one leading one finds more than two, %",
        columns=("task", "keys", *PREDICTIONS.values(), "one > two"),
        rows=rows,
    )


def _segments(record: dict[str, Any]) -> StudyTable:
    numbers = (1, 2, 4, 8, 16, 32)

    def cell(task: dict[str, Any], name: str, number: int) -> str:
        keys = _value(task, f"segments.keys.{number}", 1.0, 0)
        error = _value(task, f"segments.{name}.{number}", PERCENT, 1)
        return "-" if error == "-" else f"{error} ({keys})"

    rows = [
        (f"{task['task']}, {text}", *(cell(task, name, number) for number in numbers))
        for task in record["tasks"]
        for name, text in ERRORS.items()
    ]
    return StudyTable(
        title="Keys of the top 25 % by segment that are not the row's, % (keys of a row); published: 3 (1024) at 4",
        columns=("scores, by segments", *(f"{number}" for number in numbers)),
        rows=rows,
    )


def _operations(record: dict[str, Any]) -> StudyTable:
    rows = []
    sized = {name: {"mean": value} for name, value in record["published_size"].items()}
    for task in [*record["tasks"], {"task": "256 of 1024", "figures": sized}]:
        for order, text in ORDERS.items():
            for weighting, weights in WEIGHTINGS.items():
                begin = f"cut.{weighting}.own.{order}"
                whole = f"cut.{weighting}.whole.{order}.flash"
                rows.append(
                    (
                        f"{task['task']}, {text}",
                        weights,
                        *(_value(task, f"{begin}.{other}", PERCENT, 0) for other in OTHERS),
                        _value(task, whole, PERCENT, 1),
                        _value(task, "operations.first_is_largest", PERCENT, 0),
                    )
                )
    return StudyTable(
        title="Operations that falling order saves, % (published: 25 of FlashAttention's, 11 of rising order's)",
        columns=(
            *("keys", "weights", *OTHERS.values()),
            *("all of Flash", "first largest"),
        ),
        rows=rows,
        text_columns=2,
    )


def _fetches(record: dict[str, Any]) -> StudyTable:
    rows = [
        (
            f"{task['task']}, {block} queries",
            *(_value(task, f"fetch.cut.{block}.{name}", PERCENT, 1) for name in FETCHES),
        )
        for task in record["tasks"]
        for block in (128, 8)
    ]
    return StudyTable(
        title="Vectors that the reuse-aware order need not read, % (published: 23)",
        columns=("block", *FETCHES.values()),
        rows=rows,
    )
