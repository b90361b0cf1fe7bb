"""Quality and divergence worked by hand, and a measurement that gives every example back in its place."""

import functools
import math

import numpy as np
import pytest
import tiny_experiment
from tiny_experiment import BUCKETS, MAX_TOKENS

from codesign.experiments.configs import Metric, Scope
from codesign.experiments.evaluate import (
    Measurement,
    Point,
    dense_point,
    deployment,
    divergence,
    hard_chunks,
    log_softmax,
    measure,
    quality,
    summary,
)
from codesign.experiments.problem import Problem
from codesign.experiments.start import measured_ranges, start_policy
from codesign.experiments.teacher import float_path
from codesign.hw.surrogate import SCOPES
from codesign.mechanisms import MECHANISMS


def logits_of(probabilities: object, shift: float = 0.0) -> np.ndarray:
    """Logits of given probabilities; a constant changes nothing."""
    return np.log(np.asarray(probabilities)) + shift


HALF, QUARTER = [0.5, 0.5], [0.75, 0.25]


def test_quality_of_a_class_is_whether_it_is_right() -> None:
    logits = np.asarray([[0.0, 2.0, 1.0], [3.0, -1.0, 0.0], [0.0, 0.0, 5.0]])
    np.testing.assert_array_equal(quality(logits, np.asarray([1, 1, 2])), [1.0, 0.0, 1.0])


def test_quality_of_a_decoder_is_bits_per_token_that_exists() -> None:
    logits = logits_of([[HALF, QUARTER], [QUARTER, QUARTER]], shift=40.0)
    labels = np.asarray([[0, 0], [1, 1]])
    # -log2 of 1/2, 3/4; 1/4, 1/4.
    both = [(1.0 + math.log2(4 / 3)) / 2, 2.0]
    np.testing.assert_allclose(quality(logits, labels), both)
    valid = np.asarray([[True, False], [True, True]])
    np.testing.assert_allclose(quality(logits, labels, valid), [1.0, 2.0])
    padded = np.where(valid[..., None], logits, 1e9)  # what stands at padding does not matter
    np.testing.assert_allclose(quality(padded, labels, valid), [1.0, 2.0])


def test_divergence_by_hand() -> None:
    # KL(1/2, 1/2 || 3/4, 1/4) = (ln 2/3 + ln 2) / 2; the other way round 3/4 ln 3/2 + 1/4 ln 1/2.
    forward, backward = 0.5 * math.log(4 / 3), 0.75 * math.log(1.5) - 0.25 * math.log(2)
    half, quarter = logits_of([HALF], shift=3.0), logits_of([QUARTER], shift=-7.0)
    np.testing.assert_allclose(divergence(half, quarter), [forward])
    np.testing.assert_allclose(divergence(quarter, half), [backward])
    np.testing.assert_allclose(divergence(half, half), [0.0], atol=1e-15)
    teacher, model = logits_of([[HALF, QUARTER, HALF]]), logits_of([[QUARTER, HALF, HALF]])
    valid = np.asarray([[True, True, False]])
    np.testing.assert_allclose(divergence(teacher, model, valid), [(forward + backward) / 2])
    np.testing.assert_allclose(divergence(teacher, model), [(forward + backward) / 3])


def test_large_logits_do_not_overflow() -> None:
    logits = np.asarray([[1e4, 0.0], [-1e4, 1e4]])
    np.testing.assert_allclose(log_softmax(logits), [[0.0, -1e4], [-2e4, 0.0]])
    np.testing.assert_allclose(divergence(logits, logits[::-1]), [2e4, 1e4])


@functools.cache
def case(kind: str) -> tuple[Problem, Point]:
    problem = tiny_experiment.untrained(kind)
    policy = start_policy(problem, linear_bits=6.0, attention_bits=10.0)
    calibration = measured_ranges(problem, problem.params)
    return problem, Point(params=problem.params, policy=policy, calibration=calibration)


@pytest.mark.parametrize("kind", ["images", "decoder"])
def test_every_example_comes_back_in_its_place(kind: str) -> None:
    """Chunks of three, in buckets, against all examples at once without buckets."""
    problem, point = case(kind)
    deployed, accelerator = deployment(problem, point), problem.accelerator
    examples = problem.task.part("validation")
    whole = next(hard_chunks(deployed, examples, accelerator, ()))
    np.testing.assert_array_equal(whole.indices, np.arange(len(examples)))
    tracing = kind == "images"
    chunks = list(
        hard_chunks(deployed, examples, accelerator, problem.buckets, tracing=tracing, most=3)
    )
    order = np.concatenate([chunk.indices for chunk in chunks])
    np.testing.assert_array_equal(np.sort(order), np.arange(len(examples)))
    assert all(len(chunk.indices) <= 3 for chunk in chunks)
    for chunk in chunks:
        number = len(chunk.indices)
        for name, values in chunk.inputs.items():
            rows = examples.inputs[name][chunk.indices]
            np.testing.assert_array_equal(values, rows[:, : values.shape[1]])
        for name, values in chunk.counts.items():
            if name != "index.bits":  # as wide as the padded row is long
                np.testing.assert_array_equal(values, whole.counts[name][chunk.indices])
        logits, wanted = chunk.logits, whole.logits[chunk.indices]
        if kind == "decoder":
            valid = chunk.inputs["valid"]
            logits, wanted = logits[valid], wanted[:, : logits.shape[1]][valid]
        np.testing.assert_array_equal(logits, wanted)
        assert bool(chunk.tensors) == tracing
        if tracing:
            assert chunk.tensors["keep"].shape[2] == chunk.tensors["query"].shape[1] == number
            assert chunk.tensors["embedded"].shape[0] == chunk.tensors["logits"].shape[0] == number
    if kind == "decoder":
        assert {chunk.logits.shape[1] for chunk in chunks} == {*BUCKETS, MAX_TOKENS}
        # Padding costs a row nothing but the width of an index.
        for scope in SCOPES:
            for chunk in chunks:
                found, wanted = chunk.costs[scope], whole.costs[scope]
                np.testing.assert_allclose(
                    found["energy"], wanted["energy"][chunk.indices], rtol=0.01
                )
                np.testing.assert_allclose(
                    found["latency"], wanted["latency"][chunk.indices], rtol=1e-12
                )


@pytest.mark.parametrize("kind", [pytest.param("images", marks=pytest.mark.slow), "decoder"])
def test_measurement_is_that_of_the_integers(kind: str) -> None:
    problem, point = case(kind)
    result = measure(problem, point, "validation")
    deployed = deployment(problem, point)
    examples = problem.task.part("validation")
    whole = next(hard_chunks(deployed, examples, problem.accelerator, ()))
    teacher = np.asarray(float_path(problem.params, examples.inputs, problem.config)[0])
    valid = examples.inputs.get("valid") if kind == "decoder" else None
    assert result.quality_name == ("bits_per_token" if kind == "decoder" else "accuracy")
    np.testing.assert_allclose(result.quality, quality(whole.logits, examples.labels, valid))
    # The teacher ran in buckets: float32, other sums.
    np.testing.assert_allclose(
        result.kl_nats, divergence(teacher, whole.logits, valid), rtol=1e-4, atol=1e-6
    )
    assert np.all(result.kl_nats > 0.0)
    assert result.kept.shape == (2, 2, 2)
    first = measure(problem, point, "validation", num_examples=3)
    np.testing.assert_array_equal(first.quality, result.quality[:3])
    for scope in SCOPES:
        assert result.mean_cost("energy", scope) == np.mean(result.costs[scope]["energy"])


def test_dense_reference_is_close_to_the_float_model() -> None:
    problem, point = case("decoder")
    reference = dense_point(problem, point.calibration)
    knobs = reference.policy.layers | reference.policy.ends
    for name, value in knobs.items():
        wanted = 0.0 if name.endswith("clip") else 16.0 if name in ("qk_bits", "v_bits") else 8.0
        np.testing.assert_array_equal(value, wanted, err_msg=name)
    assert "threshold" not in knobs
    narrow = measure(problem, point, "validation")
    dense = measure(problem, reference, "validation", mechanism=MECHANISMS["dense"])
    assert np.all(dense.kept == 1.0) and dense.kept.shape == (2, 1)
    assert np.mean(dense.kl_nats) < 0.5 * np.mean(narrow.kl_nats)


def test_summary_by_hand() -> None:
    def measurement(values: list[float], energy: list[float]) -> Measurement:
        metrics: dict[Metric, np.ndarray] = {
            "energy": np.asarray(energy),
            "latency": np.asarray([8.0, 8.0]),
        }
        costs: dict[Scope, dict[Metric, np.ndarray]] = {scope: metrics for scope in SCOPES}
        return Measurement(
            quality_name="bits_per_token",
            quality=np.asarray(values),
            kl_nats=np.asarray([0.1, 0.3]),
            costs=costs,
            kept=np.asarray([[[1.0, 0.5]], [[0.5, 0.25]]]),  # [L, H, R]
            macs={scope: 10.0 * np.asarray(energy) for scope in SCOPES},
        )

    result = summary(measurement([2.0, 1.0], [3.0, 1.0]), measurement([1.0, 1.0], [6.0, 2.0]))
    assert result["num_examples"] == 2 and result["quality_name"] == "bits_per_token"
    assert result["quality"] == 1.5 and result["kl_nats"] == pytest.approx(0.2)
    assert result["kept"] == [0.75, 0.375]
    for scope in SCOPES:
        assert result[scope] == {
            "energy_pj": 2.0,
            "latency_cycles": 8.0,
            "energy_ratio": 0.5,
            "latency_ratio": 1.0,
            "macs": 20.0,
            "mac_ratio": 0.5,
        }
