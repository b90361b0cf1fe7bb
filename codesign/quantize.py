"""Quantisers with trainable range, step or bitwidth, and the integer helpers of the hard path.

A signed quantiser of b bits is symmetric: codes in [-(2^(b-1)-1), 2^(b-1)-1], scale
`range / (2^(b-1)-1)`. The deployed width is `floor(b + 0.5)`. Bounds on b are kept by projection
after the optimiser step; a clip in the forward pass would have no gradient at its rails.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import ArrayLike as NumpyArrayLike, NDArray

from codesign import gates
from codesign.errors import CodesignError

# Widths of the requantisation multiplier (docs/integer_path.md).
MANTISSA_BITS = 15
MAX_SHIFT = 62


def code_limit(bits: Any) -> Any:
    """Returns the largest code of a symmetric signed quantiser, `2**(bits-1) - 1`.

    Args:
      bits: Width, integer-valued: a Python or NumPy integer, or a JAX array (any dtype).

    Returns:
      The limit, exact, in the type of `bits`.
    """
    if not isinstance(bits, jax.Array):
        return 2 ** (bits - 1) - 1
    # exp2 isn't exact in float32 on every backend; ldexp is.
    return jnp.ldexp(jnp.ones_like(bits), jnp.round(bits).astype(jnp.int32) - 1) - 1


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2 to an integer-valued power, exactly (exp2 is not exact on every backend).

    Args:
      exponent: Integer-valued, any shape, floating dtype of the result.
    """
    return jnp.ldexp(jnp.ones_like(exponent), jnp.round(exponent).astype(jnp.int32))


def exact_einsum(subscripts: str, a: jax.Array, b: jax.Array, bits: int) -> jax.Array:
    """Contracts the last axes of two arrays of signed integers exactly, by the fastest type that holds all sums.

    8-bit integers multiply several times faster than floating point where a processor has instructions for them.

    Args:
      subscripts: Einsum subscripts of `a` and `b` that contract one axis, the last of `a`.
      a: Integer-valued array.
      b: Integer-valued array.
      bits: Bits that hold every element of both, sign included: at least -2^(bits-1) and less than 2^(bits-1).

    Returns:
      The contraction, every value an exact integer: int32 of 8-bit operands, else float32 where that is exact, else float64
      (which needs 64-bit mode).

    Raises:
      AssertionError: If the sums could leave the exact range of the widest type.
    """
    bound = 4 ** (bits - 1) * a.shape[-1]
    if bits <= 8 and bound < 2**31:
        product: jax.Array = jnp.einsum(
            subscripts, a.astype(jnp.int8), b.astype(jnp.int8), preferred_element_type=jnp.int32
        )
        return product
    assert bound < 2**53, "sums leave the exact range of float64"
    dtype = jnp.float32 if bound < 2**24 else jnp.float64
    result: jax.Array = jnp.einsum(
        subscripts, a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST
    )
    return result


def round_ste(x: jax.Array) -> jax.Array:
    """Rounds half to even, with the derivative of the identity (true derivative: zero)."""
    return gates.straight_through(jnp.round(x), x)


def deployed_bits(bits: jax.Array, min_bits: ArrayLike, max_bits: ArrayLike) -> jax.Array:
    """Returns the deployed width of trained bits, `floor(bits + 0.5)` within its bounds."""
    return jnp.clip(jnp.floor(bits + 0.5), min_bits, max_bits)


def _rounded(x: jax.Array, range_: jax.Array, bits: jax.Array) -> jax.Array:
    """Returns the nearest value of integer-valued `bits`; below 2 bits only the code 0 exists."""
    limit = code_limit(bits)
    # Not x / scale: where range and limit divide evenly, ties stay ties, as in the integer path.
    codes = jnp.round(x * (jnp.maximum(limit, 1.0) / range_))
    return _scale(range_, limit) * jnp.clip(codes, -limit, limit)


def _quantize(x: jax.Array, range_: jax.Array, bits: jax.Array) -> jax.Array:
    """Returns Q_b(x) for integer-valued `bits`.

    True derivatives: zero almost everywhere. Substituted: those of `x` plus a rounding error that grows with the range,
    and beyond the range those of its end.
    """
    value = _rounded(x, range_, bits)
    # A comparison instead of clip(), whose derivative at the largest element would be 1/2.
    inside = x + range_ * gates.detach((value - x) / range_)
    soft = jnp.where(jnp.abs(x) <= range_, inside, jnp.sign(x) * range_)
    return gates.straight_through(value, jnp.where(code_limit(bits) >= 1.0, soft, 0.0))


def _scale(range_: jax.Array, limit: jax.Array) -> jax.Array:
    """Returns the value of one code; 0 where only the code 0 exists."""
    return jnp.where(limit >= 1.0, range_ / jnp.maximum(limit, 1.0), 0.0)


def quantize(x: jax.Array, range_: ArrayLike, bits: ArrayLike) -> jax.Array:
    """Quantises to a width that is not trained.

    Args:
      x: Values, any shape.
      range_: Largest magnitude represented, unit of `x`, > 0, broadcast against `x`.
      bits: Width, broadcast against `x`; `floor(bits + 0.5)` is used and gets no gradient.

    Returns:
      Quantised values, shape and dtype of `x`. Derivative with respect to `x`: 1 inside the
      range, 0 outside (true: 0); to `range_`: `(round(x/s) - x/s) / limit` inside, +-1 outside.

    References:
      Esser et al., "Learned Step Size Quantization", arXiv 1902.08153.
    """
    return _quantize(x, jnp.asarray(range_, x.dtype), jnp.floor(jnp.asarray(bits, x.dtype) + 0.5))


def interpolated_quantize(
    x: jax.Array,
    range_: ArrayLike,
    bits: ArrayLike,
    *,
    max_bits: ArrayLike,
    straight_through: bool,
) -> jax.Array:
    """Quantises to a trained, fractional width between its two integer neighbours.

    With `lo = min(floor(b), max_bits - 1)` and `p = b - lo` the soft value is
    `(1-p) Q_lo(x) + p Q_(lo+1)(x)`, whose derivative `Q_(lo+1) - Q_lo` doesn't vanish at
    integer b.

    Args:
      x: Values, any shape.
      range_: Largest magnitude represented, unit of `x`, > 0, broadcast against `x`.
      bits: Width, at most `max_bits`, broadcast against `x`.
      max_bits: Largest deployable width, integer-valued, broadcast against `bits`.
      straight_through: Whether the forward value is exactly that of the deployed width
        `floor(b + 0.5)`, with the derivatives of the soft value.

    Returns:
      Quantised values, shape and dtype of `x`; derivatives to `x` and `range_` as in `quantize`.

    References:
      Yang and Jin, "FracBits", arXiv 2007.02017. Differs: lo and lo + 1, not floor and ceil.
    """
    range_ = jnp.asarray(range_, x.dtype)
    bits = jnp.asarray(bits, x.dtype)
    low_bits = jnp.minimum(jnp.floor(bits), jnp.asarray(max_bits, x.dtype) - 1.0)
    if straight_through:
        return _quantize_as_deployed(x, range_, bits, low_bits)
    fraction = bits - low_bits
    low = _quantize(x, range_, low_bits)
    high = _quantize(x, range_, low_bits + 1.0)
    return (1.0 - fraction) * low + fraction * high


@jax.custom_vjp
def _quantize_as_deployed(
    x: jax.Array, range_: jax.Array, bits: jax.Array, low_bits: jax.Array
) -> jax.Array:
    """Returns Q_b(x) at the deployed width, with the derivatives of the interpolation between `low_bits` and one more.

    True derivatives: zero almost everywhere. Substituted, in closed form: those of
    `(1-p) Q_lo(x) + p Q_(lo+1)(x)` as automatic differentiation finds them, where rounding counts as the identity:
    1 to `x` inside the range, `Q_(lo+1) - Q_lo` to `bits`, and to `range_` the rest of the value over the range,
    `(Q - x) / range_` inside and `Q / range_` outside.
    """
    return _rounded(x, range_, low_bits + (bits - low_bits >= 0.5).astype(x.dtype))


def _quantize_forward(
    x: jax.Array, range_: jax.Array, bits: jax.Array, low_bits: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _quantize_as_deployed(x, range_, bits, low_bits), (x, range_, bits, low_bits)


def _quantize_backward(
    stored: tuple[jax.Array, ...], slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x, range_, bits, low_bits = stored
    fraction = bits - low_bits
    low, high = _rounded(x, range_, low_bits), _rounded(x, range_, low_bits + 1.0)
    # Below 2 bits there is no code but 0, whatever x is.
    has_codes = (low_bits >= 2.0) * (1.0 - fraction) + (low_bits >= 1.0) * fraction
    to_x = jnp.where(jnp.abs(x) <= range_, slope * has_codes, 0.0)
    to_range = slope * (low + fraction * (high - low)) - to_x * x
    return (
        to_x,
        sum_to_shape(to_range, range_.shape) / range_,
        sum_to_shape(slope * (high - low), bits.shape),
        jnp.zeros_like(low_bits),
    )


_quantize_as_deployed.defvjp(_quantize_forward, _quantize_backward)


def sum_to_shape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the sums of `x` over the axes along which an array of `shape` was broadcast to it."""
    first = x.ndim - len(shape)
    axes = [*range(first), *(first + i for i, n in enumerate(shape) if n != x.shape[first + i])]
    return jnp.reshape(jnp.sum(x, axis=axes), shape)


def quantize_probabilities(
    probabilities: jax.Array, bits: ArrayLike, *, max_bits: ArrayLike, straight_through: bool
) -> jax.Array:
    """Quantises probabilities to codes 0..2^(b-1)-1 of scale `1 / (2^(b-1)-1)`.

    Args:
      probabilities: Values in [0, 1], any shape.
      bits: Width (its sign bit unused), broadcast against `probabilities`.
      max_bits: Largest deployable width, broadcast against `bits`.
      straight_through: As in `interpolated_quantize`.

    Returns:
      Quantised probabilities, same shape; they need not sum to 1.
    """
    if straight_through:
        bits = jnp.asarray(bits, probabilities.dtype)
        most = jnp.asarray(max_bits, probabilities.dtype)
        return _deployed_probabilities(
            probabilities, bits, jnp.minimum(jnp.floor(bits), most - 1.0)
        )
    return interpolated_quantize(
        probabilities, 1.0, bits, max_bits=max_bits, straight_through=False
    )


def _nearest(fractions: jax.Array, bits: jax.Array) -> jax.Array:
    """Returns the nearest value of integer-valued `bits`, at least 2, of what lies inside the range 1."""
    limit = code_limit(bits)
    nearest: jax.Array = jnp.round(fractions * limit) * (1.0 / limit)
    return nearest


@jax.custom_vjp
def _deployed_probabilities(
    probabilities: jax.Array, bits: jax.Array, low_bits: jax.Array
) -> jax.Array:
    """Returns what `_quantize_as_deployed` does with the range 1, which a probability never leaves: nothing to compare."""
    return _nearest(probabilities, low_bits + (bits - low_bits >= 0.5).astype(bits.dtype))


def _probabilities_forward(
    probabilities: jax.Array, bits: jax.Array, low_bits: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    value = _deployed_probabilities(probabilities, bits, low_bits)
    return value, (probabilities, bits, low_bits)


def _probabilities_backward(
    stored: tuple[jax.Array, ...], slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    probabilities, bits, low_bits = stored
    gap = _nearest(probabilities, low_bits + 1.0) - _nearest(probabilities, low_bits)
    return slope, sum_to_shape(slope * gap, bits.shape), jnp.zeros_like(low_bits)


_deployed_probabilities.defvjp(_probabilities_forward, _probabilities_backward)


def error_scaling_quantize(x: jax.Array, fraction_bits: jax.Array) -> jax.Array:
    """Rounds to a trained number of fraction bits, whose gradient is the scaled rounding error.

    Args:
      x: Values, already clipped to their range, any shape.
      fraction_bits: f, broadcast against `x`; `floor(f + 0.5)` is used.

    Returns:
      `round(x 2^f) / 2^f`. Derivative with respect to `x`: 1; to f: `ln2 (x - xq)` (true: 0).

    References:
      Sun et al., "HGQ: Gradient-based automatic mixed precision quantization", arXiv 2405.00645.
    """
    exponent = jnp.floor(fraction_bits + 0.5).astype(jnp.int32)
    one = jnp.ones_like(fraction_bits)
    rounded = jnp.round(x * jnp.ldexp(one, exponent)) * jnp.ldexp(one, -exponent)
    error = gates.detach(x - rounded)
    return gates.straight_through(rounded, x + np.log(2.0) * error * fraction_bits)


def inferred_bits(step: jax.Array, range_: jax.Array, *, is_signed: bool = True) -> jax.Array:
    """Returns the width that a step and a range imply.

    Args:
      step: Quantisation step, > 0.
      range_: Largest magnitude, unit of `step`, > 0, same shape.
      is_signed: Whether a sign bit is needed.

    Returns:
      `ceil(log2(range/step + 1))`, plus 1 if signed; the derivative is that without the ceil.

    References:
      Uhlich et al., "Mixed precision DNNs: all you need is a good parametrization",
      arXiv 1905.11452.
    """
    bits = jnp.log2(range_ / step + 1.0) + float(is_signed)
    return gates.straight_through(jnp.ceil(bits), bits)


def step_range_quantize(x: jax.Array, step: jax.Array, range_: jax.Array) -> jax.Array:
    """Quantises with a trained step and a trained range; their ratio implies the bits.

    Args:
      x: Values, any shape.
      step: Quantisation step, unit of `x`, > 0, broadcast against `x`.
      range_: Largest magnitude, unit of `x`, broadcast against `x`.

    Returns:
      Quantised values. Derivative with respect to `step`: `(xq - x) / step` inside the range,
      0 outside; to `range_`: 0 inside, `sign(x)` outside.

    References:
      Uhlich et al., arXiv 1905.11452.
    """
    inside = step * round_ste(x / step)
    return jnp.where(jnp.abs(x) <= range_, inside, jnp.sign(x) * range_)


def lsq_quantize(x: jax.Array, step: jax.Array, bits: int) -> jax.Array:
    """Quantises with one trained step at a fixed width, codes in [-2^(b-1), 2^(b-1)-1].

    Args:
      x: Values, any shape.
      step: Quantisation step of the whole tensor, scalar, unit of `x`, > 0.
      bits: Width.

    Returns:
      Quantised values. Derivative with respect to `x`: 1 inside, 0 outside; to `step`:
      `round(x/s) - x/s` inside, the extreme code outside, times `1/sqrt(x.size * (2^(b-1)-1))`.

    References:
      Esser et al., "Learned Step Size Quantization", arXiv 1902.08153.
    """
    limit = code_limit(bits)
    # Same step, gradient scaled so that its size is that of a weight's update.
    step = gates.straight_through(step, step / np.sqrt(x.size * limit))
    ratio = x / step
    below, above = ratio < -limit - 1, ratio > limit
    clipped = jnp.where(below, -limit - 1.0, jnp.where(above, float(limit), ratio))
    return step * round_ste(clipped)


def lsq_initial_step(x: jax.Array, bits: int) -> jax.Array:
    """Returns the starting step of `lsq_quantize`, `2 mean|x| / sqrt(2^(b-1)-1)`, unit of `x`."""
    return 2.0 * jnp.mean(jnp.abs(x)) / float(np.sqrt(code_limit(bits)))


def nested_residual_quantize(
    x: jax.Array, low: jax.Array, high: jax.Array, switches: Sequence[jax.Array]
) -> jax.Array:
    """Quantises as a sum of residuals at 2, 4, 8, ... bits, each with its own gate.

    `xq = z2 (x2 + z4 (x4 + z8 (x8 + ...)))`: closing z4 leaves 2 bits, closing z2 prunes.

    Args:
      x: Values, any shape.
      low: Smallest value represented, unit of `x`, broadcast against `x`.
      high: Largest value represented, unit of `x`, broadcast against `x`.
      switches: Gates z2, z4, z8, ... in [0, 1], each broadcast against `x`.

    Returns:
      Quantised values, same shape; derivative with respect to `x` by straight-through rounding.

    References:
      van Baalen et al., "Bayesian Bits", arXiv 2005.07093.
    """
    clipped = jnp.where(x < low, low, jnp.where(x > high, high, x))
    step = (high - low) / 3.0
    residual, is_open, total = clipped, jnp.ones_like(x), jnp.zeros_like(x)
    for doubling, switch in enumerate(switches):
        if doubling:
            step = step / (2.0 ** (2**doubling) + 1.0)
        part = step * round_ste(residual / step)
        residual = residual - part
        is_open = is_open * switch
        total = total + is_open * part
    return total


def ebops(macs: jax.Array, bits_a: jax.Array, bits_b: jax.Array) -> jax.Array:
    """Returns effective bit operations, `sum MACs * b_a * b_b`.

    At fractional bits this is the mean over the four pairs of integer neighbours, weighted as
    `interpolated_quantize` weights them.

    Args:
      macs: Multiply-accumulates, any shape, MAC.
      bits_a: Width of the first operand, broadcast against `macs`, bit.
      bits_b: Width of the second operand, broadcast against `macs`, bit.

    Returns:
      Bit operations, scalar, MAC bit^2.

    References:
      Sun et al., "HGQ", arXiv 2405.00645.
    """
    return jnp.sum(macs * bits_a * bits_b)


def quantize_codes(
    x: NumpyArrayLike, scale: NumpyArrayLike, bits: NumpyArrayLike
) -> NDArray[np.int64]:
    """Returns the integer codes of `x`, rounded half to even and clipped, in float64.

    Args:
      x: Values, any shape.
      scale: Value of one code, unit of `x`, > 0, broadcast against `x`.
      bits: Width, integer, broadcast against `x`.

    Returns:
      Codes in [-(2^(bits-1)-1), 2^(bits-1)-1], shape of `x`.
    """
    limit = code_limit(np.asarray(bits, np.int64))
    codes = np.rint(np.asarray(x, np.float64) / np.asarray(scale, np.float64))
    clipped: NDArray[np.int64] = np.clip(codes, -limit, limit).astype(np.int64)
    return clipped


def multiplier(x: NumpyArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the integer multiply and right shift that stand for a real factor.

    Args:
      x: Factors, any shape, finite, >= 0, dimensionless.

    Returns:
      `(mantissa, shift)` with `x ~ mantissa * 2**-shift` to within `2**-15` of `x`,
      `2**14 <= mantissa < 2**15` and `0 <= shift <= 62`; (0, 0) where `x` is 0.

    Raises:
      CodesignError: If a factor is negative, not finite, or beyond the range of shifts.
    """
    factors = np.asarray(x, np.float64)
    if not np.all(np.isfinite(factors) & (factors >= 0)):
        raise CodesignError(
            f"`x` must be finite and >= 0 to become a multiplier, got {_worst(factors)}. "
            "Check the calibrated scales."
        )
    fraction, exponent = np.frexp(factors)
    mantissa = np.rint(fraction * 2.0**MANTISSA_BITS).astype(np.int64)
    carried = mantissa == 2**MANTISSA_BITS  # a fraction just below 1 rounds up to 1
    mantissa = np.where(carried, mantissa // 2, mantissa)
    shift = np.where(mantissa == 0, 0, MANTISSA_BITS - exponent.astype(np.int64) - carried)
    is_outside = (shift < 0) | (shift > MAX_SHIFT)
    if np.any(is_outside):
        raise CodesignError(
            f"`x` must lie in [2^{MANTISSA_BITS - 1 - MAX_SHIFT}, 2^{MANTISSA_BITS}) to become a "
            f"multiplier, got {factors[is_outside].flat[0]}. Check the calibrated scales."
        )
    return mantissa, shift


def _worst(factors: NDArray[np.float64]) -> float:
    """Returns the first factor that is negative or not finite."""
    return float(factors[~(np.isfinite(factors) & (factors >= 0))].flat[0])
