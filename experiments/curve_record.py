"""The JSON of a curve: its points, means over seeds with their intervals, and comparisons."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign.experiments.comparison import bootstrap, cost_at_equal_kl, mixture_at
from codesign.experiments.configs import BudgetMetric, Scope
from codesign.experiments.curve_settings import CurveSettings
from codesign.experiments.data import QualityName
from codesign.experiments.evaluate import Measurement, summary

SCHEMA_VERSION = 3
BETTER: dict[QualityName, float] = {"accuracy": 1.0, "bits_per_token": -1.0}
"""Sign that makes a larger quality the better one."""


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """One measured point: its place, its setting if uniform, and what the hard path did on each example."""

    kind: str
    seed: int
    budget: float | None
    setting: dict[str, Any]
    measurement: Measurement


def curve_record(
    config: dict[str, Any], points: list[CurvePoint], settings: CurveSettings
) -> dict[str, Any]:
    """Returns the JSON of a curve but its machine and task: points per seed, means with intervals, and comparisons."""
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

    def equal_cost(baseline: str, fraction: float) -> dict[str, Any] | None:
        """Returns the gains of the trained curve at the measured cost of a baseline's point; None where it has none."""
        gains: dict[str, list[NDArray[np.float64]]] = {"quality": [], "kl_nats": []}
        for point in points:
            if (point.kind, point.budget) != (baseline, fraction):
                continue
            own = [
                p.measurement
                for p in points
                if p.seed == point.seed and p.kind in ("dense", "trained")
            ]
            costs = [m.mean_cost(settings.metric, settings.scope) for m in own]
            wanted = point.measurement.mean_cost(settings.metric, settings.scope)
            for field, found in gains.items():
                mixed = mixture_at(costs, [getattr(m, field) for m in own], wanted)
                if mixed is None:
                    return None
                found.append(mixed - np.asarray(getattr(point.measurement, field), np.float64))
        return {
            "quality_gain": interval(better * np.mean(gains["quality"], axis=0)),
            "kl_nats_gain": interval(-np.mean(gains["kl_nats"], axis=0)),
        }

    name = points[0].measurement.quality_name
    better = BETTER[name]
    means = []
    for kind in kinds:
        for fraction in [None] if kind == "dense" else settings.budgets:
            group = of(kind, fraction)
            entry: dict[str, Any] = {
                "kind": kind,
                "budget": fraction,
                "quality": interval(stacked(kind, fraction, "quality")),
                "kl_nats": interval(stacked(kind, fraction, "kl_nats")),
                "quality_by_seed": [float(np.mean(m.quality)) for m in group],
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
                    "quality_gain": interval(
                        better
                        * (
                            stacked("trained", fraction, "quality")
                            - stacked(baseline, fraction, "quality")
                        )
                    ),
                    "kl_nats_gain": interval(
                        stacked(baseline, fraction, "kl_nats")
                        - stacked("trained", fraction, "kl_nats")
                    ),
                    "equal_cost": equal_cost(baseline, fraction),
                }
            )
    return {
        "schema_version": SCHEMA_VERSION,
        "metric": settings.metric,
        "scope": settings.scope,
        "part": config["part"],
        "quality_name": name,
        "num_examples": len(points[0].measurement.quality),
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

    def mean(measurements: list[Measurement], metric: BudgetMetric) -> float:
        return float(np.mean([one.mean_cost(metric, scope) for one in measurements]))

    energy_pj, latency_cycles = mean(group, "energy"), mean(group, "latency")
    return {
        "energy_pj": energy_pj,
        "energy_ratio": energy_pj / mean(dense, "energy"),
        "latency_cycles": latency_cycles,
        "latency_ratio": latency_cycles / mean(dense, "latency"),
        "edp_pj_cycles": mean(group, "edp"),
    }


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
