"""Every mechanism on one model and task, in one frame: its curves, and the rows of the comparison."""

import dataclasses
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from codesign.errors import UnknownNameError
from codesign.experiments.compare_rows import comparison_rows, with_bounds
from codesign.experiments.configs import Experiment, require
from codesign.experiments.curve import CURVE_FILE, checked_curve, run_curve
from codesign.experiments.curve_settings import CurveSettings
from codesign.experiments.data import Part
from codesign.experiments.figure import draw_comparison
from codesign.experiments.problem import outline
from codesign.experiments.reach import cheapest_ratio, check_reachable
from codesign.experiments.run import RunDirectory, write_json
from codesign.hw.frame import common_frame, equal_multipliers
from codesign.hw.spec import AcceleratorSpec, load_preset, preset_names
from codesign.mechanisms import MECHANISMS

COMPARISON_FILE = "comparison.json"
FIGURE_FILE = "comparison.png"
ROWS_FILE = "rows.json"
"""A finished mechanism's rows, beside its curve."""
COMMON, EQUAL_MULTIPLIERS, OWN = "common", "equal_multipliers", "own"
"""Frames: `codesign.hw.frame`, without its area, and the machine's own node, area and fitted factor."""
KL_NATS = 0.02
"""Divergence at which mechanisms are compared besides, nat (ours)."""


def compared_mechanisms() -> dict[str, str]:
    """Returns the mechanisms that have thresholds and a machine, with the preset that stands for each.

    That of its name, or the first of its own.
    """
    presets = {name: load_preset(name).mechanism for name in preset_names()}
    chosen = {}
    for name, mechanism in MECHANISMS.items():
        own = [preset for preset, made_for in presets.items() if made_for == name]
        if mechanism.thresholds is not None and own:
            chosen[name] = name if name in own else own[0]
    return chosen


def checked_names(names: Sequence[str] | None) -> dict[str, str]:
    """Returns the named mechanisms with their presets; all without names.

    Raises:
      UnknownNameError: If a mechanism cannot be compared.
      CodesignError: If a name stands twice.
    """
    known = compared_mechanisms()
    if names is None:
        return known
    for name in names:
        if name not in known:
            raise UnknownNameError(
                f"mechanism `{name}` cannot be compared: choose among {', '.join(sorted(known))}"
            )
    require(
        bool(names) and len(set(names)) == len(names), "mechanisms", "name each once", tuple(names)
    )
    return {name: known[name] for name in names}


def check_limits(loss: float | None, kl_nats: float) -> None:
    """Checks what may be lost; raises `CodesignError`."""
    require(loss is None or loss >= 0.0, "loss", "be at least 0", loss)
    require(kl_nats > 0.0, "kl", "be > 0", kl_nats)


def framed_experiments(
    experiment: Experiment, chosen: dict[str, str], folder: Path
) -> dict[str, Experiment]:
    """Writes the machines in the common frame into a folder; returns an experiment on each, by mechanism."""
    framed = {}
    for name, preset in chosen.items():
        path = folder / f"{preset}.json"
        path.write_text(common_frame(load_preset(preset)).model_dump_json(indent=2) + "\n")
        framed[name] = dataclasses.replace(experiment, mechanism=name, preset=str(path))
    return framed


def reached_settings(experiment: Experiment, settings: CurveSettings) -> CurveSettings:
    """Returns the settings with those budgets that some legal policy reaches.

    Raises:
      InfeasibleBudgetError: If none does.
    """
    outlined = outline(experiment)
    largest = settings.budget(max(settings.budgets))
    check_reachable(outlined, largest)
    least = cheapest_ratio(outlined, largest.scope)[settings.metric]
    reached = tuple(fraction for fraction in settings.budgets if fraction >= least)
    return dataclasses.replace(settings, budgets=reached)


def run_comparison(
    experiment: Experiment,
    settings: CurveSettings,
    out: Path,
    *,
    names: Sequence[str] | None,
    seeds: Sequence[int],
    part: Part,
    loss: float | None,
    kl_nats: float,
    cache: Path,
    resume: bool,
    overwrite: bool,
    progress: bool,
    report: Callable[[str], None],
) -> Path:
    """Draws the curve of every mechanism in the common frame and compares them; returns the path of the JSON file.

    Args:
      experiment: Settings; mechanism, preset and seed are replaced.
      settings: Budgets and the uniform grid of every curve; those that no policy reaches are left out.
      out: Directory, made here; curves lie below `curves/`, machines of the frame below `machines/`.
      names: Mechanisms; None: all that have thresholds and a machine.
      seeds: Seeds of the dense model, its fine-tuning and the order of the examples.
      part: Part of the data on which points are measured.
      loss: What quality may be lost against dense; None: `LOSS`.
      kl_nats: Divergence at which they are compared besides.
      cache: Folder of the dense models.
      resume: Continue what is there.
      overwrite: Delete what is there.
      progress: Whether to show progress bars.
      report: Receives one line per finished point.

    Raises:
      CodesignError: If a setting is wrong.
      InfeasibleBudgetError: If a mechanism reaches no budget.
      RunDirectoryError: If `out` exists and neither flag is given, or it was made with other settings.
    """
    chosen = checked_names(names)
    check_limits(loss, kl_nats)
    config = {
        "experiment": experiment.plain(),
        "curve": dataclasses.asdict(settings),
        "mechanisms": chosen,
        "seeds": list(seeds),
        "part": part,
        "loss": loss,
        "kl_nats": kl_nats,
    }
    with TemporaryDirectory() as folder_of_checks:
        for one in framed_experiments(experiment, chosen, Path(folder_of_checks)).values():
            checked_curve(one, reached_settings(one, settings), seeds)
    RunDirectory.create(out, config, resume=resume, overwrite=overwrite)
    files = out / "machines"
    files.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, framed in framed_experiments(experiment, chosen, files).items():
        reached = reached_settings(framed, settings)
        left_out = [f"{one:g}" for one in settings.budgets if one not in reached.budgets]
        suffix = f"; no legal policy reaches {', '.join(left_out)}" if left_out else ""
        report(f"{name} on preset {chosen[name]}{suffix}")
        folder = out / "curves" / name
        if not (folder / ROWS_FILE).exists():
            machines = machines_of(framed, chosen[name])
            curve = run_curve(
                framed,
                reached,
                folder,
                seeds=seeds,
                part=part,
                cache=cache,
                resume=folder.exists(),
                overwrite=False,
                progress=progress,
                report=report,
                machines=machines,
            )
            found = comparison_rows(
                curve.points,
                name,
                machines,
                loss=loss,
                kl_nats=kl_nats,
                num_resamples=settings.num_resamples,
            )
            write_json(folder / ROWS_FILE, found)
            forget_programs()
        record = json.loads((folder / CURVE_FILE).read_text())
        found = json.loads((folder / ROWS_FILE).read_text())
        rows += with_bounds(found, record, loss=loss, kl_nats=kl_nats)
    write_json(out / COMPARISON_FILE, rows)
    draw_comparison(curves_of(out, tuple(chosen)), out / FIGURE_FILE)
    return out / COMPARISON_FILE


def forget_programs() -> None:
    """Lets go of compiled programs, which no other mechanism needs.

    Each maps pieces of memory, of which Linux allows a process 65,530: those of ten mechanisms on a text model are more.
    """
    jax.clear_caches()  # type: ignore[no-untyped-call]
    gc.collect()


def machines_of(experiment: Experiment, preset: str) -> dict[str, AcceleratorSpec]:
    """Returns the machines on which a mechanism is priced, by frame; the first is the experiment's own.

    AccelTran's area is mostly softmax and sparsity blocks, so that the common frame leaves it 1.7 of its processing
    elements: it has a second row at equal multipliers.
    """
    machines = {COMMON: load_preset(experiment.preset), OWN: load_preset(preset)}
    if experiment.mechanism == "acceltran":
        machines[EQUAL_MULTIPLIERS] = equal_multipliers(load_preset(preset))
    return machines


def curves_of(out: Path, mechanisms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the curves' JSON by mechanism."""
    return {
        name: json.loads((out / "curves" / name / CURVE_FILE).read_text()) for name in mechanisms
    }
