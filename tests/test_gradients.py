"""Gradients through the whole model and the machine's cost: finite differences, and rules written by hand."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from noted_runs import (
    STEP,
    TERMS,
    compiled,
    doubled,
    noted,
    replayed,
    small_model,
    terms,
)

from codesign.gates import Relaxation
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.spec import load_preset
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.energon_round import filter_operand
from codesign.models.arithmetic import FloatArithmetic
from codesign.models.model import apply
from codesign.policy import Policy

TOLERANCE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def model() -> tiny_model.Model:
    return small_model(2)


def energon_terms(
    model: tiny_model.Model, params: Any, policy: Policy, relaxation: Relaxation
) -> jax.Array:
    """`terms` of Energon on its machine, `[4]`."""
    output = apply(
        params,
        policy,
        model.calibration,
        tiny_model.as_inputs(model.inputs),
        config=model.config,
        mechanism=MECHANISMS["energon"],
        relaxation=relaxation,
    )
    accelerator = accelerator_from_spec(load_preset("energon"))
    assert model.labels is not None
    return terms(output, model.labels, accelerator, relaxation.smoothness)


def base_policy(model: tiny_model.Model) -> Policy:
    """Every width fractional and at least 0.1 bit from a whole or half one, thresholds off their kink at 0."""
    rng = np.random.default_rng(1)
    start = tiny_model.energon_policy(model.structure)

    def drawn(name: str, value: jax.Array) -> jax.Array:
        shape = value.shape
        if name.endswith("threshold"):
            draw = rng.choice([-1, 1], size=shape) * rng.uniform(0.1, 0.5, size=shape)
        elif name.endswith("clip"):
            draw = rng.normal(scale=0.05, size=shape)
        else:
            fraction = rng.choice([0.1, 0.6], size=shape) + rng.uniform(0.0, 0.3, size=shape)
            whole = {"qk_bits": 11.0, "v_bits": 9.0, "query_bits": 4.0}.get(name, 5.0)
            if name == "key_bits":
                whole = np.asarray([2.0, 4.0])
            draw = whole + fraction
        return jnp.asarray(draw, jnp.float64)

    return Policy(
        layers={name: drawn(name, value) for name, value in start.layers.items()},
        ends={name: drawn(name, value) for name, value in start.ends.items()},
    )


def direction(path: str, leaf: jax.Array, rng: np.random.Generator) -> jax.Array:
    """A random direction; the largest weight of a column defines its range and stays."""
    draw = rng.normal(size=leaf.shape)
    if path.endswith("['kernel']"):
        size = np.abs(np.asarray(leaf))
        axes = (0, 1) if "head" in path else (-2,)
        draw = np.where(size == size.max(axis=axes, keepdims=True), 0.0, draw)
    return jnp.asarray(draw)


def test_gradient_against_finite_differences(model: tiny_model.Model) -> None:
    relaxation = doubled(tiny_model.relaxation(straight_through=False))
    base = (model.params, base_policy(model))

    def run(point: Any) -> jax.Array:
        return energon_terms(model, *point, relaxation)

    # Training's own, by a scan over layers; notes need a loop.
    gradient = compiled(jax.jacrev(run), base)(base)
    value, notes = compiled(functools.partial(noted, run), base)(base)
    replay = compiled(functools.partial(replayed, run), notes, base)
    np.testing.assert_allclose(replay(notes, base), value, rtol=1e-12)

    rng = np.random.default_rng(2)
    leaves, structure = jax.tree.flatten(base)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(base)]
    slopes = jax.tree.leaves(gradient)
    flat = []
    for index, path in enumerate(paths):
        towards = direction(path, leaves[index], rng)

        def at(step: float, index: int = index, towards: jax.Array = towards) -> np.ndarray:
            moved = [*leaves]
            moved[index] = leaves[index] + step * towards
            return np.asarray(replay(notes, jax.tree.unflatten(structure, moved)))

        difference = (at(STEP) - at(-STEP)) / (2.0 * STEP)
        exact = np.asarray(slopes[index]).reshape(len(TERMS), -1) @ np.asarray(towards).ravel()
        # Rounding of values of order 10 divided by the step.
        np.testing.assert_allclose(
            exact, difference, rtol=TOLERANCE, atol=1e-7, err_msg=f"{path} of {TERMS}"
        )
        if abs(exact[0]) < 1e-8:
            flat.append(path)
    # Only a clip that nothing exceeds, or a bias that the softmax cancels, leaves the task alone.
    assert len(flat) <= 2, flat


def test_deployed_training_moves_every_knob(model: tiny_model.Model) -> None:
    shape = model.structure
    start = tiny_model.energon_policy(shape, linear_bits=7.5, attention_bits=15.5)
    half = {name: start.layers[name] + 0.5 for name in ("query_bits", "key_bits")}
    policy = doubled(Policy(layers=start.layers | half, ends=start.ends))

    def loss(policy: Policy) -> jax.Array:
        task, _, energy, latency = energon_terms(
            model, model.params, policy, tiny_model.relaxation()
        )
        return task + energy + latency

    gradient = compiled(jax.grad(loss), policy)(policy)
    for name, slope in [*gradient.layers.items(), *gradient.ends.items()]:
        assert bool(jnp.all(jnp.isfinite(slope))), name
        # A layer's weight may define its range alone: some layer must move, not every one.
        assert bool(jnp.any(slope != 0.0)), name


@pytest.mark.parametrize("bits", [3.25, 4.5, 6.0, 8.0])
@pytest.mark.parametrize("straight_through", [False, True])
def test_filter_operand_by_hand(bits: float, straight_through: bool) -> None:
    code = np.random.default_rng(0).integers(-2047, 2048, size=50)
    width, code_bits = np.floor(bits + 0.5), 12
    low = min(int(bits), 7)

    def operand(code: jax.Array, bits: jax.Array) -> jax.Array:
        return filter_operand(
            code,
            bits,
            jnp.asarray(width),
            jnp.asarray(float(code_bits)),
            straight_through=straight_through,
        )

    point = jnp.asarray(code, jnp.float64), jnp.asarray(bits)
    unit = 2.0 ** (width - code_bits)
    truncated = [np.floor(code / 2.0**cut) * 2.0**cut * unit for cut in (12 - low, 11 - low)]
    np.testing.assert_array_equal(
        jax.jacrev(operand, argnums=1)(*point), truncated[1] - truncated[0]
    )
    slope = jax.grad(lambda code: jnp.sum(operand(code, point[1])))(point[0])
    np.testing.assert_allclose(slope, np.full(50, unit), rtol=1e-12)
    forward = code >> int(code_bits - width)
    if straight_through:
        np.testing.assert_array_equal(operand(*point), forward)
    elif bits == width:
        np.testing.assert_array_equal(operand(*point), forward)


@pytest.mark.parametrize("variable", [-0.7, 0.4])
def test_straight_through_filter_by_hand(variable: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision's derivative is that of the gate, `-g (1-g) / (tau std) (max - mean)` times `1 - alpha^2`."""
    # Inside a derivative nothing may be compiled with options of its own.
    monkeypatch.setattr(tiny_model, "_filter", tiny_model._filter.__wrapped__)
    rng = np.random.default_rng(3)
    query, key = (
        rng.integers(-32767, 32768, size=(1, 1, rows, 8)).astype(np.float64) for rows in (5, 12)
    )
    temperature = 0.3
    relaxation = tiny_model.relaxation(temperature)
    widths: dict[str, object] = {"qk_bits": 16, "v_bits": 16, "query_bits": 4, "key_bits": [4]}

    def weights(v: jax.Array) -> jax.Array:
        selection = tiny_model.run_filter(query, key, v[None, None], widths=widths, soft=relaxation)
        return selection.weights[0, 0]

    slope = jax.jacrev(weights)(jnp.asarray(variable))
    scores = (query[0, 0] // 2**12) @ (key[0, 0] // 2**12).T
    alpha = np.rint(128 * np.tanh(variable)) / 128
    mean, deviation = scores.mean(-1, keepdims=True), scores.std(-1, keepdims=True)
    top, bottom = scores.max(-1, keepdims=True), scores.min(-1, keepdims=True)
    distance = top - mean if alpha >= 0 else mean - bottom
    theta = mean + alpha * distance
    gate = 1.0 / (1.0 + np.exp(-(scores - theta) / (temperature * deviation)))
    wanted = -gate * (1.0 - gate) / (temperature * deviation) * distance
    np.testing.assert_allclose(slope, wanted * (1.0 - np.tanh(variable) ** 2), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(weights(jnp.asarray(variable))), scores > theta)


@pytest.mark.parametrize("straight_through", [False, True])
def test_quantised_activation_by_hand(straight_through: bool) -> None:
    """To the bits the neighbours' difference, to the clip the rounding error (inside) or the end of the range."""
    x = jax.random.normal(jax.random.key(0), (1, 6, 5), jnp.float64)
    range_, bits, clip = 1.3, 4.3, -0.1

    def entered(bits: jax.Array, clip: jax.Array) -> jax.Array:
        arithmetic = FloatArithmetic(
            {},
            {"up.activation_bits": bits, "up.activation_clip": clip},
            {"up": jnp.asarray(range_)},
            jnp.ones((1, 6)),
            tiny_model.relaxation(straight_through=straight_through),
            structure=tiny_model.structure(),
            norm_epsilon=1e-6,
        )
        return arithmetic.enter(x, "up")

    values, slopes = np.asarray(x), []
    quantised = []
    end = range_ * np.exp(clip)
    for limit in (7, 15):
        ratio = values * limit / end
        code = np.clip(np.rint(ratio), -limit, limit)
        quantised.append(code * end / limit)
        is_inside = np.abs(ratio) <= limit
        slopes.append(np.where(is_inside, code - ratio, np.sign(values) * limit) * end / limit)
    point = jnp.asarray(bits), jnp.asarray(clip)
    of_bits, of_clip = jax.jacrev(entered, argnums=(0, 1))(*point)
    np.testing.assert_allclose(of_bits, quantised[1] - quantised[0], atol=1e-12)
    np.testing.assert_allclose(of_clip, 0.7 * slopes[0] + 0.3 * slopes[1], atol=1e-12)
    mixed = quantised[0] if straight_through else 0.7 * quantised[0] + 0.3 * quantised[1]
    np.testing.assert_allclose(entered(*point), mixed, atol=1e-12)
