"""The cost model beside the simulators, from a study that `codesign reproduce simulator-agreement` wrote."""

import json
from pathlib import Path
from typing import Any

from codesign.errors import DataError
from codesign.experiments.reference_tables import PERCENT, ValidationRow

MEAN_LIMIT, ORDER_LIMIT = 5.0, 0.05
"""Mean error in percent, and 1 - Kendall's tau, up to which the cost model stands for a simulator (ours)."""
FIELDS = ("task", "machine", "scope", "metric", "num_points", "mean_error", "tau", "least_tau")
"""What a record must have."""


def simulator_agreement(path: Path) -> list[ValidationRow]:
    """Returns mean errors and orders of every machine and task of a study.

    Raises:
      DataError: If the file is not there, or no such study.
    """
    return [row for record in _records(path) for row in _rows(record)]


def _records(path: Path) -> list[dict[str, Any]]:
    mend = "name the `study.json` of `codesign reproduce simulator-agreement`"
    if not path.is_file():
        raise DataError(f"'{path}' is not there: {mend}")
    try:
        records = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"'{path}' is no JSON ({error}): {mend}") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"'{path}' is no list of records: {mend}")
    for place, record in enumerate(records):
        lacking = [name for name in FIELDS if not isinstance(record, dict) or name not in record]
        if lacking:
            raise DataError(f"'{path}', record {place}, lacks `{lacking[0]}`: {mend}")
    return records


def _rows(record: dict[str, Any]) -> list[ValidationRow]:
    metric, scope = record["metric"], record["scope"].replace("_", " ")
    figures = (
        ("mean error", PERCENT * record["mean_error"], "%", MEAN_LIMIT),
        ("1 - Kendall's tau", 1.0 - record["tau"], "1", ORDER_LIMIT),
        ("1 - tau, most at one size", 1.0 - record["least_tau"], "1", ORDER_LIMIT),
    )
    return [
        ValidationRow(
            reference=f"Simulator, {record['machine']} on {record['task']}, {scope}",
            metric=f"{metric}, {name}",
            value=float(value),
            unit=unit,
            limit=limit,
            rows=int(record["num_points"]),
        )
        for name, value, unit, limit in figures
    ]
