"""Measurement of a deployed model: the hard path's quality, divergence and cost, per example."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.calibration import Calibration
from codesign.experiments.batches import Inputs, chunks
from codesign.experiments.configs import BudgetMetric, Metric, Scope, with_edp
from codesign.experiments.data import Examples, Part, QualityName
from codesign.experiments.problem import Problem
from codesign.experiments.teacher import sized
from codesign.hw.accelerator import Accelerator
from codesign.hw.sizing import with_sizes
from codesign.hw.surrogate import SCOPES, Cost, cost
from codesign.mechanisms import Mechanism, mechanism_by_name
from codesign.models.deploy import Deployment, harden
from codesign.models.model import apply_hard
from codesign.policy import Policy, dense_knobs
from codesign.references import tensor_shapes
from codesign.structure import ModelStructure
from codesign.workload import Workload, all_macs, attention_macs

HARD_CHUNK = 128
"""Most examples per call of the compiled hard path."""
HARD_PAIRS = 2**22
"""Most query-key pairs of all heads and examples of a call: an array of them takes 32 MiB in float64."""
DENSE_LINEAR_BITS, DENSE_ATTENTION_BITS = 8.0, 16.0
"""What "dense" means: 8-bit linear layers, 16-bit attention, no mechanism, on the same machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A model that can be deployed: parameters, policy and static ranges, and sizes of the machine where they are trained.

    `sizes` are scalars by name, as in `Accelerator.sizes`; empty: the machine is that of the problem.
    """

    params: dict[str, Any]
    policy: Policy
    calibration: Calibration
    sizes: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Priced:
    """What a machine takes for what the hard path did on N examples.

    Attributes:
      costs: `costs[scope][metric]` per example, `[N]`: energy in pJ, latency in cycles.
      bandwidth_cycles: `-d latency / d log(bandwidth)` by scope, cycles, `[N]`: the part of the latency that falls in
        proportion to the bandwidth of main memory.
      moved_bytes: Through main memory by scope, byte, `[N]`.
    """

    costs: dict[Scope, dict[Metric, NDArray[np.float64]]]
    bandwidth_cycles: dict[Scope, NDArray[np.float64]]
    moved_bytes: dict[Scope, NDArray[np.float64]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the hard path did on N examples.

    Attributes:
      quality_name: What `quality` is.
      quality: 1 where the prediction was the label, else 0; or the bits per token of a decoder, `[N]`.
      kl_nats: Divergence of the outputs from those of the dense float model, per token of a decoder, `[N]`.
      costs: `costs[scope][metric]` per example, `[N]`: energy in pJ, latency in cycles.
      kept: Kept fractions by entry of the mechanism's thresholds, `[L, ...]`; `[L, 1]` ones if it has none.
      macs: Multiplications of exact attention, and of it and the dense products, by scope, `[N]`; predictions apart.
      kept_pairs: Those of them that are fractions of pairs; None: all.
      operations: Operations of the attention engine by `stage.kind`, means per example.
      machines: The same decisions on other machines, by name.
    """

    quality_name: QualityName
    quality: NDArray[np.float64]
    kl_nats: NDArray[np.float64]
    costs: dict[Scope, dict[Metric, NDArray[np.float64]]]
    kept: NDArray[np.float64]
    kept_pairs: NDArray[np.float64] | None = None
    macs: dict[Scope, NDArray[np.float64]] = dataclasses.field(default_factory=dict)
    operations: dict[str, float] = dataclasses.field(default_factory=dict)
    machines: dict[str, Priced] = dataclasses.field(default_factory=dict)

    def kept_fraction(self) -> float:
        """Returns the mean kept fraction: of pairs, where the mechanism keeps pairs."""
        return float(np.mean(self.kept if self.kept_pairs is None else self.kept_pairs))

    def mean_cost(self, metric: BudgetMetric, scope: Scope) -> float:
        """Returns the mean cost per example, pJ or cycles, or the product of both means."""
        means = {name: float(np.mean(values)) for name, values in self.costs[scope].items()}
        return float(with_edp(means)[metric])


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardChunk:
    """What the hard path did on one chunk of n examples.

    Attributes:
      inputs: The examples, `[n, ...]`.
      indices: Their places in the data, `[n]`.
      logits: Real logits, `[n, C]` or `[n, T, C]`.
      costs: As in `Measurement`, `[n]`.
      macs: As in `Measurement`, `[n]`.
      kept: As in `Measurement`.
      counts: Operations of the attention engine by `stage.kind`, heads summed, `[n, L]`.
      densities: Fraction of non-zero elements by site, `[n, L]` or `[1, L]`, if the mechanism counts it.
      tensors: Every tensor that docs/integer_path.md names, if asked for, with all its axes.
      machines: Costs on other machines, by name, as fields of `Priced`, `[n]`.
    """

    inputs: Inputs
    indices: NDArray[np.int64]
    logits: NDArray[np.float64]
    costs: dict[Scope, dict[Metric, NDArray[np.float64]]]
    macs: dict[Scope, NDArray[np.float64]]
    kept: NDArray[np.float64]
    counts: dict[str, NDArray[np.float64]]
    densities: dict[str, NDArray[np.float64]]
    tensors: dict[str, NDArray[Any]]
    machines: dict[str, dict[str, Any]]


def metrics_of(price: Cost, scope: Scope) -> dict[Metric, jax.Array]:
    """Returns energy in pJ and latency in cycles of each example, `[B]`."""
    return {"energy": price.energy_pj(scope), "latency": price.latency_cycles(scope)}


def costs_of(workload: Workload, accelerator: Accelerator) -> dict[Scope, dict[Metric, jax.Array]]:
    """Returns `costs[scope][metric]` of each example, `[B]`."""
    price = cost(workload, accelerator)
    return {scope: metrics_of(price, scope) for scope in SCOPES}


def priced_fully(workload: Workload, accelerator: Accelerator) -> dict[str, Any]:
    """Returns the fields of `Priced` of each example, `[B]`."""
    rate = "dram.bytes_per_cycle"
    price = cost(workload, accelerator)
    shares, moved = {}, {}
    for scope in SCOPES:

        def latency(bytes_per_cycle: jax.Array, scope: Scope = scope) -> jax.Array:
            sizes = accelerator.sizes | {rate: bytes_per_cycle}
            other = accelerator.replace(sizes=sizes)  # type: ignore[attr-defined]
            return cost(workload, other).latency_cycles(scope)

        own = jnp.asarray(accelerator.sizes[rate])
        shares[scope] = -jax.jvp(latency, (own,), (own,))[1]
        energy = price.energy_by_unit(scope)
        spent = sum(energy[name] for name in ("dram", "host.dram") if name in energy)
        moved[scope] = spent / accelerator.structure.dram_pj_per_byte
    costs = {scope: metrics_of(price, scope) for scope in SCOPES}
    return {"costs": costs, "bandwidth_cycles": shares, "moved_bytes": moved}


@functools.partial(jax.jit, static_argnames=("structure", "mechanism", "tracing"))
def _hard_step(
    layers: dict[str, jax.Array],
    ends: dict[str, jax.Array],
    inputs: dict[str, jax.Array],
    accelerator: Accelerator,
    machines: dict[str, Accelerator],
    structure: ModelStructure,
    mechanism: Mechanism,
    tracing: bool,
) -> dict[str, Any]:
    output = apply_hard(
        layers, ends, inputs, structure=structure, mechanism=mechanism, tracing=tracing
    )
    operations = output.workload.operations
    scale = mechanism.thresholds
    kept = jnp.ones((structure.num_layers, 1)) if scale is None else scale.kept(output.workload)
    return {
        "logits": output.logits,
        "num_pooled": output.num_pooled,
        "costs": costs_of(output.workload, accelerator),
        "macs": {
            "attention": attention_macs(output.workload),
            "end_to_end": all_macs(output.workload),
        },
        "kept": kept,
        "densities": output.workload.densities,
        "counts": {key: jnp.sum(value.count, axis=2) for key, value in operations.items()},
        "tensors": output.trace,
        "machines": {name: priced_fully(output.workload, one) for name, one in machines.items()},
    }


def hard_chunks(
    deployed: Deployment,
    examples: Examples,
    accelerator: Accelerator,
    buckets: tuple[int, ...],
    *,
    mechanism: Mechanism | None = None,
    tracing: bool = False,
    most: int = HARD_CHUNK,
    machines: Mapping[str, Accelerator] | None = None,
) -> Iterator[HardChunk]:
    """Runs the hard path on examples, chunk by chunk, those of similar length together.

    Args:
      deployed: The integers.
      examples: Data; their labels are not looked at.
      accelerator: The machine.
      buckets: Lengths to which token sequences are padded.
      mechanism: Whose hooks run; None: that of the deployment's name.
      tracing: Whether to return tensors.
      most: Most examples of a chunk.
      machines: Other machines that price the same decisions, by name.
    """
    structure = deployed.structure
    mechanism = mechanism or mechanism_by_name(structure.mechanism)
    with jax.enable_x64(True):
        layers, ends = jax.device_put(deployed.hard_arrays())

    def size(num_tokens: int) -> int:
        fitting = HARD_PAIRS // (structure.num_heads * num_tokens**2)
        return max(1, min(most, fitting, len(examples)))

    for inputs, indices in chunks(examples, sized(structure, size), buckets):
        with jax.enable_x64(True):
            wide, others = jax.tree.map(
                lambda leaf: np.asarray(leaf, np.float64), (accelerator, dict(machines or {}))
            )
            found = _hard_step(
                layers,
                ends,
                inputs,
                wide,
                others,
                structure=structure,
                mechanism=mechanism,
                tracing=tracing,
            )
        found = jax.tree.map(np.asarray, found)
        first = slice(len(indices))
        exists = {name: values[first] for name, values in inputs.items()}
        yield HardChunk(
            inputs=exists,
            indices=indices,
            logits=deployed.real_logits(found["logits"][first], found["num_pooled"][first]),
            costs=jax.tree.map(lambda values, first=first: values[first], found["costs"]),
            macs={scope: values[first] for scope, values in found["macs"].items()},
            kept=found["kept"],
            counts={name: values[first] for name, values in found["counts"].items()},
            densities={name: values[first] for name, values in found["densities"].items()},
            tensors={
                name: values[(slice(None),) * _batch_axis(name, deployed) + (first,)]
                for name, values in found["tensors"].items()
            },
            machines=jax.tree.map(
                lambda values, inputs=inputs, first=first: np.broadcast_to(
                    values, len(next(iter(inputs.values())))
                )[first],
                found["machines"],
            ),
        )


def _batch_axis(name: str, deployed: Deployment) -> int:
    """Returns the axis of the examples in a tensor of the integer path."""
    examples = 2**31  # unlike any other size
    return tensor_shapes(deployed.structure, examples, 1)[name].index(examples)


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns natural logarithms of probabilities over the last axis, in float64."""
    wide = np.asarray(logits, np.float64)
    centred = wide - wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = centred - np.log(np.sum(np.exp(centred), axis=-1, keepdims=True))
    return result


def _mean_over_tokens(
    values: NDArray[np.float64], valid: NDArray[Any] | None
) -> NDArray[np.float64]:
    """Returns values `[N]` as they are, values `[N, T]` averaged over tokens that exist."""
    if values.ndim == 1:
        return values
    exists = np.ones(values.shape) if valid is None else np.asarray(valid, np.float64)
    mean: NDArray[np.float64] = np.sum(values * exists, axis=1) / np.sum(exists, axis=1)
    return mean


def divergence(
    teacher: NDArray[np.floating],
    logits: NDArray[np.floating],
    valid: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Returns KL(teacher || model) of each example, nats, `[N]`; of a decoder the mean over tokens.

    Args:
      teacher: Logits of the dense model, `[N, C]` or `[N, T, C]`.
      logits: Logits of the model, same shape.
      valid: Tokens that exist, `[N, T]`; None: all.
    """
    p, q = log_softmax(teacher), log_softmax(logits)
    return _mean_over_tokens(np.sum(np.exp(p) * (p - q), axis=-1), valid)


def quality(
    logits: NDArray[np.floating], labels: NDArray[np.integer], valid: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """Returns the quality of each example, `[N]`.

    Args:
      logits: `[N, C]`, or `[N, T, C]` of a decoder.
      labels: Classes `[N]`, or next tokens `[N, T]`.
      valid: Tokens that exist, `[N, T]`; None: all.

    Returns:
      1 where the class is right, else 0; of a decoder the mean bits per token.
    """
    if labels.ndim == 1:
        return np.asarray(np.argmax(logits, axis=-1) == labels, np.float64)
    nats = -np.take_along_axis(log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return _mean_over_tokens(nats / np.log(2.0), valid)


def machine_of(problem: Problem, point: Point) -> Accelerator:
    """Returns the machine of a point: the problem's, with its own sizes where they are trained."""
    return with_sizes(problem.accelerator, point.sizes)


def deployment(problem: Problem, point: Point, *, mechanism: Mechanism | None = None) -> Deployment:
    """Returns the integers of a point."""
    return harden(
        point.params,
        point.policy,
        point.calibration,
        problem.config,
        mechanism or problem.mechanism,
    )


def measure(
    problem: Problem,
    point: Point,
    part: Part,
    *,
    mechanism: Mechanism | None = None,
    num_examples: int | None = None,
    machines: Mapping[str, Accelerator] | None = None,
) -> Measurement:
    """Returns the measurement of a point on the validation or test part.

    Args:
      problem: Data, teacher and machine.
      point: What is deployed.
      part: The part of the data.
      mechanism: Another mechanism than the problem's, e.g. `dense`.
      num_examples: Only the first of the part; None: all.
      machines: Other machines that price the same decisions, by name.
    """
    examples = problem.task.part(part).first(num_examples)
    deployed = deployment(problem, point, mechanism=mechanism)
    qualities, divergences = np.zeros(len(examples)), np.zeros(len(examples))
    costs: dict[Scope, dict[Metric, NDArray[np.float64]]] = {
        scope: {"energy": np.zeros(len(examples)), "latency": np.zeros(len(examples))}
        for scope in SCOPES
    }
    macs = {scope: np.zeros(len(examples)) for scope in SCOPES}
    kept, lengths = [], []
    operations: dict[str, float] = {}
    others: dict[str, Any] = {}
    hooks = mechanism or problem.mechanism
    for chunk in hard_chunks(
        deployed,
        examples,
        machine_of(problem, point),
        problem.buckets,
        mechanism=hooks,
        machines=machines,
    ):
        where, valid = chunk.indices, chunk.inputs.get("valid")
        labels = examples.labels[where]
        if labels.ndim == 2:
            labels = labels[:, : chunk.logits.shape[1]]
        teacher = problem.teacher.part_logits(part, where, chunk.inputs)
        qualities[where] = quality(chunk.logits, labels, valid)
        divergences[where] = divergence(teacher, chunk.logits, valid)
        for scope in SCOPES:
            for metric, values in chunk.costs[scope].items():
                costs[scope][metric][where] = values
            macs[scope][where] = chunk.macs[scope]
        for name, count in chunk.counts.items():
            operations[name] = operations.get(name, 0.0) + float(np.sum(count)) / len(examples)
        others = others or jax.tree.map(lambda _: np.zeros(len(examples)), chunk.machines)
        for total, values in zip(*map(jax.tree.leaves, (others, chunk.machines)), strict=True):
            total[where] = values
        kept.append(chunk.kept)
        lengths.append(len(where))
    scale, fractions = hooks.thresholds, np.average(kept, axis=0, weights=lengths)
    return Measurement(
        quality_name=problem.task.quality_name,
        quality=qualities,
        kl_nats=divergences,
        costs=costs,
        kept=fractions,
        kept_pairs=None if scale is None else scale.of_pairs(fractions),
        macs=macs,
        operations=operations,
        machines={name: Priced(**fields) for name, fields in others.items()},
    )


def dense_point(problem: Problem, calibration: Calibration) -> Point:
    """Returns the dense reference: no mechanism, 8-bit linear layers, 16-bit attention."""
    structure = problem.config.structure
    return Point(
        params=problem.params,
        policy=dense_knobs(
            structure.num_layers,
            linear_bits=DENSE_LINEAR_BITS,
            attention_bits=DENSE_ATTENTION_BITS,
            end_sites=structure.end_sites,
        ),
        calibration=calibration,
    )


def summary(measurement: Measurement, dense: Measurement) -> dict[str, Any]:
    """Returns means for people and files: quality, kept fraction, and cost with its ratio to dense."""
    result: dict[str, Any] = {
        "num_examples": len(measurement.quality),
        "quality_name": measurement.quality_name,
        "quality": float(np.mean(measurement.quality)),
        "kl_nats": float(np.mean(measurement.kl_nats)),
        "kept": np.mean(measurement.kept, axis=tuple(range(measurement.kept.ndim - 1))).tolist(),
        "kept_fraction": measurement.kept_fraction(),
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
        if measurement.macs and dense.macs:
            result[scope]["macs"] = float(np.mean(measurement.macs[scope]))
            result[scope]["mac_ratio"] = result[scope]["macs"] / float(np.mean(dense.macs[scope]))
    return result
