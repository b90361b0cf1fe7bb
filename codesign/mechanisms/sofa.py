"""SOFA: keys and scores predicted by shifts, top-k inside segments, and K and V made on demand.

Keys are predicted from the tokens and the leading ones of the weights before any key exists (DLZS), scores from the
predicted keys and the leading ones of the real queries; each segment of a row keeps its largest (SADS); only tokens that
some query of a head wants become keys and values of that head, and exact attention runs over them (SU-FA). The sum over
segments in any order is the softmax over the kept keys, so the integer path has no arithmetic of its own for it.

Differs on purpose from the specification: predicted keys are requantised like real ones, one multiplier per column instead
of one shift per head, because weights have one scale per column; the shift of the scores follows from the calibrated range
of the exact scores, one per layer; the leading one counts half of the paper's `2^(W - LZ)`, which halves every estimate and
changes no ranking; a segment is a fixed run of keys rather than a fixed part of the row, so that it does not depend on
padding; tokens and weights have the widths of the integer path, at most 8 bits, where the paper makes K and V from 16.

References:
  Wang et al., "SOFA: A Compute-Memory Optimized Sparsity Accelerator via Cross-Stage Coordinated Tiling", MICRO 2024,
  arXiv 2407.10416. Shifts, saturation, the clipping rule and everything trainable are reconstructions.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from codesign import gates
from codesign.log_codes import leading_one, leading_one_operand
from codesign.mechanisms.on_demand import (
    BYPASS,
    hard_plan,
    on_demand,
    soft_plan,
    wanted_keys,
)
from codesign.mechanisms.protocol import (
    Carry,
    Context,
    Counts,
    Mechanism,
    Operands,
    Plan,
    Selection,
)
from codesign.mechanisms.threshold_scale import (
    ThresholdScale,
    from_strength,
    kept_part,
    to_strength,
)
from codesign.quantize import exact_einsum, power_of_two
from codesign.segments import (
    RADIUS_OFF,
    SCORE_LIMIT,
    SHARE_ONE,
    Chosen,
    hard_segments,
    soft_segments,
)
from codesign.workload import Workload, operation

TILE_BITS = 6.0
"""Start of the bits of a key's place in its segment: 64 keys."""
SCORE_BITS = 15
"""Bits of the magnitude of a predicted score in the sorter (arXiv 2407.10416: 16-bit inputs)."""
ATTENTION_BITS = 16
"""Most bits of queries and predicted keys."""
QUERY_CODE_BITS = 5.0
"""Sign and leading-zero count of a 16-bit query, bit (arXiv 2407.10416)."""


def knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns start values: half of a segment's keys, a radius of half of all scores, segments of 64 keys.

    Returns:
      `threshold` v `[L, H, 2]`: kept share sigmoid(v[0]) and radius 65535 sigmoid(v[1]) in units of the sorter's scores;
      `tile_bits` `[L]`.
    """
    return {
        "threshold": jnp.zeros((num_layers, num_heads, 2)),
        "tile_bits": jnp.full((num_layers,), TILE_BITS),
    }


def codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns what the chip stores: `threshold` int64 `[L, H, 2]` (share in 1/1024, radius), `score_shift` int64 `[L]`."""
    share = kept_part(knobs["threshold"])
    kept = np.clip(np.rint(share[..., 0] * SHARE_ONE), 1, SHARE_ONE)
    radius = np.rint(share[..., 1] * RADIUS_OFF)
    largest = tensors["scores"] / (tensors["query"] * tensors["key"])
    shift = np.maximum(np.frexp(largest)[1] - SCORE_BITS, 0)
    return {
        "threshold": np.stack([kept, radius], axis=-1).astype(np.int64),
        "score_shift": np.asarray(shift, np.int64),
    }


def from_setting(
    setting: tuple[float, ...], shape: tuple[int, ...], ranges: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the variables of one kept share and one part of the largest radius."""
    kept = np.broadcast_to(np.asarray(setting, np.float64), shape)
    return from_strength(1.0 - kept, ranges)


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns the kept fraction of pairs after the segments and after the radius, mean over the batch, `[L, H, 2]`."""
    operations, head_dim = workload.operations, workload.head_dim
    pairs = operations["filter0.shift_add"].count / head_dim
    left = (operations["threshold.compare"].count, operations["pv.mac"].count / head_dim)
    fractions = [count / pairs for count in left]
    return jnp.stack([jnp.mean(fraction, axis=0) for fraction in fractions], axis=-1)


def soft_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps keys by soft gates; straight-through the forward decisions are those of `hard_filter`."""
    del carry
    relaxation = context.relaxation
    key = jnp.swapaxes(plan.notes["key"], 2, 3)
    sums = jnp.matmul(leading_one_operand(operands.query), key)
    largest = context.ranges["scores"] / (context.scales["query"] * context.scales["key"])
    shift = jnp.maximum(jnp.frexp(gates.detach(largest))[1] - SCORE_BITS, 0)
    unit = power_of_two(-shift.astype(sums.dtype))
    scaled = jnp.clip(sums * unit, -SCORE_LIMIT, SCORE_LIMIT)
    scores = gates.straight_through(jnp.floor(scaled), scaled)
    part = jax.nn.sigmoid(context.knobs["threshold"])
    share, radius = part[:, 0], part[:, 1] * RADIUS_OFF
    if relaxation.straight_through:
        stored = jnp.clip(jnp.round(gates.detach(share) * SHARE_ONE), 1.0, SHARE_ONE)
        share = gates.straight_through(stored / SHARE_ONE, share)
        radius = gates.straight_through(jnp.round(radius), radius)
    chosen = soft_segments(
        scores, context.pairs, share, radius, context.knobs["tile_bits"], relaxation
    )
    return _selection(context, operands, plan, scores, chosen)


def hard_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps keys as the chip does."""
    del carry
    sums = exact_einsum(
        "bhtd,bhsd->bhts", leading_one(operands.query), plan.notes["key"], ATTENTION_BITS
    )
    shift = context.knobs["score_shift"].astype(jnp.int32)
    shifted = jnp.floor(sums * jnp.ldexp(1.0, -shift))
    scores = jnp.clip(shifted, -SCORE_LIMIT, SCORE_LIMIT).astype(jnp.int32)
    threshold = context.knobs["threshold"]
    chosen = hard_segments(
        scores, context.pairs, threshold[:, 0], threshold[:, 1], context.knobs["tile_bits"]
    )
    return _selection(context, operands, plan, scores, chosen)


def _selection(
    context: Context, operands: Operands, plan: Plan, scores: jax.Array, chosen: Chosen
) -> tuple[Selection, Counts]:
    """Returns the kept keys and what finding them took."""
    dtype = context.valid.dtype
    exists = context.valid[:, None, :]
    largest, weights = chosen.largest.astype(dtype), chosen.weights.astype(dtype)
    head_dim = operands.query.shape[-1]
    shape = operands.query.shape[:2]
    pairs = jnp.sum(jnp.sum(context.pairs, axis=-1) * exists, axis=-1)
    queries = jnp.sum(exists, axis=-1)

    def by_head(count: jax.Array) -> jax.Array:
        return jnp.broadcast_to(count, shape)

    qk_bits = context.widths["qk_bits"]
    tested = jnp.sum(jnp.sum(largest, axis=-1) * exists, axis=-1)
    cycles = jnp.sum(chosen.cycles.astype(dtype) * exists, axis=-1)
    segments = by_head(jnp.sum(chosen.segments.astype(dtype) * exists, axis=-1))
    sorted_bits = SCORE_BITS + 1.0
    counts = Counts(
        operations={
            "encode.encode": operation(by_head(queries * head_dim), qk_bits, QUERY_CODE_BITS),
            "filter0.shift_add": operation(by_head(pairs * head_dim), qk_bits, QUERY_CODE_BITS),
            "select.compare": operation(cycles, sorted_bits, sorted_bits),
            "threshold.compare": operation(tested, sorted_bits, sorted_bits),
        }
    )
    trace = {
        "predicted_key": plan.notes["key"],
        "scores": scores,
        "keep": jnp.stack([largest > 0.5, weights > 0.5]),
    }
    selection = Selection(
        weights=weights,
        fetched=wanted_keys(context, weights),
        fetched_bits=jnp.zeros((), dtype),
        trace=trace if context.tracing else {},
        notes={"segments": segments},
    )
    return selection, counts


sofa = Mechanism(
    name="sofa",
    summary="keys predicted by shifts, top-k by segment, K and V on demand (arXiv 2407.10416)",
    knobs=knobs,
    thresholds=ThresholdScale(
        names=("kept share", "radius"),
        in_order=True,
        from_strength=from_strength,
        to_strength=to_strength,
        from_setting=from_setting,
        settings=((1.0, 1.0), (0.5, 1.0), (0.25, 1.0)),
        start_kept=(0.85, 0.6),
        kept=kept_fractions,
        pairs_entry=-1,
    ),
    has_rounds=True,
    codes=codes,
    soft=on_demand(soft_plan, soft_filter),
    hard=on_demand(hard_plan, hard_filter),
    bypass=BYPASS,
)
