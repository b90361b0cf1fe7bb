"""Static ranges, measured once on a fixed set of batches, then constant.

The deployed path never depends on a batch's make-up or padding: ranges are the absolute maxima over unpadded elements of
the calibration batches.
"""

import jax
import jax.numpy as jnp
from flax import struct

MIN_RANGE = 1e-6
"""Smallest range, so that a tensor that is always zero still has a scale (unit of the tensor)."""


@struct.dataclass
class Calibration:
    """Absolute maxima by tensor, each in the unit of its tensor.

    `layers` `[L]`: the activations entering `qkv`, `out`, `up`, `down`; `query`, `key`, `value`; `scores` (their product);
    `gelu` (the input of the non-linearity); `attention_branch`, `ffn_branch`. `ends` `[]`: the activations entering the
    model's `end_sites`; `pooled` (the input of the pooler's non-linearity); `residual`, the largest of the residual stream.
    """

    layers: dict[str, jax.Array]
    ends: dict[str, jax.Array]


def merge(first: Calibration, second: Calibration) -> Calibration:
    """Returns the ranges that cover both calibrations."""
    merged: Calibration = jax.tree.map(jnp.maximum, first, second)
    return merged


def floored(calibration: Calibration) -> Calibration:
    """Returns the ranges with `MIN_RANGE` as the smallest."""
    result: Calibration = jax.tree.map(lambda leaf: jnp.maximum(leaf, MIN_RANGE), calibration)
    return result
