"""Accuracy-cost curves: trained policies against uniform settings, untrained and fine-tuned alike, by budget."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from codesign.calibration import Calibration
from codesign.experiments.configs import Budget, BudgetMetric, Experiment, require
from codesign.experiments.curve_record import CurvePoint, curve_record
from codesign.experiments.curve_settings import TRAINED_KINDS, CurveSettings
from codesign.experiments.data import Part
from codesign.experiments.dense_cost import DenseCost
from codesign.experiments.evaluate import Point, measure, summary
from codesign.experiments.figure import draw_curve
from codesign.experiments.finished import Settings, measure_dense, record_data
from codesign.experiments.problem import Problem, load_problem, outline
from codesign.experiments.reach import check_reachable
from codesign.experiments.run import RunDirectory, write_json
from codesign.experiments.start import (
    measured_ranges,
    ranges_of,
    start_point,
    start_policy,
    with_threshold,
)
from codesign.experiments.train import BudgetedTraining
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.spec import AcceleratorSpec
from codesign.policy import Policy

CURVE_FILE = "curve.json"
FIGURE_FILE = "curve.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A drawn curve: its JSON file, and what was measured at its points."""

    path: Path
    points: list[CurvePoint]


def checked_curve(experiment: Experiment, settings: CurveSettings, seeds: Sequence[int]) -> Problem:
    """Returns the outline of an experiment of which a curve can be drawn, before anything is written.

    Raises:
      CodesignError: If a setting or the data is wrong, or settings do not fit each other.
      InfeasibleBudgetError: If no legal policy reaches a budget.
    """
    require(
        bool(seeds) and len(set(seeds)) == len(seeds) and min(seeds) >= 0,
        "seeds",
        "be whole numbers >= 0, at least one and each once",
        tuple(seeds),
    )
    outlined = outline(experiment)
    scale, name = outlined.mechanism.thresholds, outlined.mechanism.name
    require(scale is not None, "experiment.mechanism", "have thresholds", name)
    assert scale is not None
    length = len(scale.settings[0])
    require(
        all(len(setting) == length for setting in settings.uniform_thresholds),
        "curve.uniform_thresholds",
        f"have {length} values in each entry, as settings of `{name}` have",
        settings.uniform_thresholds,
    )
    check_reachable(outlined, settings.budget(min(settings.budgets)))
    return outlined


def run_curve(
    experiment: Experiment,
    settings: CurveSettings,
    out: Path,
    *,
    seeds: Sequence[int],
    part: Part,
    cache: Path,
    resume: bool,
    overwrite: bool,
    progress: bool,
    report: Callable[[str], None],
    machines: Mapping[str, AcceleratorSpec] | None = None,
) -> Curve:
    """Trains, measures and draws a curve.

    Args:
      experiment: Settings; its seed is replaced by each of `seeds`.
      settings: Budgets and the uniform grid.
      out: Directory of the curve; points are run directories below `points/`.
      seeds: Seeds of the dense model, its fine-tuning and the order of the examples.
      part: Part of the data on which points are measured. Settings are always chosen on the validation part.
      cache: Folder of the dense models.
      resume: Continue what is there, point by point.
      overwrite: Delete what is there.
      progress: Whether to show progress bars.
      report: Receives one line per finished point.
      machines: Other machines on which the points are priced as well, by name.

    Raises:
      CodesignError: As `checked_curve` does.
      RunDirectoryError: If `out` exists and neither flag is given, or it was made with other settings.
    """
    outlined = checked_curve(experiment, settings, seeds)
    outlined.task.part(part)
    config = {
        "experiment": experiment.plain(),
        "curve": dataclasses.asdict(settings),
        "seeds": list(seeds),
        "part": part,
    }
    RunDirectory.create(out, config, resume=resume, overwrite=overwrite)
    others = {name: accelerator_from_spec(spec) for name, spec in (machines or {}).items()}
    points: list[CurvePoint] = []
    for seed in seeds:
        seeded = dataclasses.replace(experiment, seed=seed)
        problem = load_problem(seeded, cache=cache, progress=progress)
        points += _seed_points(problem, settings, out, part, progress, report, others)
    machine = {
        "preset": experiment.preset,
        "clock_hz": outlined.spec.clock_hz,
        "mechanism": experiment.mechanism,
        "task": experiment.task,
    }
    record = curve_record(config, points, settings) | machine
    write_json(out / CURVE_FILE, record)
    draw_curve(record, out / FIGURE_FILE)
    return Curve(path=out / CURVE_FILE, points=points)


def _seed_points(
    problem: Problem,
    settings: CurveSettings,
    out: Path,
    part: Part,
    progress: bool,
    report: Callable[[str], None],
    machines: Mapping[str, Accelerator],
) -> list[CurvePoint]:
    """Returns all points of one seed."""
    seed = problem.experiment.seed
    start = start_point(problem)
    dense = CurvePoint(
        "dense", seed, None, {}, measure_dense(problem, start, part, machines=machines)
    )
    report(_line(dense, dense))
    chosen = _choose_uniform(problem, settings, start, out / "points" / f"seed{seed}-uniform.json")
    points = [dense]
    for fraction in settings.budgets:
        point = _uniform_point(problem, start, chosen[fraction], start.calibration)
        measured = measure(problem, point, part, machines=machines)
        points.append(CurvePoint("uniform", seed, fraction, chosen[fraction], measured))
        report(_line(points[-1], dense))
    for kind in settings.trained_kinds:
        metrics: tuple[BudgetMetric, ...] = () if kind == "uniform_tuned" else (settings.metric,)
        optimize = dataclasses.replace(problem.experiment.optimize, train=TRAINED_KINDS[kind])
        training = BudgetedTraining(problem, optimize, metrics, settings.scope)
        point = start
        for fraction in settings.budgets:
            if kind != "trained":
                ranges = measured_ranges(problem, point.params)
                point = _uniform_point(problem, point, chosen[fraction], ranges)
            budget = settings.budget(fraction) if metrics else Budget(scope=settings.scope)
            point = _trained_point(training, point, budget, kind, fraction, out, progress)
            measured = measure(problem, point, part, machines=machines)
            setting = {} if kind == "trained" else chosen[fraction]
            points.append(CurvePoint(kind, seed, fraction, setting, measured))
            report(_line(points[-1], dense))
    return points


def _trained_point(
    training: BudgetedTraining,
    point: Point,
    budget: Budget,
    kind: str,
    fraction: float,
    out: Path,
    progress: bool,
) -> Point:
    """Trains one point in its own run directory, or reads it if it is there."""
    experiment = dataclasses.replace(training.problem.experiment, optimize=training.settings)
    path = point_directory(out, experiment.seed, kind, fraction)
    settings = Settings(experiment=experiment, mode="joint", budget=budget)
    run = RunDirectory.create(path, settings.plain(), resume=path.exists(), overwrite=False)
    record_data(path, training.problem.task)
    return training.train(
        point,
        budget,
        run,
        checkpoint_every=training.settings.num_steps,
        progress=progress,
    )


def point_directory(out: Path, seed: int, kind: str, fraction: float) -> Path:
    """Returns the run directory of a trained point of a curve."""
    return out / "points" / f"seed{seed}-{kind}-{fraction:g}"


def _uniform_policy(
    problem: Problem, policy: Policy, setting: dict[str, Any], calibration: Calibration
) -> Policy:
    """Returns one threshold and bit setting for all layers and heads; clips stay those of `policy`."""
    uniform = start_policy(
        problem, linear_bits=setting["weight_bits"], attention_bits=setting["attention_bits"]
    )
    layers, ends = dict(uniform.layers), dict(uniform.ends)
    for knobs, own in ((layers, policy.layers), (ends, policy.ends)):
        for name, value in knobs.items():
            if name.endswith(".activation_bits"):
                knobs[name] = jnp.full_like(value, setting["activation_bits"])
            if name.endswith("_clip"):
                knobs[name] = own[name]
    scale, shape = problem.mechanism.thresholds, layers["threshold"].shape
    assert scale is not None
    threshold = scale.from_setting(tuple(setting["threshold"]), shape, ranges_of(calibration))
    return with_threshold(Policy(layers=layers, ends=ends), threshold)


def _uniform_point(
    problem: Problem, point: Point, setting: dict[str, Any], calibration: Calibration
) -> Point:
    """Returns a point with the weights of `point`, a uniform policy, and the ranges of those weights."""
    policy = _uniform_policy(problem, point.policy, setting, calibration)
    return Point(params=point.params, policy=policy, calibration=calibration)


def _choose_uniform(
    problem: Problem, settings: CurveSettings, start: Point, path: Path
) -> dict[float, dict[str, Any]]:
    """Returns for each budget the uniform setting of least divergence on the validation part that meets it.

    The grid runs over thresholds and bits at once, on the dense weights without training. It is kept in `path`.
    """
    part = problem.task.part("validation").first(settings.num_selection)
    dense = DenseCost(
        problem.config.structure, problem.accelerator, problem.machine_mechanism
    ).mean(part, problem.buckets, settings.scope)[settings.metric]
    if path.exists():
        measured: list[dict[str, Any]] = json.loads(path.read_text())
    else:
        scale = problem.mechanism.thresholds
        assert scale is not None
        measured = []
        for threshold in settings.uniform_thresholds or scale.settings:
            for weight_bits, activation_bits, attention_bits in settings.uniform_bits:
                setting = {
                    "threshold": list(threshold),
                    "weight_bits": weight_bits,
                    "activation_bits": activation_bits,
                    "attention_bits": attention_bits,
                }
                result = measure(
                    problem,
                    _uniform_point(problem, start, setting, start.calibration),
                    "validation",
                    num_examples=settings.num_selection,
                )
                ratio = result.mean_cost(settings.metric, settings.scope) / dense
                measured.append(
                    {"setting": setting, "ratio": ratio, "kl_nats": float(result.kl_nats.mean())}
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, measured)
    chosen = {}
    for fraction in settings.budgets:
        legal = [entry for entry in measured if entry["ratio"] <= fraction]
        pool = legal or [min(measured, key=lambda entry: float(entry["ratio"]))]
        chosen[fraction] = min(pool, key=lambda entry: float(entry["kl_nats"]))["setting"]
    return chosen


def _line(point: CurvePoint, dense: CurvePoint) -> str:
    """Returns one line for people about a finished point."""
    means = summary(point.measurement, dense.measurement)
    budget = "" if point.budget is None else f" budget {point.budget:g}"
    return (
        f"seed {point.seed} {point.kind}{budget}: {means['quality_name']} {means['quality']:.4f}, "
        f"KL {means['kl_nats']:.4f} nat, energy {means['end_to_end']['energy_ratio']:.3f} and "
        f"latency {means['end_to_end']['latency_ratio']:.3f} of dense, kept {means['kept_fraction']:.3f}"
    )
