"""Every mechanism on one model and task, in one frame, at equal quality and at equal divergence."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from codesign.errors import UnknownNameError
from codesign.experiments.configs import Experiment, require
from codesign.experiments.curve import CURVE_FILE, checked_curve, point_directory, run_curve
from codesign.experiments.curve_record import BETTER
from codesign.experiments.curve_settings import COMPARED_KINDS, CurveSettings
from codesign.experiments.data import Part
from codesign.experiments.evaluate import measure, summary
from codesign.experiments.figure import draw_comparison
from codesign.experiments.finished import load_run, measure_dense
from codesign.experiments.problem import load_problem, outline
from codesign.experiments.reach import cheapest_ratio, check_reachable
from codesign.experiments.run import RunDirectory, write_json
from codesign.experiments.start import start_point
from codesign.hw.frame import common_frame
from codesign.hw.spec import load_preset, preset_names
from codesign.mechanisms import MECHANISMS
from codesign.units import PJ_PER_UJ, US_PER_S

COMPARISON_FILE = "comparison.json"
FIGURE_FILE = "comparison.png"
COMMON, OWN = "common", "own"
"""Frames: `codesign.hw.frame`, and the machine's own node, area and fitted factor."""
LOSS = {"accuracy": 0.01, "bits_per_token": 0.05}
"""What may be lost against dense at equal quality: a point of accuracy, or bits per token (ours)."""
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
    machines = out / "machines"
    machines.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, framed in framed_experiments(experiment, chosen, machines).items():
        reached = reached_settings(framed, settings)
        left_out = [f"{one:g}" for one in settings.budgets if one not in reached.budgets]
        suffix = f"; no legal policy reaches {', '.join(left_out)}" if left_out else ""
        report(f"{name} on preset {chosen[name]}{suffix}")
        folder = out / "curves" / name
        path = run_curve(
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
        )
        record = json.loads(path.read_text())
        own = dataclasses.replace(experiment, mechanism=name, preset=chosen[name])
        record["own_points"] = _own_points(own, reached, folder, seeds, part, cache, progress)
        rows += comparison_rows(record, name, loss=loss, kl_nats=kl_nats)
    write_json(out / COMPARISON_FILE, rows)
    draw_comparison(curves_of(out, tuple(chosen)), out / FIGURE_FILE)
    return out / COMPARISON_FILE


def _own_points(
    experiment: Experiment,
    settings: CurveSettings,
    folder: Path,
    seeds: Sequence[int],
    part: Part,
    cache: Path,
    progress: bool,
) -> list[dict[str, Any]]:
    """Returns the trained points of a curve, and dense, as the mechanism's own machine prices them."""
    points = []
    for seed in seeds:
        problem = load_problem(
            dataclasses.replace(experiment, seed=seed), cache=cache, progress=progress
        )
        dense = measure_dense(problem, start_point(problem), part)
        points.append({"kind": "dense", "seed": seed, **summary(dense, dense)})
        for kind in COMPARED_KINDS:
            for fraction in settings.budgets:
                path = point_directory(folder, seed, kind, fraction)
                run = load_run(path, cache=cache, progress=progress)
                measured = measure(problem, run.point, part)
                points.append({"kind": kind, "seed": seed, **summary(measured, dense)})
    for point in points:
        point["clock_hz"] = load_preset(experiment.preset).clock_hz
    return points


def comparison_rows(
    record: dict[str, Any], mechanism: str, *, loss: float | None, kl_nats: float
) -> list[dict[str, Any]]:
    """Returns a mechanism's rows: dense, and each setting at equal quality and at equal divergence, in both frames.

    A figure that lies between two measured policies is that of a machine which runs one of them on a share of the
    examples and the other on the rest, in expectation. Of all such mixtures, and of the policies themselves, the one of
    least energy end to end is taken.

    Args:
      record: A curve's JSON in the common frame, with the `own_points` of its machine.
      mechanism: Its name.
      loss: What quality may be lost against dense; None: `LOSS`.
      kl_nats: Divergence allowed.
    """
    name = record["quality_name"]
    limit = LOSS[name] if loss is None else loss
    common = [point | {"clock_hz": record["clock_hz"]} for point in record["points"]]
    rows = []
    for frame, points in ((COMMON, common), (OWN, record["own_points"])):
        dense = [point for point in points if point["kind"] == "dense"]
        rows.append(_row(mechanism, "dense", "dense", frame, dense))
        for kind in dict.fromkeys(point["kind"] for point in points):
            if kind == "dense":
                continue
            for at in ("quality", "kl"):
                found = []
                for base in dense:
                    own = [p for p in points if p["seed"] == base["seed"] and p["kind"] == kind]

                    def lost(
                        point: dict[str, Any], base: dict[str, Any] = base, at: str = at
                    ) -> float:
                        if at == "kl":
                            return float(point["kl_nats"]) - kl_nats
                        return float(BETTER[name] * (base["quality"] - point["quality"])) - limit

                    found.append(cheapest_mixture([base, *own], lost))
                rows.append(_row(mechanism, kind, at, frame, found))
    return rows


def cheapest_mixture(
    points: Sequence[dict[str, Any]], lost: Callable[[dict[str, Any]], float]
) -> dict[str, Any]:
    """Returns the mixture of at most two points that costs least energy end to end and loses nothing beyond its limit.

    Args:
      points: Measured policies; of one at least nothing is lost.
      lost: How much more a point loses than it may; linear in what is mixed.
    """
    best: tuple[float, dict[str, Any]] | None = None
    for good in points:
        if lost(good) > 0.0:
            continue
        for other in points:
            share = 0.0
            if lost(other) > 0.0:
                share = lost(good) / (lost(good) - lost(other))
            mixed = _mixed(good, other, share)
            energy = mixed["end_to_end"]["energy_pj"]
            if best is None or energy < best[0]:
                best = energy, mixed
    if best is None:
        return dict(points[0])
    return best[1]


def _mixed(first: Any, second: Any, share: float) -> Any:
    """Returns figures of both, `share` of the second; what is no number is the first's."""
    if isinstance(first, dict):
        return {key: _mixed(value, second.get(key), share) for key, value in first.items()}
    if isinstance(first, float) and isinstance(second, int | float):
        return (1.0 - share) * first + share * second
    return first


def _row(
    mechanism: str, setting: str, at: str, frame: str, points: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns one row, means over seeds; energies in uJ and latencies in us per example."""

    def mean(read: Callable[[dict[str, Any]], float]) -> float:
        return float(np.mean([read(point) for point in points]))

    def costs(scope: str) -> tuple[float, float]:
        energy = mean(lambda point: point[scope]["energy_pj"] / PJ_PER_UJ)
        latency = mean(lambda point: point[scope]["latency_cycles"] / point["clock_hz"] * US_PER_S)
        return energy, latency

    energy, latency = costs("attention")
    whole, whole_latency = costs("end_to_end")
    energies = [point["end_to_end"]["energy_pj"] / PJ_PER_UJ for point in points]
    qualities = [point["quality"] for point in points]
    return {
        "mechanism": mechanism,
        "setting": setting,
        "at": at,
        "quality": mean(lambda point: point["quality"]),
        "kl": mean(lambda point: point["kl_nats"]),
        "kept": mean(lambda point: point["kept_fraction"]),
        "energy": energy,
        "latency": latency,
        "energy_end_to_end": whole,
        "latency_end_to_end": whole_latency,
        "frame": frame,
        "seeds": len(points),
        "spread": {
            "energy_end_to_end": _spread(energies),
            "quality": _spread(qualities),
        },
    }


def _spread(values: Sequence[float]) -> float | None:
    """Returns the standard deviation over seeds; None of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def curves_of(out: Path, mechanisms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the curves' JSON by mechanism."""
    return {
        name: json.loads((out / "curves" / name / CURVE_FILE).read_text()) for name in mechanisms
    }
