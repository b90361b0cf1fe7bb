"""A model of two layers of attention made of the public calls alone, and policies to run it under."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import tiny_model

from codesign.applied import AppliedPolicy, LayerPolicy, policy_for
from codesign.calibration import Calibration
from codesign.layer_counts import LayerCounts, collect
from codesign.layers import attention, linear
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.protocol import Mechanism

BATCH, TOKENS, HEADS, HEAD_DIM, LAYERS = 2, 7, 2, 4, 2
WIDTH = HEADS * HEAD_DIM
FLOAT = AppliedPolicy()
compiled = functools.partial(jax.jit, compiler_options=tiny_model.FAST_COMPILE)
run_attention = compiled(attention, static_argnames=("is_causal", "scale"))
run_linear = compiled(linear, static_argnames=("site",))
ROUNDING = 2e-6  # a few float32 roundings of values near one


def tensors(seed: int = 0, tokens: int = TOKENS) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape = (BATCH, tokens, HEADS, HEAD_DIM)
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = (2.0 * jax.random.normal(key, shape) for key in keys)
    return q, k, v


def calibration(**ranges: float) -> Calibration:
    """Alike in all layers; 8, which the tensors above do not exceed, where `ranges` says nothing else."""
    names = ("qkv", "out", "up", "down", "query", "key", "value", "scores")
    layers = {name: jnp.full((LAYERS,), ranges.get(name, 8.0)) for name in names}
    return Calibration(layers=layers, ends={"embed": jnp.asarray(4.0), "head": jnp.asarray(4.0)})


def applied(
    mechanism: str | Mechanism = "energon", *, straight_through: bool = True, **bits: float
) -> AppliedPolicy:
    chosen = MECHANISMS[mechanism] if isinstance(mechanism, str) else mechanism
    start = policy_for(calibration(), HEADS, chosen, **bits)
    return start.replace(relaxation=tiny_model.relaxation(straight_through=straight_through))


def two_layers(run: AppliedPolicy, x: jax.Array, kernels: jax.Array) -> tuple[jax.Array, Any]:
    """Layers in a Python loop: `kernels` `[L, WIDTH, 3 * WIDTH]`."""
    counts = []
    for index, kernel in enumerate(kernels):
        x, counted = one_layer(run.layer(index), x, kernel)
        counts.append(counted)
    y, last = linear(jnp.mean(x, axis=1), kernels[0, :, :3], None, run.ends(), "head")
    return y, collect(counts, last)


def one_layer(layer: LayerPolicy, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, LayerCounts]:
    y, first = linear(x, kernel, None, layer, "qkv")
    q, k, v = jnp.unstack(jnp.reshape(y, (*x.shape[:2], 3, HEADS, HEAD_DIM)), axis=2)
    y, second = attention(q, k, v, layer)
    return x + jnp.reshape(y, x.shape), first + second


def inputs(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    first, second = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(first, (BATCH, TOKENS, WIDTH))
    return x, jax.random.normal(second, (LAYERS, WIDTH, 3 * WIDTH)) / WIDTH**0.5
