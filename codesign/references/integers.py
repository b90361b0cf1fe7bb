"""Exact integer arithmetic in NumPy; matrix products go through float64.

Below 2**53 float64 holds every integer, so sums that stay there are exact whatever the order of summation.
"""

import functools
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from codesign.errors import ExportError

Integers: TypeAlias = npt.NDArray[np.int64]
IntegerLike: TypeAlias = Integers | np.int64 | int
Booleans: TypeAlias = npt.NDArray[np.bool_]

EXACT_LIMIT = 2**53
"""float64 holds every integer of smaller magnitude."""
BIAS_SHIFT = 8
"""Fraction bits of a sum of products below their scale, for the bias."""


def any_of(mask: Booleans, axis: int, *, keepdims: bool = False) -> Booleans:
    """Returns whether a mask has an element along an axis."""
    return np.asarray(np.any(mask, axis=axis, keepdims=keepdims), np.bool_)


def limit(bits: IntegerLike) -> Integers:
    """Returns the largest code of `bits` bits; codes are symmetric."""
    return (np.asarray(1, np.int64) << (np.asarray(bits, np.int64) - 1)) - 1


def saturate(values: Integers, largest: IntegerLike) -> Integers:
    """Returns `values` clipped to [-largest, largest]."""
    return np.minimum(np.maximum(values, -largest), largest)


def round_shift(values: Integers, shift: IntegerLike) -> Integers:
    """Returns rint(values / 2**shift), ties to even; `shift` in [0, 62] broadcasts."""
    places = np.asarray(shift, np.int64)
    floor = values >> places
    twice_rest = (values - (floor << places)) << 1
    unit = np.asarray(1, np.int64) << places
    is_up = (twice_rest > unit) | ((twice_rest == unit) & (floor & 1 == 1))
    rounded: Integers = floor + is_up
    return rounded


def requantise(values: Integers, mantissa: IntegerLike, shift: IntegerLike) -> Integers:
    """Returns rint(values * mantissa / 2**shift), ties to even; both factors broadcast."""
    return round_shift(exact_product(values, mantissa), shift)


def _peak(values: Integers) -> int:
    """Returns the largest magnitude in `values`, 0 if there are none."""
    return max(int(values.max(initial=0)), -int(values.min(initial=0)))


def exact_product(values: Integers, factor: IntegerLike) -> Integers:
    """Returns `values * factor`.

    Raises:
      ExportError: If a product reaches 2**53.
    """
    factor = np.asarray(factor, np.int64)
    bound = _peak(values) * _peak(factor)
    if bound < EXACT_LIMIT:
        return values * factor
    if bound < 2**63:  # too coarse to decide: the largest factors may not meet
        product: Integers = values * factor
        if _peak(product) < EXACT_LIMIT:
            return product
    raise ExportError(
        "a product reaches 2**53, beyond what the integer path allows: "
        "lower the multipliers of the deployment"
    )


def exact_matmul(a: Integers, b: Integers) -> Integers:
    """Returns `a @ b`.

    Raises:
      ExportError: If a sum could reach 2**53.
    """
    if _peak(a) * _peak(b) * a.shape[-1] >= EXACT_LIMIT:
        raise ExportError(
            "a matrix product may reach 2**53, beyond what the integer path allows: "
            "lower the bits of the deployment"
        )
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)


@functools.cache
def exp_table() -> Integers:
    """Returns 2**16 * 2**(-x) at the middle of 4096 steps of x in [0, 1), `[4096]`."""
    return np.rint(2.0**16 * 2.0 ** (-(np.arange(4096) + 0.5) / 4096)).astype(np.int64)


def exponentials(distance: Integers, mantissa: IntegerLike, shift: IntegerLike) -> Integers:
    """Returns 2**16 times powers of two by table and shift, of distances below a row's largest score.

    Args:
      distance: Whole numbers >= 0, any shape.
      mantissa: Multiplier from a distance to 4096ths of an octave.
      shift: Right shift that follows the multiplier.
    """
    octaves = exact_product(distance, mantissa) >> np.asarray(shift, np.int64)
    result: Integers = exp_table()[octaves & 4095] >> np.minimum(octaves >> 12, 31)
    return result


def leading_one(values: Integers) -> Integers:
    """Returns sign(y) * 2**floor(log2(abs(y))) of every element y, 0 of 0; magnitudes below 2**53."""
    exponent = np.frexp(np.abs(values).astype(np.float64))[1].astype(np.int64) - 1
    signs: Integers = np.sign(values)
    return signs << np.maximum(exponent, 0)


def hybrid_log(values: Integers) -> Integers:
    """Returns the hybrid logarithm of every element: 0, or 2**e or 3 * 2**(e - 1) near it; magnitudes below 2**50.

    With e the place of the leading one and f = |y| / 2**e - 1: 2**e for f below 1/4, 1.5 times that below 3/4, else
    2**(e + 1).
    """
    size = np.abs(values)
    lead = leading_one(size)
    # In quarters of a unit: the fractions of 2**e are whole.
    excess = 4 * (size - lead)
    level = np.where(excess < lead, 4 * lead, np.where(excess < 3 * lead, 6 * lead, 8 * lead))
    codes: Integers = np.sign(values) * (level >> 2)
    return codes


def linear_output(
    sums: Integers, arrays: Mapping[str, Integers], site: str, columns: slice = slice(None)
) -> Integers:
    """Returns sums of products of the linear layer `site`, last axis its `columns`, with their bias and requantised."""
    bias, mantissa, shift = (
        arrays[f"{site}_{name}"][columns] for name in ("bias", "mantissa", "shift")
    )
    return requantise((sums << BIAS_SHIFT) + bias, mantissa, shift)


def estimated_operand(
    layer: Mapping[str, Integers], sums: Integers, part: int, num_heads: int
) -> Integers:
    """Returns the codes that estimated sums of Q (`part` 0), K (1) or V (2) become.

    Args:
      layer: Arrays of the layer.
      sums: Estimates of inputs times the weights of that part, `[B, T, H*d]`.
      part: Which of the three.
      num_heads: H.

    Returns:
      Codes `[B, H, T, d]`.
    """
    width = sums.shape[-1]
    codes = linear_output(sums, layer, "qkv", slice(part * width, (part + 1) * width))
    largest = limit(layer["v_bits" if part == 2 else "qk_bits"])
    split = saturate(codes, largest).reshape(*sums.shape[:2], num_heads, -1)
    return np.swapaxes(split, 1, 2)
