"""Measurement of a deployed model: the hard path's accuracy, divergence and cost, per example."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.calibration import Calibration
from codesign.experiments.configs import Metric, Scope
from codesign.experiments.data import Part
from codesign.experiments.problem import Problem, chunks, float_logits
from codesign.hw.accelerator import Accelerator
from codesign.hw.surrogate import SCOPES, Cost, cost
from codesign.mechanisms import Mechanism, mechanism_by_name
from codesign.models import vit
from codesign.models.deploy import Deployment, harden
from codesign.policy import Policy, dense_knobs
from codesign.structure import ModelStructure
from codesign.workload import Workload

HARD_CHUNK = 128
"""Examples per call of the compiled hard path."""
DENSE_LINEAR_BITS, DENSE_ATTENTION_BITS = 8.0, 16.0
"""What "dense" means: 8-bit linear layers, 16-bit attention, no mechanism, on the same machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A model that can be deployed: parameters, policy and static ranges."""

    params: dict[str, Any]
    policy: Policy
    calibration: Calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the hard path did on N examples.

    Attributes:
      correct: Whether the prediction was the label, bool `[N]`.
      kl_nats: Divergence of the outputs from those of the dense float model, `[N]`.
      costs: `costs[scope][metric]` per example, `[N]`: energy in pJ, latency in cycles.
      kept: Kept fraction of pairs after each round, by layer and head, `[L, H, R]`; R is 1 without a filter.
    """

    correct: NDArray[np.bool_]
    kl_nats: NDArray[np.float64]
    costs: dict[Scope, dict[Metric, NDArray[np.float64]]]
    kept: NDArray[np.float64]

    def mean_cost(self, metric: Metric, scope: Scope) -> float:
        """Returns the mean cost per example, pJ or cycles."""
        return float(np.mean(self.costs[scope][metric]))


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns the kept fraction after each round, mean over the batch, `[L, H, R]`."""
    exps = workload.operations["softmax.exp"].count
    counts = []
    for index in range(1, sum(name.endswith(".statistic") for name in workload.operations)):
        counts.append(workload.operations[f"filter{index}.statistic"].count)
    counts.append(exps)
    if "filter0.statistic" in workload.operations:
        pairs = workload.operations["filter0.statistic"].count
    else:
        pairs = exps
    return jnp.stack([jnp.mean(count / pairs, axis=0) for count in counts], axis=-1)


def metrics_of(price: Cost, scope: Scope) -> dict[Metric, jax.Array]:
    """Returns energy in pJ and latency in cycles of each example, `[B]`."""
    return {"energy": price.energy_pj(scope), "latency": price.latency_cycles(scope)}


@functools.partial(jax.jit, static_argnames=("structure", "mechanism"))
def _hard_step(
    layers: dict[str, jax.Array],
    ends: dict[str, jax.Array],
    pixels: jax.Array,
    accelerator: Accelerator,
    structure: ModelStructure,
    mechanism: Mechanism,
) -> tuple[jax.Array, dict[Scope, dict[Metric, jax.Array]], jax.Array]:
    output = vit.apply_hard(layers, ends, pixels, structure=structure, mechanism=mechanism)
    price = cost(output.workload, accelerator)
    costs = {scope: metrics_of(price, scope) for scope in SCOPES}
    return output.logits, costs, kept_fractions(output.workload)


def divergence(teacher: NDArray[np.floating], logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns KL(teacher || model) of each example, nats, `[N]`.

    Args:
      teacher: Logits of the dense model, `[N, classes]`.
      logits: Logits of the model, `[N, classes]`.
    """

    def log_softmax(values: NDArray[np.floating]) -> NDArray[np.float64]:
        wide = np.asarray(values, np.float64)
        centred = wide - wide.max(axis=-1, keepdims=True)
        result: NDArray[np.float64] = centred - np.log(
            np.sum(np.exp(centred), axis=-1, keepdims=True)
        )
        return result

    p, q = log_softmax(teacher), log_softmax(logits)
    result: NDArray[np.float64] = np.sum(np.exp(p) * (p - q), axis=-1)
    return result


def deployment(problem: Problem, point: Point, *, mechanism: Mechanism | None = None) -> Deployment:
    """Returns the integers of a point."""
    return harden(
        point.params,
        point.policy,
        point.calibration,
        problem.config,
        mechanism or problem.mechanism,
    )


def hard_run(
    deployed: Deployment, pixels: NDArray[np.int32], accelerator: Accelerator
) -> tuple[
    NDArray[np.float64], dict[Scope, dict[Metric, NDArray[np.float64]]], NDArray[np.float64]
]:
    """Returns real logits `[N, classes]`, costs per example and kept fractions `[L, H, R]` of the hard path."""
    mechanism = mechanism_by_name(deployed.structure.mechanism)
    layers, ends = deployed.hard_arrays()
    logits, costs, kept, lengths = [], [], [], []
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda size: np.asarray(size, np.float64), accelerator)
        for part, length in chunks(pixels, min(HARD_CHUNK, len(pixels))):
            result = _hard_step(
                layers, ends, part, wide, structure=deployed.structure, mechanism=mechanism
            )
            part_logits, part_costs, part_kept = jax.tree.map(np.asarray, result)
            logits.append(part_logits[:length])
            costs.append(jax.tree.map(lambda value, n=length: value[:n], part_costs))
            kept.append(part_kept)
            lengths.append(length)
    real = np.concatenate(logits) * (deployed.logit_scale / deployed.structure.num_tokens)
    merged = jax.tree.map(lambda *values: np.concatenate(values), *costs)
    return real, merged, np.average(kept, axis=0, weights=lengths)


def measure(
    problem: Problem,
    point: Point,
    part: Part,
    *,
    mechanism: Mechanism | None = None,
    num_examples: int | None = None,
) -> Measurement:
    """Returns the measurement of a point on the validation or test part.

    Args:
      problem: Data, teacher and machine.
      point: What is deployed.
      part: The part of the data.
      mechanism: Another mechanism than the problem's, e.g. `dense`.
      num_examples: Only the first of the part; None: all.
    """
    examples = problem.task.parts[part].first(num_examples)
    deployed = deployment(problem, point, mechanism=mechanism)
    logits, costs, kept = hard_run(deployed, examples.pixels, problem.accelerator)
    return Measurement(
        correct=np.argmax(logits, axis=-1) == examples.labels,
        kl_nats=divergence(float_logits(problem.params, examples.pixels, problem.config), logits),
        costs=costs,
        kept=kept,
    )


def dense_point(problem: Problem, calibration: Calibration) -> Point:
    """Returns the dense reference: no mechanism, 8-bit linear layers, 16-bit attention."""
    return Point(
        params=problem.params,
        policy=dense_knobs(
            problem.config.structure.num_layers,
            linear_bits=DENSE_LINEAR_BITS,
            attention_bits=DENSE_ATTENTION_BITS,
        ),
        calibration=calibration,
    )


def summary(measurement: Measurement, dense: Measurement) -> dict[str, Any]:
    """Returns means for people and files: quality, kept fraction, and cost with its ratio to dense."""
    result: dict[str, Any] = {
        "num_examples": len(measurement.correct),
        "accuracy": float(np.mean(measurement.correct)),
        "kl_nats": float(np.mean(measurement.kl_nats)),
        "kept": np.mean(measurement.kept, axis=(0, 1)).tolist(),
    }
    for scope in SCOPES:
        result[scope] = {
            "energy_pj": measurement.mean_cost("energy", scope),
            "latency_cycles": measurement.mean_cost("latency", scope),
            "energy_ratio": measurement.mean_cost("energy", scope)
            / dense.mean_cost("energy", scope),
            "latency_ratio": measurement.mean_cost("latency", scope)
            / dense.mean_cost("latency", scope),
        }
    return result
