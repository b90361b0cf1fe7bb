"""`codesign validate`."""

import os
from pathlib import Path
from typing import Annotated

import tyro

from codesign.experiments.reference_tables import ValidationRow
from codesign.experiments.tables import print_json, print_table
from codesign.experiments.validation import Outcome, records, validate_all

DATA_VARIABLE = "CODESIGN_VALIDATION"


def validate(
    *,
    data: Path | None = None,
    agreement: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Compares the hardware models with reference results of other tools and publications, as far as files are there.

    Exits with 1 if a figure is beyond its limit; a file that is not there is said so, and skipped. Takes a minute or two.

    Example: `codesign validate --data DIR --json`

    Args:
      data: Folder of the reference results (file names: docs/validation.md); default: $CODESIGN_VALIDATION.
      agreement: `study.json` of `codesign reproduce simulator-agreement`: adds the cost model's errors against simulators.
      as_json: Print JSON only, a list of {reference, metric, value, unit, limit, rows}; limit null: reported only.
    """
    named = os.environ.get(DATA_VARIABLE)
    outcomes = validate_all(data or (Path(named) if named else None), agreement)
    if as_json:
        print_json(records(outcomes))
    else:
        print_outcomes(outcomes)
    missed = [row for outcome in outcomes for row in outcome.rows if not row.is_met]
    return 1 if missed else 0


def print_outcomes(outcomes: list[Outcome]) -> None:
    """Prints a table of all figures, and why other comparisons were not made."""
    print_table(
        "ours against reference results; error beyond its limit: MISSED",
        ("reference", "metric", "value", "limit", "unit", "rows", ""),
        [cells(row) for outcome in outcomes for row in outcome.rows],
        text_columns=2,
    )
    for outcome in outcomes:
        if outcome.reason:
            print(f"{outcome.name}: {outcome.reason}")


def cells(row: ValidationRow) -> tuple[str, ...]:
    """Returns the cells of a row."""
    limit, verdict = ("-", "") if row.limit is None else (f"{row.limit:.7g}", "ok")
    return (
        *(row.reference, row.metric, f"{row.value:.4g}", limit, row.unit, str(row.rows)),
        verdict if row.is_met else "MISSED",
    )
