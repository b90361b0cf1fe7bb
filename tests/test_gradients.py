"""Gradients through the whole model and the machine's cost: finite differences, and rules written by hand."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model

from codesign import gates
from codesign.calibration import Calibration
from codesign.gates import Relaxation
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.spec import load_preset
from codesign.hw.surrogate import cost
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.energon import filter_operand, soft_round
from codesign.models import vit
from codesign.models.arithmetic import FloatArithmetic
from codesign.models.config import VisionConfig
from codesign.models.parameters import init_params
from codesign.policy import Policy

STEP = 1e-6
"""Step of the central difference, in the unit of the leaf; its error is O(STEP^2) + 1e-16 / STEP."""
TOLERANCE = 1e-3
TERMS = ("task", "workload", "energy", "latency")
# The unoptimised program compiles faster than it would have to run.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(scope="module", autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Two layers, two heads of width 4, 9 tokens and two images, in float64."""

    config: VisionConfig
    params: dict[str, Any]
    calibration: Calibration
    pixels: jax.Array
    labels: jax.Array
    accelerator: Accelerator

    def terms(self, params: Any, policy: Policy, relaxation: Relaxation) -> jax.Array:
        """Task loss, mean of all counts, energy and latency, `[4]`, the last three of order 1."""
        output = vit.apply(
            params,
            policy,
            self.calibration,
            self.pixels,
            config=self.config,
            mechanism=MECHANISMS["energon"],
            relaxation=relaxation,
        )
        task = jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(output.logits, self.labels)
        )
        leaves = jax.tree.leaves(output.workload)
        counts = sum((jnp.mean(jnp.log1p(leaf)) for leaf in leaves), start=jnp.zeros(()))
        spent = cost(output.workload, self.accelerator, smoothness=relaxation.smoothness)
        energy = jnp.mean(jnp.log(spent.energy_pj("end_to_end")))
        latency = jnp.mean(jnp.log(spent.latency_cycles("end_to_end")))
        return jnp.stack([task, counts, energy, latency])


def doubled(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


@pytest.fixture(scope="module")
def problem() -> Problem:
    shape = tiny_model.structure(
        head_dim=4,
        width=8,
        hidden=12,
        image_size=4,
        patch_size=2,
        stride=1,
        padding=0,
        num_classes=3,
    )
    setup = tiny_model.config(shape)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 17, size=(2, 4, 4))
    params = doubled(init_params(shape, key=jax.random.key(0)))
    # Ranges that clip some activations and miss the largest of others: at its very end a range has a kink.
    measured = tiny_model.calibrate(setup, params, pixels)
    calibration = jax.tree.map(
        lambda leaf: jnp.asarray(leaf * rng.uniform(0.8, 1.2, size=leaf.shape)), measured
    )
    return Problem(
        config=setup,
        params=params,
        calibration=calibration,
        pixels=jnp.asarray(pixels),
        labels=jnp.asarray([0, 2]),
        accelerator=accelerator_from_spec(load_preset("energon")),
    )


def base_policy(problem: Problem) -> Policy:
    """Every width fractional and at least 0.1 bit from a whole or half one, thresholds off their kink at 0."""
    rng = np.random.default_rng(1)
    start = tiny_model.energon_policy(problem.config.structure)

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


def python_scan(step: Callable[..., Any], carry: Any, stacked: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` as a loop, so that every layer's constants are values of their own."""
    outputs = []
    for index in range(len(jax.tree.leaves(stacked)[0])):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
        carry, output = step(carry, layer)
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def recorded(run: Callable[..., jax.Array], *arguments: Any) -> tuple[jax.Array, list[jax.Array]]:
    """Runs while noting every value held constant and every offset of a hard value, in order."""
    tape: list[jax.Array] = []

    def detach(x: jax.Array) -> jax.Array:
        tape.append(x)
        return x

    def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
        tape.append(jnp.asarray(hard, soft.dtype) - soft)
        return jnp.asarray(hard, soft.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "detach", detach)
        patch.setattr(gates, "straight_through", straight_through)
        patch.setattr(jax.lax, "scan", python_scan)
        return run(*arguments), tape


def replayed(
    run: Callable[..., jax.Array], tape: list[jax.Array], *arguments: Any
) -> jax.Array:
    """Runs with the noted values: the smooth function whose true derivative training uses."""
    notes = iter(tape)

    def detach(x: jax.Array) -> jax.Array:
        note = next(notes)
        assert note.shape == x.shape
        return note

    def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
        note = next(notes)
        assert note.shape == soft.shape == jnp.shape(hard)
        return soft + note

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "detach", detach)
        patch.setattr(gates, "straight_through", straight_through)
        patch.setattr(jax.lax, "scan", python_scan)
        result = run(*arguments)
    assert next(notes, None) is None
    return result


def compiled(run: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    lowered = jax.jit(run).lower(*arguments)
    executable: Callable[..., Any] = lowered.compile(compiler_options=FAST_COMPILE)
    return executable


def direction(path: str, leaf: jax.Array, rng: np.random.Generator) -> jax.Array:
    """A random direction; the largest weight of a column defines its range and stays."""
    draw = rng.normal(size=leaf.shape)
    if path.endswith("['kernel']"):
        size = np.abs(np.asarray(leaf))
        axes = (0, 1) if "head" in path else (-2,)
        draw = np.where(size == size.max(axis=axes, keepdims=True), 0.0, draw)
    return jnp.asarray(draw)


@pytest.mark.parametrize("straight_through", [False, True])
def test_gradient_against_finite_differences(problem: Problem, straight_through: bool) -> None:
    relaxation = doubled(tiny_model.relaxation(straight_through=straight_through))
    base = (problem.params, base_policy(problem))

    def run(point: Any) -> jax.Array:
        return problem.terms(*point, relaxation)

    gradient = compiled(jax.jacrev(run), base)(base)
    record = compiled(functools.partial(recorded, run), base)
    value, tape = record(base)
    replay = compiled(functools.partial(replayed, run), tape, base)
    np.testing.assert_allclose(replay(tape, base), value, rtol=1e-12)

    rng = np.random.default_rng(2)
    leaves, structure = jax.tree.flatten(base)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(base)]
    slopes = jax.tree.leaves(gradient)
    num_flat = 0
    for index, path in enumerate(paths):
        towards = direction(path, leaves[index], rng)

        def at(step: float, index: int = index, towards: jax.Array = towards) -> np.ndarray:
            moved = [*leaves]
            moved[index] = leaves[index] + step * towards
            return np.asarray(replay(tape, jax.tree.unflatten(structure, moved)))

        difference = (at(STEP) - at(-STEP)) / (2.0 * STEP)
        exact = np.asarray(jnp.sum(slopes[index] * towards, axis=range(1, towards.ndim + 1)))
        # Rounding of values of order 10 divided by the step.
        np.testing.assert_allclose(
            exact, difference, rtol=TOLERANCE, atol=1e-8, err_msg=f"{path} of {TERMS}"
        )
        num_flat += int(abs(exact[0]) < 1e-8)
    # Only a clip that nothing exceeds, or a bias that the softmax cancels, leaves the task alone.
    assert num_flat <= 2
