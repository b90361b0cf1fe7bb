"""What a layer keeps for its backward pass, and products whose backward pass is laid out for the machine.

Between the products, a layer is many cheap steps over large arrays, and writing one down to read it back costs more than
computing it again. So of every layer only what is marked by `kept` is stored: the results of products, and statistics
small enough to be free. Everything else of it is computed a second time on the way back.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"


def kept(x: Any) -> Any:
    """Returns a tree of arrays, marked as what `keeping_marked` stores."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, _KEPT), x)  # type: ignore[no-untyped-call]


def keeping_marked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a scanned function that stores only what `kept` marks for its backward pass."""
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    result: Callable[..., Any] = jax.checkpoint(function, policy=policy, prevent_cse=False)
    return result


def row_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the sums of `a * b` over the last axis, which stays with length 1.

    As a product of matrices, its speed does not depend on what else is multiplied in or on axes of length 1.
    """
    axes = "abcdefg"[: a.ndim - 1]
    sums: jax.Array = jnp.einsum(
        f"{axes}s,{axes}s->{axes}", a, b, precision=jax.lax.Precision.HIGHEST
    )
    return sums[..., None]


@jax.custom_vjp
def _dense_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight


def _dense_forward(
    x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dense_product(x, weight), (x, weight)


# The true derivatives. With flat operands compilers don't store `x` transposed, computing it again element by element.
def _dense_backward(
    stored: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = stored
    rows, slopes = (jnp.reshape(a, (-1, a.shape[-1])) for a in (x, slope))
    return slope @ weight.T, rows.T @ slopes


_dense_product.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def _coded_product(
    x: jax.Array, weight: jax.Array, unit: jax.Array, weight_unit: jax.Array
) -> jax.Array:
    codes, weight_codes = (
        jnp.round(values / size).astype(jnp.int8)
        for values, size in ((x, unit), (weight, weight_unit))
    )
    sums = jnp.matmul(codes, weight_codes, preferred_element_type=jnp.int32)
    scale = jnp.reshape(unit * weight_unit, (1,) * (x.ndim - 1) + (-1,))
    return sums.astype(x.dtype) * scale


def _coded_forward(
    x: jax.Array, weight: jax.Array, unit: jax.Array, weight_unit: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _coded_product(x, weight, unit, weight_unit), (x, weight, unit, weight_unit)


def _coded_backward(stored: tuple[jax.Array, ...], slope: jax.Array) -> tuple[jax.Array, ...]:
    x, weight, unit, weight_unit = stored
    return *_dense_backward((x, weight), slope), jnp.zeros_like(unit), jnp.zeros_like(weight_unit)


_coded_product.defvjp(_coded_forward, _coded_backward)


def dense_product(
    x: jax.Array, weight: jax.Array, units: tuple[jax.Array, jax.Array] | None = None
) -> jax.Array:
    """Returns `x @ weight`, kept; the derivatives are those of the product.

    Args:
      x: Activations, `[..., K]`.
      weight: Weights, `[K, N]`.
      units: Values of one code of `x`, scalar, and of `weight`, `[1, N]` or `[1, 1]`, if both are whole multiples of
        these, of at most 127: the product then runs in 8-bit integers. Constants for differentiation. None: they are not.
    """
    value = _dense_product(x, weight) if units is None else _coded_product(x, weight, *units)
    product: jax.Array = kept(value)
    return product


@jax.custom_vjp
def _weighted_values(weights: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.matmul(weights, values) * scale


def _values_forward(
    weights: jax.Array, values: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _weighted_values(weights, values, scale), (weights, values, scale)


# The true derivatives, but none to `scale`. A product of the transposed weights would take twice as long as a
# transposed product; the factor keeps compilers from turning one into the other.
def _values_backward(
    stored: tuple[jax.Array, ...], slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    weights, values, scale = stored
    to_values = jnp.matmul(jnp.swapaxes(slope, 2, 3), weights) * scale
    to_weights = jnp.matmul(slope * scale, jnp.swapaxes(values, 2, 3))
    return to_weights, jnp.swapaxes(to_values, 2, 3), jnp.zeros_like(scale)


_weighted_values.defvjp(_values_forward, _values_backward)


def weighted_values(weights: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the attended heads side by side, kept, `[B, T, H*d]`.

    Args:
      weights: Attention probabilities, `[B, H, T, S]`.
      values: Values or their codes, `[B, H, S, d]`.
      scale: Factor on the result, scalar, a constant for differentiation.
    """
    heads = jnp.swapaxes(_weighted_values(weights, values, scale), 1, 2)
    attended: jax.Array = kept(jnp.reshape(heads, (*heads.shape[:2], -1)))
    return attended


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def split_heads(projected: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries, keys and values, `[B, H, T, d]` each.

    Args:
      projected: The three side by side, heads within, `[B, T, 3*H*d]`.
      num_heads: H.
    """
    split = jnp.reshape(projected, (*projected.shape[:2], 3, num_heads, -1))
    query, key, value = (jnp.swapaxes(split[:, :, i], 1, 2) for i in range(3))
    return query, key, value


def _split_forward(
    projected: jax.Array, num_heads: int
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
    return split_heads(projected, num_heads), None


# The true derivative, as one concatenation: that of three slices is a sum of three padded arrays.
def _split_backward(
    num_heads: int, stored: None, slopes: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array]:
    del num_heads, stored
    batch, _, tokens, _ = slopes[0].shape
    parts = [jnp.reshape(jnp.swapaxes(x, 1, 2), (batch, tokens, -1)) for x in slopes]
    return (jnp.concatenate(parts, axis=-1),)


split_heads.defvjp(_split_forward, _split_backward)


def row_spread(scores: jax.Array, pairs: jax.Array) -> jax.Array:
    """Returns the standard deviation of a row's scores over its keys, `[B, H, T, 1]`, for scores `[B, H, T, S]`."""
    exists = jnp.broadcast_to(pairs, scores.shape)
    number = jnp.maximum(jnp.sum(exists, axis=-1, keepdims=True), 1.0)
    mean = row_products(exists, scores) / number
    return jnp.sqrt(row_products(exists, jnp.square(scores - mean)) / number)
