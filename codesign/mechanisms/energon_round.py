"""One round of Energon's filter: which of a row's alive keys lie above its threshold, in three forms that agree.

`hard_round` is what the chip does. `soft_round` is its relaxation, differentiated automatically: the definition of every
derivative. `deployed_round` has the forward value of the first and the derivatives of the second, written out: it takes a
fraction of their time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from codesign import gates
from codesign.backward import kept, row_products
from codesign.policy import bits_range
from codesign.quantize import power_of_two

ALPHA_ONE = 128
"""alpha is stored in 1/128 (8 bits, 7 of them fraction)."""
OFF_CODE = -128
"""Storage code of a round that keeps all."""
FILTER_BITS = 8
"""Most bits of a filter's codes."""
FAR = 2.0**26
"""Further apart than any two scores."""


def hard_round(scores: jax.Array, alive: jax.Array, code: jax.Array) -> jax.Array:
    """Returns which alive keys survive a round, by the integer threshold of the row.

    `theta = floor((|a| m + (128-|a|) mean) / 128)` with m the maximum (a >= 0) or the minimum of the alive scores,
    computed without a product or division per pair; strict comparison; the alive key of lowest index that has the
    maximum stays.

    Args:
      scores: Integer scores, int32 `[B, H, T, S]`; `S * max|score|` must stay below 2^31.
      alive: Keys alive at the start of the round, bool `[B, H, T, S]`.
      code: Storage codes, int32 `[H]`.

    Returns:
      Survivors, bool `[B, H, T, S]`.

    References:
      Energon's specification, section 2, "integer threshold": equal to the rational definition.
    """
    total = jnp.sum(jnp.where(alive, scores, 0), axis=-1, keepdims=True, dtype=jnp.int32)
    values = scores.astype(jnp.float32)
    facts = _row_facts(values, alive.astype(jnp.float32), total, code)
    return alive & _survives(values, facts)


@struct.dataclass
class RowFacts:
    """What a round knows of each row's alive keys, whole numbers in floating point but for the mean, `[B, H, T, 1]`.

    Their `number` (at least 1), their `mean`, the `extreme` (maximum where the code is >= 0, else minimum), the number of
    `ties` that have it (at least 1), the integer threshold `theta`, and the index of the key that stays whatever the
    threshold, `forced` (-1: none).
    """

    number: jax.Array
    mean: jax.Array
    extreme: jax.Array
    ties: jax.Array
    theta: jax.Array
    forced: jax.Array


def exact_total(query: jax.Array, key: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the sum of each row's alive scores, exactly, int32 `[B, H, T, 1]`; not differentiable.

    The sum of products with a query is the product with the sum of the keys, whose elements are small: float32 holds them,
    where it would round a sum of scores of 8-bit operands.

    Args:
      query: Filter's queries, whole numbers of at most 8 bits, `[B, H, T, d]`.
      key: Filter's keys, transposed, likewise, `[B, H, d, S]`.
      weights: 1 for keys alive, else 0, `[B, H, T, S]`.
    """
    query, key, weights = (jax.lax.stop_gradient(x) for x in (query, key, weights))
    sums = jnp.matmul(weights, jnp.swapaxes(key, 2, 3), precision=jax.lax.Precision.HIGHEST)
    products = query.astype(jnp.int32) * sums.astype(jnp.int32)
    total: jax.Array = kept(jnp.sum(products, axis=-1, keepdims=True, dtype=jnp.int32))
    return total


def _row_facts(
    scores: jax.Array, weights: jax.Array, total: jax.Array, code: jax.Array
) -> RowFacts:
    """Returns the facts of a round.

    Reductions of floating-point sums and products are the fast ones: no argmax, no integers, no branch by pair.

    Args:
      scores: Whole numbers, their magnitude at most 2^24, `[B, H, T, S]`.
      weights: 1 for keys alive at the start of the round, else 0, `[B, H, T, S]`.
      total: Sum of the row's alive scores, int32 `[B, H, T, 1]`.
      code: Storage codes, int32 `[H]`.
    """
    dtype, num_keys = scores.dtype, scores.shape[-1]
    a = code.astype(jnp.int32)[None, :, None, None]
    is_upper = a >= 0
    sign = jnp.where(is_upper, 1.0, -1.0).astype(dtype)
    number = jnp.sum(weights, axis=-1, keepdims=True).astype(jnp.int32)
    # Exact for alive keys; the others are out of the way.
    signed = scores * sign - FAR * (1.0 - weights)
    top = jnp.max(signed, axis=-1, keepdims=True)
    # The lowest index among equals: below the top, ranks are not positive.
    index = jnp.arange(num_keys, dtype=dtype)[None, None, None, :]
    rank = (num_keys - index) + num_keys * (signed - top)
    first = num_keys - jnp.max(rank, axis=-1, keepdims=True)
    ties = jnp.sum(jnp.maximum(1.0 + (signed - top), 0.0), axis=-1, keepdims=True)
    extreme = jnp.where(number > 0, top * sign, 0.0).astype(jnp.int32)
    weight, divisor = jnp.abs(a), jnp.maximum(number, 1)
    quotient = jnp.floor_divide(total, divisor)
    rest = total - quotient * divisor
    mean_part = (ALPHA_ONE - weight) * quotient
    mean_part = mean_part + jnp.floor_divide((ALPHA_ONE - weight) * rest, divisor)
    theta = jnp.right_shift(weight * extreme + mean_part, 7).astype(dtype)
    # The first of the minima is the first of the maxima where all are equal; else a maximum lies above the threshold.
    stays = is_upper | (extreme * number == total)
    return RowFacts(
        number=divisor.astype(dtype),
        mean=total.astype(dtype) / divisor.astype(dtype),
        extreme=extreme.astype(dtype),
        ties=ties,
        theta=jnp.where(a == OFF_CODE, -jnp.inf, theta),
        forced=jnp.where(stays, first, -1.0),
    )


def _survives(scores: jax.Array, facts: RowFacts) -> jax.Array:
    """Returns which keys pass, bool `[B, H, T, S]`, whether alive or not."""
    index = jnp.arange(scores.shape[-1], dtype=scores.dtype)[None, None, None, :]
    return (scores > facts.theta) | (index == facts.forced)


@jax.custom_vjp
def deployed_round(
    scores: jax.Array,
    weights: jax.Array,
    alpha: jax.Array,
    code: jax.Array,
    temperature: jax.Array,
    total: jax.Array,
) -> jax.Array:
    """Returns the survivors of `hard_round` as weights, with the derivatives of `weights * soft_round(...)`.

    True derivatives: zero almost everywhere. Substituted: those of the soft gate at the decisions as they are, to the
    scores (through the mean and the extreme of the row too), to the weights and to alpha; a round that is off passes
    the weights' on.

    Args:
      scores: Whole numbers, `[B, H, T, S]`.
      weights: 1 for keys alive at the start of the round, else 0, `[B, H, T, S]`.
      alpha: Threshold parameter, `[H]`, whose code is `code`.
      code: Storage codes, int32 `[H]`.
      temperature: Width of the gate, scalar, in units of the row's standard deviation.
      total: Sum of the row's alive scores (`exact_total`).
    """
    return _deployed_round_forward(scores, weights, alpha, code, temperature, total)[0]


def _deployed_round_forward(
    scores: jax.Array,
    weights: jax.Array,
    alpha: jax.Array,
    code: jax.Array,
    temperature: jax.Array,
    total: jax.Array,
) -> tuple[jax.Array, tuple[Any, ...]]:
    facts = kept(_row_facts(scores, weights, total, code))
    survivors = jnp.where(_survives(scores, facts), weights, 0.0)
    return survivors, (scores, weights, alpha, code, temperature, facts)


def _deployed_round_backward(stored: tuple[Any, ...], slope: jax.Array) -> tuple[Any, ...]:
    scores, weights, alpha, code, temperature, facts = stored
    a, is_off = alpha[None, :, None, None], (code == OFF_CODE)[None, :, None, None]
    size = jnp.abs(a)
    number, mean = facts.number, facts.mean
    distance = facts.extreme - mean
    variance = row_products(weights, jnp.square(scores - mean)) / number
    width = temperature * gates.gate_width(jnp.sqrt(variance))
    # The sigmoid by its hyperbolic tangent: gate = (1 + t) / 2, gate (1 - gate) = (1 - t^2) / 4.
    t = jnp.tanh((scores - (mean + size * distance)) * (0.5 / width))
    # What moves a score against its threshold; where the round is off, nothing does.
    steepness = jnp.where(is_off, 0.0, 0.25 / width)
    bell = weights * (1.0 - t * t)
    to_margin = slope * bell * steepness
    to_theta = -steepness * row_products(slope, bell)
    to_mean = (1.0 - size) * to_theta / number
    # Equal scores share the derivative of their maximum or minimum.
    share = jnp.where(scores == facts.extreme, weights, 0.0) * (size * to_theta / facts.ties)
    to_scores = to_margin + weights * to_mean + share
    to_weights = slope * (0.5 + 0.5 * jnp.where(is_off, 1.0, t)) + (scores - mean) * to_mean
    to_alpha = jnp.sum(jnp.where(a >= 0.0, distance, -distance) * to_theta, axis=(0, 2, 3))
    return to_scores, to_weights, to_alpha, None, jnp.zeros_like(temperature), None


deployed_round.defvjp(_deployed_round_forward, _deployed_round_backward)


def soft_round(
    scores: jax.Array,
    weights: jax.Array,
    pairs: jax.Array,
    alpha: jax.Array,
    relaxation: gates.Relaxation,
) -> jax.Array:
    """Returns the gate of a round, differentiable in alpha and in the scores.

    `sigmoid((S - theta) / (temperature * std))` with the threshold of `hard_round` before its floor; statistics are
    weighted by the alive weights; maximum and minimum run over keys with w >= 0.5; only the std is held constant.

    Args:
      scores: Scores, `[B, H, T, S]`.
      weights: Alive weights at the start of the round, `[B, H, T, S]`.
      pairs: 1 for pairs that exist, `[B, 1, T, S]`.
      alpha: Threshold parameter in (-1, 1), `[H]`.
      relaxation: Temperature, in units of the row's standard deviation.
    """
    alive = weights >= 0.5
    alive = jnp.where(jnp.any(alive, axis=-1, keepdims=True), alive, pairs > 0.5)
    has_any = jnp.any(alive, axis=-1, keepdims=True)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-6)
    mean = jnp.sum(weights * scores, axis=-1, keepdims=True) / total
    variance = jnp.sum(weights * jnp.square(scores - mean), axis=-1, keepdims=True) / total
    top = jnp.max(jnp.where(alive, scores, -jnp.inf), axis=-1, keepdims=True)
    bottom = jnp.min(jnp.where(alive, scores, jnp.inf), axis=-1, keepdims=True)
    # Finite in a row without any key too: infinity times a zero gradient would be NaN.
    top, bottom = jnp.where(has_any, top, 0.0), jnp.where(has_any, bottom, 0.0)
    a = alpha[None, :, None, None]
    # Written so that it is exact in a row of equal scores, which then get half a gate each.
    theta = mean + a * jnp.where(a >= 0.0, top - mean, mean - bottom)
    soft = gates.Relaxation(
        temperature=relaxation.temperature, smoothness=relaxation.smoothness, straight_through=False
    )
    spread = jnp.sqrt(gates.detach(variance))
    return gates.gate(scores, theta, soft, spread=spread)


def filter_operand(
    code: jax.Array,
    bits: jax.Array,
    width: jax.Array,
    code_bits: jax.Array,
    *,
    straight_through: bool,
) -> jax.Array:
    """Returns the top bits of a code, floor(code * 2^(b - b_a)), differentiable in the code and in b.

    Derivatives: 2^(b - b_a) to the code (true: 0); to the bits the difference of the two neighbouring truncations.

    Args:
      code: Codes of `code_bits` bits, `[..., d]`.
      bits: Trainable width of the filter, scalar.
      width: Deployed width of the filter, scalar.
      code_bits: Deployed width of `code`, scalar.
      straight_through: Whether the forward value is the deployed one.
    """
    bits = jnp.asarray(bits, code.dtype)
    high_limit = bits_range("query_bits")[1]
    low = jnp.minimum(jnp.floor(bits), high_limit - 1.0)
    unit = gates.detach(power_of_two(width - code_bits))
    if straight_through:
        return _deployed_operand(code, bits, low, unit, code_bits)
    fraction = bits - low

    def truncated(b: jax.Array) -> jax.Array:
        step = gates.detach(power_of_two(code_bits - b))
        ratio = code / step
        return gates.straight_through(jnp.floor(ratio), ratio) * step

    return ((1.0 - fraction) * truncated(low) + fraction * truncated(low + 1.0)) * unit


@jax.custom_vjp
def _deployed_operand(
    code: jax.Array, bits: jax.Array, low: jax.Array, unit: jax.Array, code_bits: jax.Array
) -> jax.Array:
    """Returns floor(code * unit); substituted derivatives as `filter_operand` states them (true: zero)."""
    del bits, low, code_bits
    return jnp.floor(code * unit)


def _deployed_operand_forward(
    code: jax.Array, bits: jax.Array, low: jax.Array, unit: jax.Array, code_bits: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _deployed_operand(code, bits, low, unit, code_bits), (code, low, unit, code_bits)


def _deployed_operand_backward(
    stored: tuple[jax.Array, ...], slope: jax.Array
) -> tuple[jax.Array, ...]:
    code, low, unit, code_bits = stored
    coarse, fine = (power_of_two(code_bits - low - extra) for extra in (0.0, 1.0))
    # 1 where the next bit of the code is set.
    gap = jnp.floor(code / fine) - 2.0 * jnp.floor(code / coarse)
    zero = jnp.zeros_like(low)
    return slope * unit, jnp.sum(slope * gap) * fine * unit, zero, zero, zero


_deployed_operand.defvjp(_deployed_operand_forward, _deployed_operand_backward)
