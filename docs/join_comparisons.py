"""Joins comparisons that were drawn in parts into docs/results: `python docs/join_comparisons.py TASK DIR ...`.

A DIR is one of `codesign compare`, finished or not: mechanisms that it finished replace those of their name in
`results/TASK-comparison.json` (rows) and `results/curves/TASK-comparison.json` (means of their curves), from which the
figure is drawn again.
"""

import json
import sys
from pathlib import Path
from typing import Any

from codesign.experiments.compare import KL_NATS, ROWS_FILE
from codesign.experiments.compare_rows import with_bounds
from codesign.experiments.curve import CURVE_FILE
from codesign.experiments.figure import draw_comparison
from codesign.mechanisms import MECHANISMS

RESULTS = Path(__file__).resolve().parent / "results"
OF_CURVE = ("quality_name", "scope", "metric", "part", "num_examples", "seeds", "means")
"""What is kept of a curve."""
SAME = ("experiment", "curve", "seeds", "part", "loss", "kl_nats")
"""Settings that parts of a comparison share."""


def settings_of(directory: Path) -> dict[str, Any]:
    """Returns the settings that another part must share."""
    config = json.loads((directory / "config.json").read_text())
    return {name: config[name] for name in SAME}


def finished(directory: Path) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Returns the curve and the rows of every mechanism that a comparison finished."""
    settings = settings_of(directory)
    found = {}
    for path in sorted((directory / "curves").glob(f"*/{ROWS_FILE}")):
        curve = json.loads((path.parent / CURVE_FILE).read_text())
        limits = {"loss": settings["loss"], "kl_nats": settings["kl_nats"] or KL_NATS}
        rows = with_bounds(json.loads(path.read_text()), curve, **limits)
        kept = {name: curve[name] for name in OF_CURVE if name in curve}
        found[path.parent.name] = (kept, rows)
    return found


def join(task: str, directories: list[Path]) -> None:
    """Writes rows, curves and figure of a task.

    Raises:
      SystemExit: If the parts have different settings.
    """
    different = [one for one in directories if settings_of(one) != settings_of(directories[0])]
    if different:
        sys.exit(
            f"{different[0]} has other settings than {directories[0]}: join what was drawn alike"
        )
    rows_path = RESULTS / f"{task}-comparison.json"
    curves_path = RESULTS / "curves" / f"{task}-comparison.json"
    rows = json.loads(rows_path.read_text()) if rows_path.exists() else []
    curves = json.loads(curves_path.read_text()) if curves_path.exists() else {}
    for directory in directories:
        for name, (curve, own) in finished(directory).items():
            curves[name] = curve
            rows = [row for row in rows if row["mechanism"] != name] + own
    order = list(MECHANISMS)
    rows.sort(key=lambda row: order.index(row["mechanism"]))
    curves = {name: curves[name] for name in order if name in curves}
    rows_path.write_text(json.dumps(rows, indent=2) + "\n")
    curves_path.write_text(json.dumps(curves, indent=2) + "\n")
    draw_comparison(curves, rows_path.with_suffix(".png"))
    without = sorted({row["mechanism"] for row in rows} - curves.keys())
    print(
        f"{rows_path.name}: {len(curves)} mechanisms drawn; without a curve: {', '.join(without) or 'none'}"
    )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python docs/join_comparisons.py TASK DIR ...")
    join(sys.argv[1], [Path(one) for one in sys.argv[2:]])
