"""Accuracy-cost curves: trained policies against uniform settings, untrained and fine-tuned alike, by budget."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.experiments.comparison import bootstrap, cost_at_equal_kl
from codesign.experiments.configs import Budget, Experiment, Metric, Scope
from codesign.experiments.data import Part
from codesign.experiments.evaluate import (
    Measurement,
    Point,
    dense_point,
    measure,
    summary,
)
from codesign.experiments.figure import draw_curve
from codesign.experiments.problem import Problem, calibrate, load_problem
from codesign.experiments.run import RunDirectory, write_json
from codesign.experiments.train import (
    BudgetedTraining,
    check_reachable,
    start_point,
    start_policy,
    with_alpha,
)
from codesign.mechanisms import mechanism_by_name
from codesign.optimize import Group
from codesign.policy import Policy

CURVE_FILE = "curve.json"
FIGURE_FILE = "curve.png"
SCHEMA_VERSION = 1

TRAINED_KINDS: dict[str, tuple[Group, ...]] = {
    "trained": ("params", "thresholds", "bits", "clips"),
    "uniform_tuned": ("params", "clips"),
    "bits_only": ("params", "bits", "clips"),
    "thresholds_only": ("params", "thresholds", "clips"),
}
"""What each kind of point trains. The ablations start from the uniform setting of their budget."""
OFF = -1.0
"""alpha of a round that keeps all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurveSettings:
    """What a curve holds."""

    # Budgets as fractions of the dense cost, falling; each point starts from the one before.
    budgets: tuple[float, ...] = (0.7, 0.6, 0.5, 0.4, 0.35, 0.3)
    # The cost under the budget, and whether linear layers count.
    metric: Metric = "energy"
    scope: Scope = "end_to_end"
    # Whether to add the two ablations.
    ablations: bool = False
    # The uniform grid: alpha of every round alike for all layers and heads; -1 switches the filter off.
    uniform_alphas: tuple[tuple[float, ...], ...] = ((OFF, OFF), (-0.5, -0.25), (0.0, 0.0))
    # The uniform grid: bits of all weights, all activations, and exact attention.
    uniform_bits: tuple[tuple[int, int, int], ...] = (
        (8, 8, 16),
        (8, 8, 8),
        (6, 6, 12),
        (6, 6, 8),
        (5, 6, 8),
        (5, 5, 8),
        (4, 6, 8),
        (4, 5, 8),
        (4, 4, 8),
        (3, 5, 8),
        (3, 4, 8),
        (3, 3, 8),
        (2, 4, 8),
        (2, 3, 8),
        (2, 2, 8),
    )
    # Validation images on which the uniform setting of each budget is chosen, >= 1.
    num_selection: int = 128
    # Resamples of the bootstrap, >= 1.
    num_resamples: int = 2000

    def budget(self, fraction: float) -> Budget:
        """Returns the budget of one point."""
        if self.metric == "energy":
            return Budget(energy=fraction, scope=self.scope)
        return Budget(latency=fraction, scope=self.scope)


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """One measured point: its place, its setting if uniform, and what the hard path did on each example."""

    kind: str
    seed: int
    budget: float | None
    setting: dict[str, Any]
    measurement: Measurement


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
) -> Path:
    """Trains, measures and draws a curve; returns the path of its JSON file.

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

    Raises:
      RunDirectoryError: If `out` exists and neither flag is given, or it was made with other settings.
      InfeasibleBudgetError: If no legal policy reaches a budget.
    """
    config = {
        "experiment": dataclasses.asdict(experiment),
        "curve": dataclasses.asdict(settings),
        "seeds": list(seeds),
        "part": part,
    }
    RunDirectory.create(out, config, resume=resume, overwrite=overwrite)
    points: list[CurvePoint] = []
    for seed in seeds:
        seeded = dataclasses.replace(experiment, seed=seed)
        problem = load_problem(seeded, cache=cache, progress=progress)
        check_reachable(problem, settings.budget(min(settings.budgets)))
        points += _seed_points(problem, settings, out, part, progress, report)
    record = curve_record(config, points, settings, points_spec=_machine(experiment))
    write_json(out / CURVE_FILE, record)
    draw_curve(record, out / FIGURE_FILE)
    return out / CURVE_FILE


def _machine(experiment: Experiment) -> dict[str, str]:
    return {"preset": experiment.preset, "mechanism": experiment.mechanism, "task": experiment.task}


def _seed_points(
    problem: Problem,
    settings: CurveSettings,
    out: Path,
    part: Part,
    progress: bool,
    report: Callable[[str], None],
) -> list[CurvePoint]:
    """Returns all points of one seed."""
    seed = problem.experiment.seed
    start = start_point(problem)
    dense = CurvePoint(
        "dense",
        seed,
        None,
        {},
        measure(
            problem,
            dense_point(problem, start.calibration),
            part,
            mechanism=mechanism_by_name("dense"),
        ),
    )
    report(_line(dense, dense))
    chosen = _choose_uniform(problem, settings, start, out / "points" / f"seed{seed}-uniform.json")
    points = [dense]
    for fraction in settings.budgets:
        point = _uniform_point(problem, start, chosen[fraction])
        points.append(
            CurvePoint("uniform", seed, fraction, chosen[fraction], measure(problem, point, part))
        )
        report(_line(points[-1], dense))
    kinds = ["trained", "uniform_tuned"]
    if settings.ablations:
        kinds += ["bits_only", "thresholds_only"]
    for kind in kinds:
        metrics: tuple[Metric, ...] = () if kind == "uniform_tuned" else (settings.metric,)
        optimize = dataclasses.replace(problem.experiment.optimize, train=TRAINED_KINDS[kind])
        training = BudgetedTraining(problem, optimize, metrics, settings.scope)
        point = start
        for fraction in settings.budgets:
            if kind != "trained":
                point = _uniform_point(problem, point, chosen[fraction])
            budget = settings.budget(fraction) if metrics else Budget(scope=settings.scope)
            point = _trained_point(training, point, budget, kind, fraction, out, progress)
            measured = measure(problem, point, part)
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
    config = {
        "experiment": dataclasses.asdict(experiment),
        "budget": dataclasses.asdict(budget),
        "mode": "joint",
    }
    run = RunDirectory.create(path, config, resume=path.exists(), overwrite=False)
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


def _uniform_policy(problem: Problem, policy: Policy, setting: dict[str, Any]) -> Policy:
    """Returns one threshold and bit setting for all layers and heads; clips stay those of `policy`."""
    uniform = start_policy(
        problem, linear_bits=1.0 * setting["weight_bits"], attention_bits=setting["attention_bits"]
    )
    layers, ends = dict(uniform.layers), dict(uniform.ends)
    for knobs, own in ((layers, policy.layers), (ends, policy.ends)):
        for name, value in knobs.items():
            if name.endswith(".activation_bits"):
                knobs[name] = jnp.full_like(value, setting["activation_bits"])
            if name.endswith("_clip"):
                knobs[name] = own[name]
    alpha = np.broadcast_to(np.asarray(setting["alpha"]), layers["threshold"].shape)
    return with_alpha(Policy(layers=layers, ends=ends), alpha)


def _uniform_point(problem: Problem, point: Point, setting: dict[str, Any]) -> Point:
    """Returns a point with the weights of `point`, a uniform policy, and ranges measured on those weights."""
    return Point(
        params=point.params,
        policy=_uniform_policy(problem, point.policy, setting),
        calibration=calibrate(point.params, problem.calibration_pixels, problem.config),
    )


def _choose_uniform(
    problem: Problem, settings: CurveSettings, start: Point, path: Path
) -> dict[float, dict[str, Any]]:
    """Returns for each budget the uniform setting of least divergence on the validation part that meets it.

    The grid runs over thresholds and bits at once, on the dense weights without training. It is kept in `path`.
    """
    if path.exists():
        measured: list[dict[str, Any]] = json.loads(path.read_text())
    else:
        dense = BudgetedTraining.dense_costs(problem, settings.scope)[settings.metric]
        measured = []
        for alpha in settings.uniform_alphas:
            for weight_bits, activation_bits, attention_bits in settings.uniform_bits:
                setting = {
                    "alpha": list(alpha),
                    "weight_bits": weight_bits,
                    "activation_bits": activation_bits,
                    "attention_bits": attention_bits,
                }
                result = measure(
                    problem,
                    _uniform_point(problem, start, setting),
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
        f"seed {point.seed} {point.kind}{budget}: accuracy {means['accuracy']:.4f}, "
        f"KL {means['kl_nats']:.4f} nat, energy {means['end_to_end']['energy_ratio']:.3f} and "
        f"latency {means['end_to_end']['latency_ratio']:.3f} of dense, kept {means['kept'][-1]:.3f}"
    )


def curve_record(
    config: dict[str, Any],
    points: list[CurvePoint],
    settings: CurveSettings,
    *,
    points_spec: dict[str, str],
) -> dict[str, Any]:
    """Returns the JSON of a curve: points per seed, means with intervals, and comparisons."""
    seeds = sorted({point.seed for point in points})
    dense = {point.seed: point.measurement for point in points if point.kind == "dense"}
    kinds = list(dict.fromkeys(point.kind for point in points))

    def of(kind: str, fraction: float | None) -> list[Measurement]:
        return [p.measurement for p in points if p.kind == kind and p.budget == fraction]

    def stacked(kind: str, fraction: float | None, field: str) -> NDArray[np.float64]:
        """Returns a per-example figure averaged over seeds, `[N]`."""
        values = np.asarray([getattr(m, field) for m in of(kind, fraction)], np.float64)
        averaged: NDArray[np.float64] = values.mean(axis=0)
        return averaged

    def interval(values: NDArray[np.float64]) -> dict[str, float]:
        return dataclasses.asdict(bootstrap(values, num_resamples=settings.num_resamples))

    means = []
    for kind in kinds:
        for fraction in [None] if kind == "dense" else settings.budgets:
            group = of(kind, fraction)
            entry: dict[str, Any] = {
                "kind": kind,
                "budget": fraction,
                "accuracy": interval(stacked(kind, fraction, "correct")),
                "kl_nats": interval(stacked(kind, fraction, "kl_nats")),
                "accuracy_by_seed": [float(np.mean(m.correct)) for m in group],
                "kl_nats_by_seed": [float(np.mean(m.kl_nats)) for m in group],
            }
            for scope in ("end_to_end", "attention"):
                entry[scope] = _mean_costs(group, [dense[seed] for seed in seeds], scope)
            means.append(entry)
    comparisons = []
    for baseline in [kind for kind in kinds if kind not in ("dense", "trained")]:
        for fraction in settings.budgets:
            comparisons.append(
                {
                    "baseline": baseline,
                    "budget": fraction,
                    "accuracy_gain": interval(
                        stacked("trained", fraction, "correct")
                        - stacked(baseline, fraction, "correct")
                    ),
                    "kl_nats_gain": interval(
                        stacked(baseline, fraction, "kl_nats")
                        - stacked("trained", fraction, "kl_nats")
                    ),
                }
            )
    return {
        "schema_version": SCHEMA_VERSION,
        **points_spec,
        "metric": settings.metric,
        "scope": settings.scope,
        "part": config["part"],
        "num_examples": len(points[0].measurement.correct),
        "seeds": seeds,
        "config": config,
        "points": [
            {
                "kind": p.kind,
                "seed": p.seed,
                "budget": p.budget,
                "setting": p.setting,
                **summary(p.measurement, dense[p.seed]),
            }
            for p in points
        ],
        "means": means,
        "comparisons": comparisons,
        "equal_kl": [
            _equal_kl(points, seeds, baseline, settings)
            for baseline in kinds
            if baseline not in ("dense", "trained")
        ],
    }


def _mean_costs(
    group: list[Measurement], dense: list[Measurement], scope: Scope
) -> dict[str, float]:
    """Returns costs averaged over seeds, and their ratios to dense."""
    result = {}
    for metric, unit in (("energy", "pj"), ("latency", "cycles")):
        name: Metric = "energy" if metric == "energy" else "latency"
        value = float(np.mean([m.mean_cost(name, scope) for m in group]))
        result[f"{metric}_{unit}"] = value
        result[f"{metric}_ratio"] = value / float(
            np.mean([m.mean_cost(name, scope) for m in dense])
        )
    return result


def _equal_kl(
    points: list[CurvePoint], seeds: list[int], baseline: str, settings: CurveSettings
) -> dict[str, Any]:
    """Returns how many times the trained cost a baseline needs at equal divergence, by seed with its spread."""
    ratios = []
    for seed in seeds:

        def front(kind: str, seed: int = seed) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            group = [
                p.measurement
                for p in points
                if p.seed == seed and p.kind == kind and p.budget is not None
            ]
            costs = [m.mean_cost(settings.metric, settings.scope) for m in group]
            return np.asarray(costs), np.asarray([float(np.mean(m.kl_nats)) for m in group])

        ratios.append(cost_at_equal_kl(front(baseline), front("trained")))
    known = [ratio for ratio in ratios if ratio is not None]
    return {
        "baseline": baseline,
        "ratio_by_seed": ratios,
        "ratio": float(np.exp(np.mean(np.log(known)))) if known else None,
        "spread": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }


# Measured on two cores (docs/performance.md), digits: seconds per dense step, per step under a budget, per measured
# setting, and for compiling and loading.
SECONDS_DENSE_STEP = 0.04
SECONDS_STEP = 0.1
SECONDS_SETTING = 0.3
SECONDS_SETUP = 60.0


def estimate_seconds(experiment: Experiment, settings: CurveSettings, *, num_seeds: int) -> float:
    """Returns the expected time of a curve on two cores, from scratch; scaled from digits by tokens times layers."""
    kinds = 4 if settings.ablations else 2
    steps = kinds * len(settings.budgets) * experiment.optimize.num_steps
    grid = len(settings.uniform_alphas) * len(settings.uniform_bits)
    per_seed = (
        experiment.dense.num_steps * SECONDS_DENSE_STEP
        + steps * SECONDS_STEP
        + grid * SECONDS_SETTING
        + SECONDS_SETUP
    )
    return num_seeds * per_seed
