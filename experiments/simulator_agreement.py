"""The cost model against the simulators: trained models, random policies, random sizes of their machines."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.experiments.configs import Experiment, experiment_by_name
from codesign.experiments.evaluate import Point, deployment
from codesign.experiments.prediction_tables import StudyTable
from codesign.experiments.problem import Problem, load_problem
from codesign.experiments.simulated import METRICS, simulated_chunks
from codesign.experiments.start import measured_ranges, ranges_of, start_policy, with_threshold
from codesign.experiments.traced import examples_of
from codesign.hw.accelerator import CLOCK, Accelerator
from codesign.hw.resizing import spec_with_sizes
from codesign.hw.spec import load_preset
from codesign.hw.surrogate import SCOPES
from codesign.policy import Policy, bits_range, group, project

NUM_SIZES, NUM_POLICIES, NUM_EXAMPLES = 8, 25, 2
"""Sizes of a machine, policies on each, and examples of the validation part over which a policy's cost is averaged."""
LANE_FACTORS = (0.25, 0.5, 1.0, 2.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the cost model compares with a simulator; errors are fractions, taus Kendall's.

    `tau` is over all policies and sizes, `least_tau` the lowest at one size, where the costs of the policies differ by the
    fraction `spread` at most: little, and the order says little. `counts_equal`: whether every count of every
    example was the same.
    """

    task: str
    machine: str
    scope: str
    metric: str
    num_points: int
    mean_error: float
    largest_error: float
    bias: float
    tau: float
    least_tau: float
    spread: float
    counts_equal: bool


def random_sizes(problem: Problem, rng: np.random.Generator) -> dict[str, float]:
    """Returns sizes between a quarter and twice the machine's own: lanes by powers of two, the rest by whole numbers."""
    sizes = {}
    for name, value in problem.accelerator.sizes.items():
        own = float(value)
        if name == CLOCK:
            continue  # The simulator's cycles are the machine's own.
        if name.endswith(".lanes") or name == "query_block":
            sizes[name] = max(1.0, np.round(own * rng.choice(LANE_FACTORS)))
        else:
            drawn = own * 2.0 ** rng.uniform(-2.0, 1.0)
            is_rate = name == "dram.bytes_per_cycle"
            sizes[name] = drawn if is_rate else max(1.0, float(np.round(drawn)))
    return sizes


def random_policy(problem: Problem, point: Point, rng: np.random.Generator) -> Policy:
    """Returns widths over their legal ranges and thresholds over their scale; layers and heads lie near one another."""
    policy = start_policy(problem, linear_bits=8.0, attention_bits=16.0)

    def drawn(name: str, value: Any) -> Any:
        if group(name) != "bits":
            return value
        low, high = bits_range(name)
        near = rng.uniform(low, high) + rng.normal(size=value.shape)
        return jnp.asarray(np.sort(near, axis=-1) if near.ndim > 1 else near, value.dtype)

    policy = Policy(
        layers={name: drawn(name, value) for name, value in policy.layers.items()},
        ends={name: drawn(name, value) for name, value in policy.ends.items()},
    )
    scale = problem.mechanism.thresholds
    if scale is not None:
        shape = policy.layers["threshold"].shape
        strength = rng.uniform(0.05, 0.95) + rng.normal(scale=0.15, size=shape)
        ranges = ranges_of(point.calibration)
        policy = with_threshold(policy, scale.from_strength(np.clip(strength, 0.02, 0.98), ranges))
    return project(policy)


def study(
    tasks: Sequence[str],
    machines: Sequence[str],
    *,
    cache: Path,
    progress: bool,
    seed: int = 0,
    num_sizes: int = NUM_SIZES,
    num_policies: int = NUM_POLICIES,
    num_examples: int = NUM_EXAMPLES,
    data: Path | None = None,
) -> Iterator[Agreement]:
    """Yields how cost model and simulator agree, by task, machine, scope and metric.

    Args:
      tasks: Names of experiments, whose dense models are trained or in the cache.
      machines: Names of presets.
      cache: Folder of the dense models.
      progress: Whether to show progress bars of the training.
      seed: Seed of the training and of the draws.
      num_sizes: Random sizes of each machine.
      num_policies: Random policies at each size.
      num_examples: Examples over which the cost of a policy is averaged.
      data: Folder of the data of the only task; None: where it is by default.
    """
    for task in tasks:
        for machine in machines:
            experiment = experiment_on(machine, task, seed, data)
            problem = load_problem(experiment, cache=cache, progress=progress)
            yield from agreements(problem, num_sizes, num_policies, num_examples)


def experiment_on(machine: str, task: str, seed: int, data: Path | None) -> Experiment:
    """Returns a task with a preset and the mechanism that it was made for."""
    named = experiment_by_name(task)
    return dataclasses.replace(
        named,
        mechanism=load_preset(machine).mechanism,
        preset=machine,
        seed=seed,
        data=dataclasses.replace(named.data, data=data),
    )


def agreements(
    problem: Problem, num_sizes: int, num_policies: int, num_examples: int
) -> list[Agreement]:
    """Returns how they agree on one model and machine; draws depend on the experiment's seed alone."""
    rng = np.random.default_rng(problem.experiment.seed)
    start = Point(
        params=problem.params,
        policy=start_policy(problem, linear_bits=8.0, attention_bits=16.0),
        calibration=measured_ranges(problem, problem.params),
    )
    costs: dict[tuple[str, str], list[list[tuple[float, float]]]] = {}
    are_equal = True
    for _ in range(num_sizes):
        sizes = random_sizes(problem, rng)
        at_size: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(num_policies):
            policy = random_policy(problem, start, rng)
            found, equal = _both(
                problem, dataclasses.replace(start, policy=policy), sizes, num_examples
            )
            are_equal &= equal
            for key, pair in found.items():
                at_size.setdefault(key, []).append(pair)
        for key, pairs in at_size.items():
            costs.setdefault(key, []).append(pairs)
    return [
        _agreement(problem, scope, metric, np.asarray(pairs), are_equal)
        for (scope, metric), pairs in costs.items()
    ]


def _both(
    problem: Problem, point: Point, sizes: dict[str, float], num_examples: int
) -> tuple[dict[tuple[str, str], tuple[float, float]], bool]:
    """Returns `(simulator, cost model)` by scope and metric, and whether all counts are equal."""
    machine = problem.accelerator
    typed = machine.sizes | {
        name: jnp.asarray(value, machine.sizes[name].dtype) for name, value in sizes.items()
    }
    resized: Accelerator = machine.replace(sizes=typed)  # type: ignore[attr-defined]
    spec = spec_with_sizes(problem.spec, sizes)
    examples = examples_of(problem, "validation", num_examples)
    found: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {}
    are_equal = True
    for chunk, simulation in simulated_chunks(
        problem, deployment(problem, point), examples, resized, spec
    ):
        are_equal &= simulation.operations.keys() == chunk.counts.keys() and all(
            np.array_equal(count, chunk.counts[key]) for key, count in simulation.operations.items()
        )
        for scope in SCOPES:
            for metric, name in METRICS:
                real, model = found.setdefault((scope, metric), ([], []))
                real.append(getattr(simulation, name)(scope))
                model.append(chunk.costs[scope][metric])
    means = {
        key: (float(np.mean(np.concatenate(real))), float(np.mean(np.concatenate(model))))
        for key, (real, model) in found.items()
    }
    return means, are_equal


def _agreement(
    problem: Problem, scope: str, metric: str, pairs: NDArray[np.float64], are_equal: bool
) -> Agreement:
    """Returns the figures of `(simulator, cost model)` at every size and policy, `[sizes, policies, 2]`."""
    error = pairs[..., 1] / pairs[..., 0] - 1.0
    taus = [kendall_tau(one[:, 0], one[:, 1]) for one in pairs]
    real = pairs[int(np.argmin(taus)), :, 0]
    return Agreement(
        task=problem.task.name,
        machine=problem.spec.name,
        scope=scope,
        metric=metric,
        num_points=error.size,
        mean_error=float(np.mean(np.abs(error))),
        largest_error=float(np.max(np.abs(error))),
        bias=float(np.mean(error)),
        tau=kendall_tau(pairs[..., 0].ravel(), pairs[..., 1].ravel()),
        least_tau=min(taus),
        spread=float(np.max(real) / np.min(real) - 1.0),
        counts_equal=are_equal,
    )


def kendall_tau(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Returns Kendall's tau of two series without ties, `[N]`; 1 if they have the same order."""
    first, second = np.triu_indices(len(one), 1)
    signs = np.sign(one[first] - one[second]) * np.sign(other[first] - other[second])
    return float(np.mean(signs)) if len(signs) else 1.0


def agreement_table(rows: Sequence[dict[str, Any]]) -> StudyTable:
    """Returns the table of a study: a machine in a row, a scope's cost in a column."""
    columns = [(scope, metric) for scope in SCOPES for metric, _ in METRICS]
    of = {(row["task"], row["machine"], row["scope"], row["metric"]): row for row in rows}

    def cell(row: dict[str, Any]) -> str:
        mean, largest = (f"{100.0 * row[name]:.1f}" for name in ("mean_error", "largest_error"))
        return f"{mean} ({largest}); {row['tau']:.3f}, {row['least_tau']:.3f}"

    return StudyTable(
        title=f"cost model against simulator, {rows[0]['num_points']} policies and sizes each: mean and (largest) error in "
        "percent; Kendall's tau, and the least at one size",
        columns=(
            *("task, machine", "counts"),
            *(f"{metric}, {scope.replace('_', ' ')}" for scope, metric in columns),
        ),
        rows=[
            (
                f"{task}, {machine}",
                "equal" if of[task, machine, *columns[0]]["counts_equal"] else "differ",
                *(cell(of[task, machine, *column]) for column in columns),
            )
            for task, machine in dict.fromkeys((row["task"], row["machine"]) for row in rows)
        ],
        text_columns=2,
    )
