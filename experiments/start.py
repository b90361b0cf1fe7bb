"""Where training starts, and what a point's hard path does on the calibration examples."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.calibration import Calibration
from codesign.experiments.configs import Metric, Scope
from codesign.experiments.evaluate import (
    Point,
    deployment,
    divergence,
    hard_chunks,
    machine_of,
)
from codesign.experiments.problem import Problem
from codesign.experiments.teacher import calibrate, own_ranges
from codesign.hw.surrogate import SCOPES
from codesign.policy import Policy, dense_knobs

BISECTIONS = 6
"""Halvings of the interval of alpha, 2, when start thresholds are sought: 1/32."""


def start_policy(problem: Problem, *, linear_bits: float, attention_bits: float) -> Policy:
    """Returns start widths and the mechanism's own start knobs, all layers alike."""
    structure = problem.config.structure
    policy = dense_knobs(
        structure.num_layers,
        linear_bits=linear_bits,
        attention_bits=attention_bits,
        end_sites=structure.end_sites,
    )
    own = problem.mechanism.knobs(structure.num_layers, structure.num_heads)
    return Policy(layers=policy.layers | own, ends=policy.ends)


def with_threshold(policy: Policy, threshold: NDArray[np.float64]) -> Policy:
    """Returns the policy with another knob `threshold`."""
    value = jnp.asarray(threshold, jnp.float32)
    return policy.replace(layers=policy.layers | {"threshold": value})  # type: ignore[attr-defined,no-any-return]


def ranges_of(calibration: Calibration) -> dict[str, NDArray[np.float64]]:
    """Returns the calibrated ranges of the layers, `[L]` each."""
    return {name: np.asarray(value, np.float64) for name, value in calibration.layers.items()}


def measured_ranges(problem: Problem, params: dict[str, Any]) -> Calibration:
    """Returns the static ranges of given weights on the calibration examples."""
    calibration = calibrate(params, problem.calibration_examples, problem.config, problem.buckets)
    if not problem.mechanism.own_ranges:
        return calibration
    policy = start_policy(problem, linear_bits=8.0, attention_bits=16.0)
    return own_ranges(
        params,
        policy,
        calibration,
        problem.mechanism,
        problem.calibration_examples,
        problem.config,
        problem.buckets,
    )


def start_point(problem: Problem) -> Point:
    """Returns where training starts: the dense weights, off-integer widths, thresholds at quantiles.

    Each threshold is found by bisection of its strength on the hard path, so that the kept fractions on the calibration
    examples are `start_kept`: entry by entry where one depends on those before it, else all at once. Where even the
    strongest keeps more (scores of a first plane may all be equal), the strength says nothing about what it will drop once
    weights move: such a threshold starts at the mechanism's own value.
    """
    experiment, scale = problem.experiment, problem.mechanism.thresholds
    policy = start_policy(
        problem,
        linear_bits=experiment.start_linear_bits,
        attention_bits=experiment.start_attention_bits,
    )
    calibration = measured_ranges(problem, problem.params)
    point = Point(params=problem.params, policy=policy, calibration=calibration)
    if scale is None:
        return point
    ranges = ranges_of(calibration)
    own = scale.to_strength(np.asarray(policy.layers["threshold"], np.float64), ranges)
    strength = np.full(own.shape, 0.25)
    targets = np.asarray(experiment.start_kept or scale.start_kept)
    entries = np.arange(len(targets))
    for chosen in [entries[index, None] for index in entries] if scale.in_order else [entries]:
        low, high = np.zeros_like(strength[..., chosen]), np.ones_like(strength[..., chosen])
        for _ in range(BISECTIONS):
            strength[..., chosen] = (low + high) / 2.0
            tried = with_threshold(policy, scale.from_strength(strength, ranges))
            kept = calibration_run(problem, with_policy(point, tried)).kept
            keeps_more = kept[..., chosen] > targets[chosen]
            low = np.where(keeps_more, strength[..., chosen], low)
            high = np.where(keeps_more, high, strength[..., chosen])
        strength[..., chosen] = np.where(high < 1.0, strength[..., chosen], own[..., chosen])
    return with_policy(point, with_threshold(policy, scale.from_strength(strength, ranges)))


def with_policy(point: Point, policy: Policy) -> Point:
    """Returns the point with another policy."""
    return dataclasses.replace(point, policy=policy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationRun:
    """Means of a point's hard path over the calibration examples.

    `costs[scope][metric]` in pJ and cycles, kept fractions `kept` `[L, ...]`, `kl_nats` from the dense float model.
    """

    costs: dict[Scope, dict[Metric, float]]
    kept: NDArray[np.float64]
    kl_nats: float


def calibration_run(problem: Problem, point: Point) -> CalibrationRun:
    """Returns what a point's hard path does on the calibration examples."""
    chunked = list(
        hard_chunks(
            deployment(problem, point),
            problem.calibration_examples,
            machine_of(problem, point),
            problem.buckets,
            mechanism=problem.mechanism,
        )
    )
    costs: dict[Scope, dict[Metric, float]] = {
        scope: {
            metric: float(np.mean(np.concatenate([one.costs[scope][metric] for one in chunked])))
            for metric in chunked[0].costs[scope]
        }
        for scope in SCOPES
    }
    divergences = [
        divergence(
            problem.teacher.part_logits("train", one.indices, one.inputs),
            one.logits,
            one.inputs.get("valid"),
        )
        for one in chunked
    ]
    kept = np.average(
        [one.kept for one in chunked], axis=0, weights=[len(one.indices) for one in chunked]
    )
    return CalibrationRun(
        costs=costs, kept=kept, kl_nats=float(np.mean(np.concatenate(divergences)))
    )
