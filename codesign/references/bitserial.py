"""Bit-serial early termination in integers: partial sums plane by plane, and bounds by what the bits to come can do.

The planes are read from the keys one by one, as BitStopper (arXiv 2512.06457) states them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from codesign.errors import ExportError
from codesign.references.integers import Booleans, Integers, exact_matmul
from codesign.references.protocol import Layer, LayerTensors, Reference, Shapes
from codesign.structure import ModelStructure

CODE_BITS = 12  # of a query, and planes of a key at most
PLANES = (4, 12)
OFF = 2**30 - 1  # nothing is dropped


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shapes of distances and numbers of planes."""
    layers = structure.num_layers
    return {"threshold": (layers, structure.num_heads, 1), "plane_bits": (layers,)}


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shapes of what each plane leaves, `[L, 12, B, H, T, S]`, and of the scores by planes."""
    pairs = (batch_size, structure.num_heads, num_tokens, num_tokens)
    return {
        "keep": (structure.num_layers, CODE_BITS, *pairs),
        "raw_scores": (structure.num_layers, *pairs),
    }


def check(structure: ModelStructure, layers: Mapping[str, npt.NDArray[Any]]) -> None:
    """Checks that there is one distance; raises `ExportError`."""
    del layers
    if structure.num_rounds != 1:
        raise ExportError(f"`num_rounds` must be 1 for `bitserial`, got {structure.num_rounds}")


def reference_planes(
    query: Integers, key: Integers, exists: Booleans, distance: Integers, planes: int
) -> tuple[Integers, Booleans, Integers]:
    """Returns partial sums `[p, B, H, T, S]`, keys left after each plane, and bounds `[2, p, B, H, T, S]`.

    Args:
      query: Codes of at most 12 bits, `[B, H, T, d]`.
      key: Codes of p bits, `[B, H, S, d]`.
      exists: Pairs that exist, `[B, 1, T, S]`.
      distance: t in units of a score, `[H]`.
      planes: p.
    """
    positive, negative = (
        np.sum(part, axis=-1, keepdims=True)
        for part in (np.maximum(query, 0), np.minimum(query, 0))
    )
    alive = np.broadcast_to(exists, (*query.shape[:3], key.shape[2]))
    sums = np.zeros(alive.shape, np.int64)
    all_sums, all_alive, all_bounds = [], [], []
    margin = np.asarray(distance)[None, :, None, None]
    for plane in range(planes):
        hidden = planes - 1 - plane
        bits = (key >> hidden) & 1
        weight = -(1 << hidden) if plane == 0 else 1 << hidden
        sums = sums + weight * exact_matmul(query, np.swapaxes(bits, -1, -2))
        rest = (1 << hidden) - 1
        lower, upper = sums + rest * negative, sums + rest * positive
        largest = np.where(alive, lower, np.iinfo(np.int64).min // 2).max(axis=-1, keepdims=True)
        alive = alive & ((upper >= largest - margin) | (margin == OFF))
        all_sums.append(sums)
        all_alive.append(alive)
        all_bounds.append(np.stack([lower, upper]))
    return np.stack(all_sums), np.stack(all_alive), np.stack(all_bounds, axis=1)


def sign_magnitude_steps(
    query: Integers, key: Integers, least: int, bits: int, step: int
) -> tuple[Integers, Booleans, Integers]:
    """Returns partial scores `[R, S]`, keys alive after each step, and margins, of the same rule on sign and magnitude.

    A key's magnitude arrives `step` bits at a time; the margin is what the bits to come can add where query and key agree
    in sign; a key stops as soon as `partial + margin < least`. What is alive in the end has a score of at least `least`.

    Args:
      query: Codes of one row, `[d]`.
      key: Codes, `[S, d]`.
      least: Threshold of the score.
      bits: Bits of a magnitude.
      step: Bits that arrive at once.

    References:
      Li et al., "Accelerating Attention through Gradient-Based Learned Runtime Pruning" (LeOPArd), arXiv 2204.03227. Rule
      and step recalled, unconfirmed; no area or power is published, so that there is no machine of it here.
    """
    alive = np.ones(len(key), np.bool_)
    can_add = np.where(query[None] * key > 0, np.abs(query)[None], 0).sum(axis=1)
    partial, left, margins = [], [], []
    for unread in range(bits - step, -1, -step):
        seen = np.sign(key) * ((np.abs(key) >> unread) << unread)
        scores, margin = seen @ query, can_add * ((1 << unread) - 1)
        alive = alive & (scores + margin >= least)
        partial.append(scores)
        left.append(alive)
        margins.append(margin)
    return np.stack(partial), np.stack(left), np.stack(margins)


def filter_pairs(
    layer: Layer, query: Integers, key: Integers, exists: Booleans, planned: LayerTensors
) -> tuple[Booleans, LayerTensors]:
    """Keeps the pairs that no plane drops; a plane that a key does not have drops none."""
    del planned
    bits = int(layer["qk_bits"])
    planes = min(int(layer["plane_bits"]), bits)
    query_shift, key_shift = max(bits - CODE_BITS, 0), bits - planes
    sums, alive, _ = reference_planes(
        query >> query_shift, key >> key_shift, exists, layer["threshold"][:, 0], planes
    )
    missing = np.broadcast_to(alive[-1:], (CODE_BITS - planes, *alive.shape[1:]))
    keep = np.concatenate([alive, missing])
    return alive[-1], {"keep": keep, "raw_scores": sums[-1] << (query_shift + key_shift)}


bitserial = Reference(
    name="bitserial",
    layer_shapes=layer_shapes,
    tensor_shapes=tensor_shapes,
    decision_tensors=("keep",),
    ranges={"threshold": (0, OFF), "plane_bits": PLANES},
    check=check,
    filter=filter_pairs,
)
