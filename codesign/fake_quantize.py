"""Fake quantisation as a policy's knobs say: what enters a linear layer, its weight, and the operands of attention.

Every function takes one layer's knobs. The forward value is the deployed one on the straight-through path, an interpolation
between the two nearest widths on the relaxed path.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from codesign import gates
from codesign.backward import kept
from codesign.gates import Relaxation
from codesign.policy import BITS_RANGE, bits_range, group
from codesign.quantize import (
    code_limit,
    deployed_bits,
    interpolated_quantize,
    quantize_probabilities,
)

SOFTMAX_EPSILON = 1e-9
"""Keeps a row without kept mass finite on the soft path (Energon's specification, section 3; dimensionless)."""
TABLE_BITS = 10.0
"""Width in bit of the code that enters the table of a non-linearity (docs/integer_path.md)."""
RESIDUAL_BITS = 16
"""Width in bit of the residual stream (docs/integer_path.md)."""
WIDTHS = {"query": "qk_bits", "key": "qk_bits", "value": "v_bits"}
"""The knob that gives an attention operand its width."""
MIN_DENSITY = 1e-6
"""Keeps the logarithm of a density finite where all codes are zero (ours)."""
MIN_WEIGHT_RANGE = 1e-12
"""Smallest range of a weight, so that a column of zeros still has a scale (unit of the weight)."""


def counted_widths(knobs: Mapping[str, jax.Array], relaxation: Relaxation) -> dict[str, jax.Array]:
    """Returns the widths that counts use, in bit: deployed straight-through, fractional on the relaxed path."""
    widths = {}
    for name, value in knobs.items():
        if group(name) == "bits":
            low, high = bits_range(name)
            deployed = deployed_bits(value, low, high)
            widths[name] = (
                gates.straight_through(deployed, value) if relaxation.straight_through else value
            )
    return widths


def density_of_width(
    left: jax.Array, width: jax.Array, share: jax.Array | float = 1.0
) -> jax.Array:
    """Returns the fraction of codes that are not zero, with its derivative to their width added.

    Codes are zero within half a step. Of exponentially distributed magnitudes a fraction `exp(-step / 2 s)` is not, whose
    derivative to the width is `-ln 2 left ln(left)` (ours). Without it, a machine that skips zeros seems to gain from a
    narrower width only what its narrower operands save.

    Args:
      left: The fraction as it is, any shape; its own derivative stays.
      width: Width of the codes, scalar, bit.
      share: Part of the elements whose zeros come from rounding, not from a threshold above half a step.
    """
    known = gates.detach(jnp.clip(left, MIN_DENSITY, 1.0))
    modelled = known ** jnp.exp2(-share * (width - gates.detach(width)))
    return left + (modelled - gates.detach(modelled))


def weight_density(
    quantised: jax.Array,
    pruned: jax.Array,
    scale: jax.Array,
    knobs: Mapping[str, jax.Array],
    site: str,
) -> jax.Array:
    """Returns the fraction of a quantised weight that is not zero, scalar, with its derivatives.

    Args:
      quantised: `[inputs, outputs]`.
      pruned: What carries the derivative to a threshold of pruning, scalar.
      scale: Real value of one code, `[1, outputs]`.
      knobs: The layer's knobs.
      site: Which weight.
    """
    stored = jnp.mean((quantised != 0.0).astype(quantised.dtype))
    share: jax.Array | float = 1.0
    if "weight_threshold" in knobs:
        cut = gates.detach(jax.nn.softplus(knobs["weight_threshold"]))
        share = jnp.mean((0.5 * scale > cut).astype(quantised.dtype))
    left = gates.straight_through(stored, pruned)
    return density_of_width(left, knobs[f"{site}.weight_bits"], share)


def largest_code(knobs: Mapping[str, jax.Array], width: str) -> jax.Array:
    """Returns the largest code of a knob's deployed width, constant, shape of the knob."""
    limit: jax.Array = code_limit(deployed_bits(knobs[width], *bits_range(width)))
    return gates.detach(limit)


def tensor_scale(range_: jax.Array, knobs: Mapping[str, jax.Array], name: str) -> jax.Array:
    """Returns the real value of one code, constant.

    Args:
      range_: Calibrated absolute maximum of the tensor, scalar, its unit.
      knobs: The layer's knobs.
      name: `query`, `key` or `value`; `gelu` (what enters a non-linearity's table); or the site of an activation.
    """
    real = gates.detach(range_)
    if name == "gelu":
        table: jax.Array = code_limit(jnp.asarray(TABLE_BITS, real.dtype))
        return real / table
    if name in WIDTHS:
        return real / largest_code(knobs, WIDTHS[name])
    clip = gates.detach(jnp.exp(knobs[f"{name}.activation_clip"]))
    return real * clip / largest_code(knobs, f"{name}.activation_bits")


def quantize_activation(
    x: jax.Array,
    range_: jax.Array,
    knobs: Mapping[str, jax.Array],
    site: str,
    relaxation: Relaxation,
) -> jax.Array:
    """Returns `x` quantised as the activation of `site`, its range the calibrated one times exp(clip)."""
    return interpolated_quantize(
        x,
        range_ * jnp.exp(knobs[f"{site}.activation_clip"]),
        knobs[f"{site}.activation_bits"],
        max_bits=BITS_RANGE["linear"][1],
        straight_through=relaxation.straight_through,
    )


def weight_range(kernel: jax.Array, site: str) -> jax.Array:
    """Returns the largest magnitude of each output column `[1, outputs]`; of the tensor `[1, 1]` for `head`."""
    axes = (0, 1) if site == "head" else (0,)
    return jnp.maximum(jnp.max(jnp.abs(kernel), axis=axes, keepdims=True), MIN_WEIGHT_RANGE)


def quantize_weight(
    kernel: jax.Array, knobs: Mapping[str, jax.Array], site: str, relaxation: Relaxation
) -> jax.Array:
    """Returns the weight quantised by output column (by tensor for `head`: one scale for all logits).

    Its range is the largest magnitude times exp(clip).
    """
    return interpolated_quantize(
        kernel,
        gates.detach(kept(weight_range(kernel, site))) * jnp.exp(knobs[f"{site}.weight_clip"]),
        knobs[f"{site}.weight_bits"],
        max_bits=BITS_RANGE["linear"][1],
        straight_through=relaxation.straight_through,
    )


def weight_scale(kernel: jax.Array, knobs: Mapping[str, jax.Array], site: str) -> jax.Array:
    """Returns the real value of one code of a weight, constant, `[1, outputs]` or `[1, 1]`."""
    clip = jnp.exp(knobs[f"{site}.weight_clip"])
    return gates.detach(weight_range(kernel, site) * clip) / largest_code(
        knobs, f"{site}.weight_bits"
    )


def operand_codes(
    x: jax.Array,
    scale: jax.Array,
    knobs: Mapping[str, jax.Array],
    name: str,
    relaxation: Relaxation,
) -> jax.Array:
    """Returns the codes of query, key or value; `scale` is the real value of one (`tensor_scale`)."""
    # In units of the code: integers come out exact, so that a filter's floor sees no rounding error.
    return interpolated_quantize(
        x / scale,
        largest_code(knobs, WIDTHS[name]),
        knobs[WIDTHS[name]],
        max_bits=BITS_RANGE["attention"][1],
        straight_through=relaxation.straight_through,
    )


def attention_probabilities(
    logits: jax.Array,
    weights: jax.Array,
    knobs: Mapping[str, jax.Array],
    relaxation: Relaxation | None,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Returns attention probabilities over the kept keys; gates multiply the exponentials.

    Args:
      logits: `[B, H, T, S]`.
      weights: Keep weights in [0, 1], `[B, H, T, S]`.
      knobs: The layer's knobs.
      relaxation: None: not quantised.
      mask: True for pairs that exist, `[B, H, T, S]`; a row without any gives zeros. None: `weights` say all.
    """
    probabilities = gates.masked_softmax(logits, weights, epsilon=SOFTMAX_EPSILON, mask=mask)
    if relaxation is None:
        return probabilities
    return quantize_probabilities(
        probabilities,
        knobs["qk_bits"],
        max_bits=BITS_RANGE["attention"][1],
        straight_through=relaxation.straight_through,
    )
