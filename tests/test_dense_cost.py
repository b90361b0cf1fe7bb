"""What dense costs in closed form, against what the hard path counts: images, padded text, a decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment
from tiny_experiment import BUCKETS, MAX_TOKENS

from codesign.experiments.configs import Budget
from codesign.experiments.dense_cost import DenseCost, least_cost
from codesign.experiments.evaluate import Point, dense_point, deployment, hard_chunks, measure
from codesign.experiments.problem import Problem
from codesign.experiments.reach import cheapest_ratio
from codesign.experiments.start import measured_ranges, start_policy
from codesign.experiments.train import BudgetedTraining
from codesign.hw.surrogate import SCOPES
from codesign.mechanisms import MECHANISMS
from codesign.policy import Policy, group

METRICS = ("energy", "latency")
PRESETS = {"energon": "energon", "acceltran": "acceltran-edge", "dense": "energon"}
"""A machine for each mechanism."""


@functools.cache
def case(kind: str, mechanism: str, preset: str | None = None) -> tuple[Problem, Point]:
    """A problem, and the point of its dense weights with the widest operands."""
    problem = tiny_experiment.untrained(kind, mechanism, preset or PRESETS[mechanism])
    policy = start_policy(problem, linear_bits=8.0, attention_bits=16.0)
    calibration = measured_ranges(problem, problem.params)
    return problem, Point(params=problem.params, policy=policy, calibration=calibration)


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        ("images", "energon"),
        ("text", "energon"),
        ("text", "acceltran-edge"),
        ("decoder", "energon"),
    ],
)
def test_dense_cost_is_what_the_hard_path_counts(kind: str, preset: str) -> None:
    problem, start = case(kind, "dense", preset)
    reference = dense_point(problem, start.calibration)
    examples = problem.task.part("validation")
    measured = measure(problem, reference, "validation")
    dense = DenseCost(problem.config.structure, problem.accelerator, problem.mechanism)
    stated = dense.of(examples.inputs)
    for scope in SCOPES:
        means = dense.mean(examples, problem.buckets, scope)
        for metric in METRICS:
            # The hard path ran in buckets, the statement is for the longest: padding costs nothing.
            np.testing.assert_allclose(
                stated[scope][metric], measured.costs[scope][metric], rtol=1e-9
            )
            assert means[metric] == pytest.approx(np.mean(stated[scope][metric]), rel=1e-12)


@pytest.mark.parametrize(("kind", "preset"), [("text", "acceltran-edge"), ("decoder", "energon")])
def test_longer_examples_cost_more_and_padding_nothing(kind: str, preset: str) -> None:
    problem, _ = case(kind, "dense", preset)
    structure, accelerator = problem.config.structure, problem.accelerator
    for price in (
        DenseCost(structure, accelerator, MECHANISMS["acceltran"]),
        least_cost(structure, accelerator, MECHANISMS["acceltran"]),
    ):
        by_bucket = []
        for bucket in (*BUCKETS, MAX_TOKENS):
            valid = np.tril(np.ones((bucket, bucket), bool))
            costs = price.of({"tokens": np.zeros((bucket, bucket), np.int32), "valid": valid})
            for scope in SCOPES:
                assert np.all(np.diff(costs[scope]["energy"]) > 0.0)
                assert np.all(np.diff(costs[scope]["latency"]) >= 0.0)
                assert costs[scope]["latency"][-1] > costs[scope]["latency"][0] > 0.0
            by_bucket.append(costs["end_to_end"]["energy"])
        for shorter in by_bucket[:-1]:
            np.testing.assert_allclose(shorter, by_bucket[-1][: len(shorter)], rtol=1e-12)


def random_policies(problem: Problem, begin: Point, number: int) -> list[Policy]:
    """Policies with any widths and any strength of the thresholds; the last has the narrowest and strongest."""
    rng = np.random.default_rng(0)
    ranges = {name: np.asarray(value) for name, value in begin.calibration.layers.items()}
    policies = []
    for index in range(number):
        is_last = index == number - 1

        def drawn(name: str, value: jax.Array, is_last: bool = is_last) -> jax.Array:
            if group(name) == "bits":
                low, high = (8, 16) if name in ("qk_bits", "v_bits") else (2, 8)
                draw = rng.integers(low, low + 1 if is_last else high + 1, value.shape)
                draw = np.sort(draw + np.zeros(value.shape), axis=-1) if value.ndim else draw
            elif name == "threshold":
                strength = np.ones(value.shape) if is_last else rng.random(value.shape)
                draw = problem.mechanism.thresholds.from_strength(strength, ranges)
            else:
                draw = value
            return jnp.asarray(draw, jnp.float32)

        policies.append(
            Policy(
                layers={name: drawn(name, value) for name, value in begin.policy.layers.items()},
                ends={name: drawn(name, value) for name, value in begin.policy.ends.items()},
            )
        )
    return policies


@pytest.mark.parametrize(
    ("kind", "mechanism"),
    [
        ("text", "dense"),
        ("images", "energon"),
        pytest.param("decoder", "energon", marks=pytest.mark.slow),
        ("images", "acceltran"),
        pytest.param("decoder", "acceltran", marks=pytest.mark.slow),
    ],
)
def test_no_policy_costs_less_than_the_least(kind: str, mechanism: str) -> None:
    problem, start = case(kind, mechanism)
    experiment = dataclasses.replace(problem.experiment, buckets=())
    problem = dataclasses.replace(problem, experiment=experiment)
    structure, examples = problem.config.structure, problem.task.part("validation")
    dense = DenseCost(structure, problem.accelerator, problem.mechanism).of(examples.inputs)
    least = least_cost(structure, problem.accelerator, problem.mechanism).of(examples.inputs)
    for policy in random_policies(problem, start, 3):
        point = dataclasses.replace(start, policy=policy)
        costs = measure(problem, point, "validation").costs
        for scope in SCOPES:
            cheapest = cheapest_ratio(problem, scope)
            for metric in METRICS:
                found = costs[scope][metric]
                assert cheapest[metric] * np.mean(dense[scope][metric]) <= np.mean(found) * 1.0001
                if not problem.mechanism.has_rounds:
                    assert np.all(least[scope][metric] <= found * (1.0 + 1e-9))
    # The bound is near: the narrowest dense policy costs just that.
    if mechanism == "dense":
        np.testing.assert_allclose(
            least["end_to_end"]["energy"], costs["end_to_end"]["energy"], rtol=1e-9
        )


def test_a_batch_knows_the_dense_cost_of_its_examples() -> None:
    problem, start = case("text", "energon")
    training = BudgetedTraining(
        problem, problem.experiment.optimize, ("energy", "latency"), "attention"
    )
    deployed = deployment(
        problem, dense_point(problem, start.calibration), mechanism=MECHANISMS["dense"]
    )
    train = problem.task.part("train")
    chunks = list(hard_chunks(deployed, train, problem.accelerator, problem.buckets))
    costs = {
        metric: np.concatenate([chunk.costs["attention"][metric] for chunk in chunks])
        for metric in METRICS
    }
    order = np.concatenate([chunk.indices for chunk in chunks])
    lengths = set()
    for step in range(4):
        batch = training.batch(step)
        indices, length = problem.batches(4, problem.experiment.seed + 1).indices(step)
        assert batch["tokens"].shape == (4, length) and batch["dense"].shape == (4, 2)
        lengths.add(length)
        for row, index in enumerate(indices):
            (place,) = np.flatnonzero(order == index)
            wanted = [costs[metric][place] for metric in METRICS]
            np.testing.assert_allclose(batch["dense"][row], wanted, rtol=1e-6)
    assert len(lengths) > 1
    limits = training.limits(Budget(energy=0.5, latency=0.25, scope="attention"))
    first = train.first(problem.experiment.num_calibration)
    assert len(first) == len(train)
    assert limits["energy"] == pytest.approx(0.5 * np.mean(costs["energy"]))
    assert limits["latency"] == pytest.approx(0.25 * np.mean(costs["latency"]))
