"""Runs that note what training holds constant, and runs that read the notes: smooth functions with training's derivatives.

`gates.detach` and `gates.straight_through` substitute derivatives. With their values held at those of one point, what is
left is a smooth function near it, whose finite differences are what training must differentiate to.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model

from codesign import gates
from codesign.hw.accelerator import Accelerator
from codesign.hw.surrogate import cost
from codesign.models.parameters import init_params
from codesign.models.transformer import ModelOutput

STEP = 1e-6
"""Step of a central difference, in the unit of what moves; its error is O(STEP^2) + 1e-16 / STEP."""
TERMS = ("task", "workload", "energy", "latency")


def doubled(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def small_model(num_layers: int, *, factor: float = 1.0) -> tiny_model.Model:
    """Two heads of width 4 on the 9 tokens of two images, in float64; its weights are those of a start times `factor`.

    Its ranges clip some activations and miss the largest of others: at its very end a range has a kink.
    """
    shape = tiny_model.structure(
        num_layers=num_layers,
        head_dim=4,
        width=8,
        hidden=12,
        image_size=4,
        patch_size=2,
        stride=1,
        padding=0,
        num_outputs=3,
    )
    setup = tiny_model.config(shape)
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 17, size=(2, 4, 4))
    start = doubled(init_params(shape, key=jax.random.key(0)))
    params = jax.tree.map(lambda leaf: factor * leaf, start)
    calibration = jax.tree.map(
        lambda leaf: jnp.asarray(leaf * rng.uniform(0.8, 1.2, size=leaf.shape)),
        tiny_model.calibrate(setup, params, pixels),
    )
    return tiny_model.Model(setup, params, calibration, {"pixels": pixels}, np.asarray([0, 2]))


def terms(
    output: ModelOutput, labels: np.ndarray, accelerator: Accelerator, smoothness: jax.Array
) -> jax.Array:
    """Task loss, mean of all counts, energy and latency, `[4]`, the last three of order 1."""
    task = optax.softmax_cross_entropy_with_integer_labels(output.logits, jnp.asarray(labels))
    leaves = jax.tree.leaves(output.workload)
    counts = sum((jnp.mean(jnp.log1p(leaf)) for leaf in leaves), start=jnp.zeros(()))
    spent = cost(output.workload, accelerator, smoothness=smoothness)
    energy = jnp.mean(jnp.log(spent.energy_pj("end_to_end")))
    latency = jnp.mean(jnp.log(spent.latency_cycles("end_to_end")))
    return jnp.stack([jnp.mean(task), counts, energy, latency])


def compiled(run: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    lowered = jax.jit(run).lower(*arguments)
    executable: Callable[..., Any] = lowered.compile(compiler_options=tiny_model.FAST_COMPILE)
    return executable


_scan = jax.lax.scan


def _loop(step: Callable[..., Any], carry: Any, stacked: Any) -> tuple[Any, Any]:
    """The scan over layers as a loop, so that every layer's constants are values of their own; scans within stay."""
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "scan", _scan)
        for index in range(len(jax.tree.leaves(stacked)[0])):
            layer = jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
            carry, output = step(carry, layer)
            outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


@contextlib.contextmanager
def _substituted(
    detach: Callable[[jax.Array], jax.Array],
    straight_through: Callable[[jax.Array, jax.Array], jax.Array],
) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "detach", detach)
        patch.setattr(gates, "straight_through", straight_through)
        patch.setattr(jax.lax, "scan", _loop)
        patch.setattr(jax, "checkpoint", lambda function, **_: function)
        yield


def noted(run: Callable[..., Any], *arguments: Any) -> tuple[Any, list[jax.Array]]:
    """Runs, derivatives included, while noting every value held constant and every offset of a hard value, in order."""
    notes: list[jax.Array] = []

    def detach(x: jax.Array) -> jax.Array:
        notes.append(jax.lax.stop_gradient(x))
        return notes[-1]

    def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
        value = jax.lax.stop_gradient(jnp.asarray(hard, soft.dtype))
        notes.append(value - jax.lax.stop_gradient(soft))
        return gates._straight_through(value, soft)

    with _substituted(detach, straight_through):
        return run(*arguments), notes


def replayed(run: Callable[..., Any], notes: list[jax.Array], *arguments: Any) -> Any:
    """Runs with the noted values: the smooth function whose true derivative training uses."""
    left = iter(notes)

    def detach(x: jax.Array) -> jax.Array:
        note = next(left)
        assert note.shape == x.shape
        return note

    def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
        note = next(left)
        assert note.shape == soft.shape == jnp.shape(hard)
        return soft + note

    with _substituted(detach, straight_through):
        result = run(*arguments)
    assert next(left, None) is None
    return result


def differentiated(
    run: Callable[[Any], tuple[jax.Array, Any]], point: Any
) -> tuple[Any, jax.Array, Any, list[jax.Array]]:
    """Derivatives that training has of the first result of `run`, `[N]`, both results, and what `replayed` reads."""

    def with_notes(point: Any) -> tuple[jax.Array, Any]:
        (value, other), notes = noted(run, point)
        return value, (other, notes)

    value, pull, (other, notes) = jax.vjp(with_notes, point, has_aux=True)
    (slopes,) = jax.vmap(pull)(jnp.eye(len(value), dtype=value.dtype))
    return slopes, value, other, notes
