"""`codesign quickstart`: from nothing to a curve and a verified export."""

import json
from pathlib import Path

from codesign.experiments.commands import announce, curve_seconds, print_curve, say, tell_notes
from codesign.experiments.configs import Experiment, digits
from codesign.experiments.curve import FIGURE_FILE, checked_curve, point_directory, run_curve
from codesign.experiments.curve_settings import CurveSettings
from codesign.experiments.deploy_commands import export, print_verification, verification
from codesign.experiments.finished import DENSE_FOLDER

EXPORTED_BUDGET = 0.4
NUM_FRESH = 256
"""Fresh images of the verification: over 1e7 keep decisions on digits."""


def quickstart(
    *, out: Path = Path("runs/quickstart"), resume: bool = False, overwrite: bool = False
) -> int:
    """Trains a dense model on digits, draws a curve of six energy budgets, exports a point and verifies it.

    Example: `codesign quickstart --out runs/quickstart`

    Args:
      out: Directory for everything, made here.
      resume: Continue an interrupted quickstart.
      overwrite: Delete the quickstart in `--out` first.
    """
    return run_quickstart(
        digits(), CurveSettings(), EXPORTED_BUDGET, out, resume=resume, overwrite=overwrite
    )


def run_quickstart(
    experiment: Experiment,
    settings: CurveSettings,
    exported_budget: float,
    out: Path,
    *,
    resume: bool,
    overwrite: bool,
) -> int:
    """Draws a curve on the test part, exports the trained point of one of its budgets, and verifies the export."""
    seeds = (experiment.seed,)
    outlined = checked_curve(experiment, settings, seeds)
    tell_notes(outlined)
    announce(curve_seconds(outlined, settings, seeds, "test"))
    path = run_curve(
        experiment,
        settings,
        out,
        seeds=seeds,
        part="test",
        cache=out / DENSE_FOLDER,
        resume=resume,
        overwrite=overwrite,
        progress=True,
        report=say,
    ).path
    point = point_directory(out, experiment.seed, "trained", exported_budget)
    exported = out / "export"
    # An interrupted quickstart may have got this far: an export is written whole or not at all.
    if not exported.exists():
        export(point, out=exported)
    found = verification(
        exported, run=point, part="validation", num_examples=NUM_FRESH, cache=None, progress=True
    )
    print_curve(json.loads(path.read_text()))
    print_verification(found)
    print(f"curve:   {path}\nfigure:  {out / FIGURE_FILE}\nrun:     {point}\nexport:  {exported}")
    return 0 if found["is_exact"] else 1
