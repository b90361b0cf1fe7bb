"""`codesign compare`."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from codesign.experiments.commands import Json, announce, curve_seconds, say
from codesign.experiments.compare import (
    COMMON,
    EQUAL_MULTIPLIERS,
    KL_NATS,
    OWN,
    check_limits,
    checked_names,
    framed_experiments,
    reached_settings,
    run_comparison,
)
from codesign.experiments.configs import BudgetMetric, Experiment
from codesign.experiments.curve import checked_curve
from codesign.experiments.curve_settings import CurveSettings
from codesign.experiments.data import Part
from codesign.experiments.finished import DENSE_FOLDER
from codesign.experiments.run import check_directory
from codesign.experiments.tables import print_json, print_table

TITLES = {
    COMMON: "common frame: one energy table, 28 nm, 1 GHz, 5.69 mm2, 59.8 GB/s",
    EQUAL_MULTIPLIERS: "common frame but its area: as many multipliers as SOFA",
    OWN: "each machine in its own node, with its own fitted factor: not to be compared across rows",
}


def compare(
    *,
    experiment: Experiment,
    out: Path,
    mechanisms: tuple[str, ...] | None = None,
    budgets: tuple[float, ...] = (0.6, 0.45, 0.35),
    metric: BudgetMetric = "energy",
    seeds: tuple[int, ...] = (0,),
    part: Part = "validation",
    num_selection: int = 32,
    loss: float | None = None,
    kl: float = KL_NATS,
    cache: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    estimate: bool = False,
    as_json: Json = False,
) -> int:
    """Compares mechanisms on one model and task, in one frame, at equal quality and at equal divergence.

    Draws a curve for each and writes comparison.json, comparison.png, the curves under curves/ and the machines in the
    common frame under machines/. A figure between two measured policies is that of a mixture of them.

    Example: `codesign compare digits --out runs/all --mechanisms energon sofa topk`

    Args:
      experiment: The named experiment; mechanism, preset and seed are replaced.
      out: Directory, made here.
      mechanisms: Which; default: all that have thresholds and a machine.
      budgets: Fractions of the dense cost in the common frame, falling.
      metric: The cost under the budget.
      seeds: Seeds of the dense model and its fine-tuning.
      part: Part of the data on which points are measured.
      num_selection: Validation examples on which the uniform settings are chosen.
      loss: Quality that may be lost against dense; default: a point of accuracy (0.01), or 0.05 bits per token.
      kl: Divergence from dense at which they are compared besides, nat.
      cache: Folder of the dense models; default: `dense` in `--out`.
      resume: Continue the comparison in `--out`.
      overwrite: Delete the comparison in `--out` first.
      estimate: Print the expected time and stop.
      as_json: Print JSON only.
    """
    settings = CurveSettings(budgets=budgets, metric=metric, num_selection=num_selection)
    check_directory(out, resume=resume, overwrite=overwrite)
    chosen = checked_names(mechanisms)
    check_limits(loss, kl)
    if not as_json:
        announce(_seconds(experiment, settings, chosen, seeds, part))
    if estimate:
        return 0
    path = run_comparison(
        experiment,
        settings,
        out,
        names=mechanisms,
        seeds=seeds,
        part=part,
        loss=loss,
        kl_nats=kl,
        cache=cache or out / DENSE_FOLDER,
        resume=resume,
        overwrite=overwrite,
        progress=not as_json,
        report=(lambda line: None) if as_json else say,
    )
    rows = json.loads(path.read_text())
    if as_json:
        print_json(rows)
        return 0
    print_comparison(rows)
    print(path)
    print(path.with_suffix(".png"))
    return 0


def _seconds(
    experiment: Experiment,
    settings: CurveSettings,
    chosen: dict[str, str],
    seeds: tuple[int, ...],
    part: Part,
) -> float:
    """Returns the expected time of a comparison, s, after telling once what was done to checkpoint and settings.

    Dense models do not depend on the mechanism: the first curve trains them for all.
    """
    seconds = 0.0
    told = set[str]()
    with TemporaryDirectory() as folder:
        for framed in framed_experiments(experiment, chosen, Path(folder)).values():
            reached = reached_settings(framed, settings)
            outlined = checked_curve(framed, reached, seeds)
            for note in outlined.notes:
                if note not in told:
                    say(note)
            told |= set(outlined.notes)
            seconds += curve_seconds(outlined, reached, seeds, part, dense_is_cached=seconds > 0.0)
    return seconds


def print_comparison(rows: list[dict[str, Any]]) -> None:
    """Prints the tables of a comparison: the common frame first."""
    for frame, title in TITLES.items():
        for at, what in (("quality", "equal quality"), ("kl", "equal divergence")):
            shown = [row for row in rows if row["frame"] == frame and row["at"] in ("dense", at)]
            if not shown:
                continue
            print_table(
                f"{title}; {what}",
                (
                    *("mechanism", "setting", "quality", "KL, nat", "kept"),
                    *(
                        "µJ, attention",
                        "end to end",
                        "95 %",
                        "µs, attention",
                        "end to end",
                        "binds",
                    ),
                ),
                [
                    (
                        row["mechanism"],
                        row["setting"].replace("_", " "),
                        f"{row['quality']:.4f}",
                        f"{row['kl']:.4f}",
                        f"{row['kept']:.3f}",
                        f"{row['energy']:.4g}",
                        f"{'at most ' if row['is_bound'] else ''}{row['energy_end_to_end']:.4g}",
                        " to ".join(f"{end:.4g}" for end in row["interval"]["energy_end_to_end"]),
                        *(f"{row[key]:.4g}" for key in ("latency", "latency_end_to_end")),
                        row["binds"],
                    )
                    for row in shown
                ],
                text_columns=2,
            )
