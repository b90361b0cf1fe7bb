"""Bit-serial early termination: keys arrive plane by plane, and one is dropped as soon as its score cannot matter.

After r planes of a key, most significant first, its score lies between the partial sum plus what the bits to come can take
away and the same plus what they can add. A key is dropped when its upper bound lies more than a trained distance t below
the largest lower bound of its row. Bounds are exact, so what is left in the end are the keys within t of the row's maximum:
nothing is lost by stopping early. The planes are the score: no other product of queries and keys is computed.

References:
  H. Wang et al., "BitStopper: An Efficient Transformer Attention Accelerator via Stage-fusion and Early Termination",
  arXiv 2512.06457 v1 (unreviewed). Reconstructed: sources disagree on whether the row's reference is its largest lower
  bound or its largest partial sum, and the lower bound is taken here: with t = 0 the maximum survives; the range of t (no
  radius is published); codes wider than 12 bits lose their low bits, since queries and keys have 12 bits there.

Differs from the specification: t has 30 bits instead of 24, because scores of 12-bit codes at a width of 64 have 29.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from codesign import gates
from codesign.backward import row_spread
from codesign.mechanisms.protocol import (
    Carry,
    Context,
    Counts,
    Hooks,
    Mechanism,
    Operands,
    Plan,
    Selection,
    exact_execution,
    fetched_whole,
    keep_all,
)
from codesign.mechanisms.threshold_scale import (
    ThresholdScale,
    from_strength,
    kept_part,
    part_variable,
    to_strength,
)
from codesign.policy import PLANE_RANGE, bits_range
from codesign.quantize import deployed_bits, power_of_two
from codesign.workload import (
    Workload,
    binary_fetched_vectors,
    fetched_vectors,
    operation,
    row_statistics,
    stream,
)

CODE_BITS = 12
"""Most bits of a query, and most planes of a key (arXiv 2512.06457)."""
MAX_DISTANCE = 16.0
"""What t tends to, in logits (ours): a key that far below the maximum has a probability below 2e-7."""
START_DISTANCE = 3.0
"""t of a new policy in logits: alpha = 0.6 of a radius of 5 (specification; the radius is PADE's)."""
OFF_PART = 1.0 - 2.0**-11
"""Part of `MAX_DISTANCE` from which on nothing is dropped (ours)."""
OFF_CODE = 2**30 - 1
"""Storage code of a head that drops nothing."""


@struct.dataclass
class Planes:
    """What the planes of one layer left.

    Attributes:
      sums: Scores by all planes, int32 `[B, H, T, S]`.
      weights: Keys left after the last plane, `[B, H, T, S]`.
      entering: Keys that enter each plane by row, `[R, B, H, T]`.
      fetched: Keys whose plane is fetched by query block, `[R, B, H, G]`.
      left: Those left in the end, `[B, H, G]`.
      keep: Keys left after each plane, `[R, B, H, T, S]`; None unless tracing.
    """

    sums: jax.Array
    weights: jax.Array
    entering: jax.Array
    fetched: jax.Array
    left: jax.Array
    keep: jax.Array | None


@struct.dataclass
class Bounds:
    """A plane's sums and bounds, int32: `[B, H, T, S]`, and `largest` lower bound of what is alive, `[B, H, T, 1]`."""

    sums: jax.Array
    upper: jax.Array
    largest: jax.Array


def knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns start values: `threshold` v `[L, H, 1]` (t = 16 sigmoid v logits), and all 12 planes, `plane_bits` `[L]`."""
    start = float(part_variable(np.asarray(START_DISTANCE / MAX_DISTANCE)))
    return {
        "threshold": jnp.full((num_layers, num_heads, 1), start),
        "plane_bits": jnp.full((num_layers,), PLANE_RANGE[1]),
    }


def codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the distances as stored: int64 `[L, H, 1]`, in units of a score by planes; 2^30 - 1 keeps all."""
    part = kept_part(knobs["threshold"])
    dropped = np.maximum(knobs["qk_bits"] - CODE_BITS, 0.0)
    hidden = np.maximum(knobs["qk_bits"] - knobs["plane_bits"], 0.0)
    unit = tensors["logit"] * 2.0 ** (dropped + hidden)
    whole = np.rint(MAX_DISTANCE * part / unit[:, None, None])
    stored = np.where(part >= OFF_PART, OFF_CODE, np.minimum(whole, OFF_CODE))
    return {"threshold": stored.astype(np.int64)}


def from_setting(
    setting: tuple[float, ...], shape: tuple[int, ...], ranges: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the variables of one distance in logits; 16 drops nothing."""
    distance = np.broadcast_to(np.asarray(setting, np.float64), shape)
    return from_strength(1.0 - distance / MAX_DISTANCE, ranges)


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns the kept fraction of pairs, mean over the batch, `[L, H, 1]`."""
    operations = workload.operations
    fraction = operations["softmax.exp"].count / operations["filter0.compare"].count
    return jnp.mean(fraction, axis=0)[..., None]


def bounds(
    sums: jax.Array,
    query: jax.Array,
    key: jax.Array,
    alive: jax.Array,
    plane: jax.Array,
    hidden: jax.Array,
) -> Bounds:
    """Adds a plane of the keys to partial sums, and bounds what the planes to come can make of them.

    `A_r = A_(r-1) + w_r Q.b_r`, `w_0 = -2^(p-1)`, `w_r = 2^(p-1-r)`; with `W_r = w_r - 1`, `A` lies between
    `A_r + W_r sum min(Q, 0)` and `A_r + W_r sum max(Q, 0)`.

    Args:
      sums: Partial sums, int32 `[B, H, T, S]`.
      query: Codes of at most 12 bits, int32 `[B, H, T, d]`, d at most 256.
      key: Codes of p bits, int32 `[B, H, S, d]`.
      alive: Keys that enter the plane, bool `[B, H, T, S]`.
      plane: r, scalar int32.
      hidden: Planes to come, p - 1 - r, scalar int32; a plane that does not exist (negative) adds nothing.
    """
    place = jnp.maximum(hidden, 0)
    bits = jnp.bitwise_and(jnp.right_shift(key, place), 1)
    # At most 2^11 d: float32 holds every sum.
    product = jnp.einsum(
        "bhtd,bhsd->bhts",
        query.astype(jnp.float32),
        bits.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    weight = jnp.where(hidden < 0, 0, jnp.left_shift(1, place)) * jnp.where(plane == 0, -1, 1)
    sums = sums + weight * product.astype(jnp.int32)
    rest = jnp.left_shift(1, place) - 1
    below, above = (
        rest * jnp.sum(part, axis=-1, keepdims=True, dtype=jnp.int32)
        for part in (jnp.minimum(query, 0), jnp.maximum(query, 0))
    )
    least = np.iinfo(np.int32).min // 2
    largest = jnp.max(jnp.where(alive, sums + below, least), axis=-1, keepdims=True)
    return Bounds(sums=sums, upper=sums + above, largest=largest)


def stays(found: Bounds, alive: jax.Array, distance: jax.Array, hidden: jax.Array) -> jax.Array:
    """Returns which keys survive a plane, bool `[B, H, T, S]`: `upper >= max lower - t`.

    Args:
      found: Bounds after the plane.
      alive: Keys that entered it.
      distance: Storage codes of t, int32 `[H]`.
      hidden: Planes to come; of a plane that does not exist (negative) all survive.
    """
    code = distance.astype(jnp.int32)[None, :, None, None]
    survives = (found.upper >= found.largest - code) | (code == OFF_CODE) | (hidden < 0)
    return alive & survives


def num_planes(widths: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the planes of a key: as many as wanted, at most the bits it has."""
    return jnp.minimum(widths["plane_bits"], widths["qk_bits"])


def hard_planes(
    query: jax.Array,
    key: jax.Array,
    exists: jax.Array,
    distance: jax.Array,
    planes: jax.Array,
    rows: jax.Array,
    *,
    tracing: bool = False,
) -> Planes:
    """Runs all planes on whole numbers.

    Args:
      query: Codes of at most 12 bits, int32 `[B, H, T, d]`.
      key: Codes of `planes` bits, int32 `[B, H, S, d]`.
      exists: Pairs that exist, bool, broadcast against `[B, H, T, S]`.
      distance: Storage codes of t, `[H]`.
      planes: p, scalar, whole.
      rows: 1 for queries that exist, `[B, 1, T]`.
      tracing: Whether to return the keys left after each plane.
    """
    shape = (*query.shape[:3], key.shape[2])
    start = jnp.broadcast_to(exists, shape)

    def run(
        state: tuple[jax.Array, jax.Array], plane: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
        sums, alive = state
        hidden = planes.astype(jnp.int32) - 1 - plane
        found = bounds(sums, query, key, alive, plane, hidden)
        left = stays(found, alive, distance, hidden)
        weights = alive.astype(rows.dtype)
        seen = (jnp.sum(weights, axis=-1), fetched_vectors(weights, rows, is_binary=True))
        return (found.sums, left), (*seen, left) if tracing else seen

    zero = jnp.zeros(shape, jnp.int32)
    order = jnp.arange(CODE_BITS, dtype=jnp.int32)
    (sums, left), outputs = jax.lax.scan(run, (zero, start), order)
    weights = left.astype(rows.dtype)
    return Planes(
        sums=sums,
        weights=weights,
        entering=outputs[0],
        fetched=outputs[1],
        left=fetched_vectors(weights, rows, is_binary=True),
        keep=outputs[2] if tracing else None,
    )


def soft_planes(
    query: jax.Array,
    key: jax.Array,
    pairs: jax.Array,
    distance: jax.Array,
    stored: jax.Array,
    planes: jax.Array,
    scores: jax.Array,
    context: Context,
) -> Planes:
    """Runs all planes with gates: `alive_r = prod_(q <= r) sigmoid((upper_q - eta_q) / (temperature * spread))`.

    Straight-through the forward decisions are those of `hard_planes`, and derivatives go to the distance alone: deployed
    decisions hang on bits, which small steps of weights seldom change. On the relaxed path a partial sum has the
    derivative of the whole score.

    Args:
      query: Codes of at most 12 bits, int32 `[B, H, T, d]`.
      key: Codes of `planes` bits, int32 `[B, H, S, d]`.
      pairs: 1 for pairs that exist, `[B, 1, T, S]`.
      distance: t in units of the sums, `[H]`; its derivative is the threshold's.
      stored: The same as the chip stores it, int32 `[H]`.
      planes: p, scalar, whole.
      scores: Differentiable scores in units of the sums, `[B, H, T, S]`.
      context: The layer's context.
    """
    relaxation = context.relaxation
    dtype = scores.dtype
    rows = context.valid[:, None]
    shape = (*query.shape[:3], key.shape[2])
    weights = jnp.broadcast_to(pairs, shape).astype(dtype)
    moved = jnp.zeros((), dtype) if relaxation.straight_through else scores - gates.detach(scores)
    unit = relaxation.temperature * gates.gate_width(row_spread(gates.detach(scores), pairs))
    margin = distance[None, :, None, None]
    is_off = (stored == OFF_CODE)[None, :, None, None]

    def run(
        state: tuple[jax.Array, jax.Array, jax.Array], plane: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
        sums, weights, fetched = state
        hidden = planes.astype(jnp.int32) - 1 - plane
        alive = weights > 0.5
        found = bounds(sums, query, key, alive, plane, hidden)
        # Whole numbers: half a unit further up, what equals the threshold survives as on the chip.
        above = (found.upper - found.largest).astype(dtype) + moved + margin + 0.5
        gate = jnp.where(is_off | (hidden < 0), 1.0, jax.nn.sigmoid(above / unit))
        left = weights * gate
        if relaxation.straight_through:
            left = gates.straight_through(stays(found, alive, stored, hidden), left)
            left, wanted = binary_fetched_vectors(left, rows)
        else:
            wanted = fetched_vectors(left, rows)
        seen = (jnp.sum(weights, axis=-1), fetched)
        return (found.sums, left, wanted), (*seen, left > 0.5) if context.tracing else seen

    zero = jnp.zeros(shape, jnp.int32)
    whole = fetched_whole(context, shape[1])
    order = jnp.arange(CODE_BITS, dtype=jnp.int32)
    (sums, weights, left), outputs = jax.lax.scan(run, (zero, weights, whole), order)
    return Planes(
        sums=sums,
        weights=weights,
        entering=outputs[0],
        fetched=outputs[1],
        left=left,
        keep=outputs[2] if context.tracing else None,
    )


def cut_operand(code: jax.Array, step: jax.Array) -> jax.Array:
    """Returns codes without the part below `step`, a power of two; derivative 1 (true: 0)."""
    return gates.straight_through(jnp.floor(code / step) * step, code)


def soft_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Drops keys plane by plane through gates; straight-through the forward decisions are those of `hard_filter`."""
    del plan, carry
    relaxation = context.relaxation
    straight_through = relaxation.straight_through
    widths = {
        name: deployed_bits(gates.detach(context.widths[name]), *bits_range(name))
        for name in ("qk_bits", "plane_bits")
    }
    planes = num_planes(widths)
    query_step = power_of_two(jnp.maximum(widths["qk_bits"] - CODE_BITS, 0.0))
    key_step = power_of_two(widths["qk_bits"] - planes)
    step = query_step * key_step
    query = cut_operand(operands.query, query_step)
    trained = context.knobs["plane_bits"]
    low = jnp.clip(jnp.floor(gates.detach(trained)), PLANE_RANGE[0], PLANE_RANGE[1] - 1.0)

    def cut(to: jax.Array) -> jax.Array:
        to = jnp.minimum(to, widths["qk_bits"])
        return cut_operand(operands.key, power_of_two(widths["qk_bits"] - to))

    key = cut(low) + (trained - low) * (cut(low + 1.0) - cut(low))
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key)
    part = jax.nn.sigmoid(context.knobs["threshold"][:, 0])
    distance = MAX_DISTANCE * part / gates.detach(operands.logit_scale * step)
    stored = jnp.round(jnp.minimum(gates.detach(distance), float(OFF_CODE)))
    stored = jnp.where(gates.detach(part) >= OFF_PART, float(OFF_CODE), stored)
    if straight_through:
        distance = gates.straight_through(stored, distance)
    found = soft_planes(
        gates.detach(query / query_step).astype(jnp.int32),
        jnp.floor(gates.detach(operands.key) / key_step).astype(jnp.int32),
        context.pairs,
        distance,
        stored.astype(jnp.int32),
        planes,
        scores / step,
        context,
    )
    if straight_through:
        scores = gates.straight_through(found.sums.astype(scores.dtype) * step, scores)
    return _selection(context, operands, found, scores)


def hard_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Drops keys plane by plane, as the chip does."""
    del plan, carry
    planes = num_planes(context.widths)
    query_shift = jnp.maximum(context.widths["qk_bits"] - CODE_BITS, 0).astype(jnp.int32)
    key_shift = (context.widths["qk_bits"] - planes).astype(jnp.int32)
    found = hard_planes(
        jnp.right_shift(operands.query.astype(jnp.int32), query_shift),
        jnp.right_shift(operands.key.astype(jnp.int32), key_shift),
        context.pairs > 0.5,
        context.knobs["threshold"][:, 0],
        planes,
        context.valid[:, None],
        tracing=context.tracing,
    )
    dtype = context.valid.dtype
    scores = found.sums.astype(dtype) * power_of_two((query_shift + key_shift).astype(dtype))
    return _selection(context, operands, found, scores)


def whole_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps every pair, after all planes that the machine has: dense attention beside the mechanism."""
    selection, _ = keep_all(context, operands, plan, carry)
    keys = jnp.sum(selection.weights, axis=-1)
    entering = jnp.broadcast_to(keys, (CODE_BITS, *keys.shape))
    fetched = jnp.broadcast_to(selection.fetched, (CODE_BITS, *selection.fetched.shape))
    planes = jnp.minimum(context.widths["qk_bits"], float(CODE_BITS))
    return selection, _counts(context, operands, entering, fetched, planes)


def _selection(
    context: Context, operands: Operands, found: Planes, scores: jax.Array
) -> tuple[Selection, Counts]:
    """Returns what the planes left, and what they took."""
    planes = num_planes(context.widths)
    selection = Selection(
        weights=found.weights,
        fetched=found.left,
        fetched_bits=planes,
        trace={} if found.keep is None else {"keep": found.keep},
        scores=scores,
    )
    return selection, _counts(context, operands, found.entering, found.fetched, planes)


def _counts(
    context: Context,
    operands: Operands,
    entering: jax.Array,
    fetched: jax.Array,
    planes: jax.Array,
) -> Counts:
    """Returns the operations and traffic of planes that `entering` keys `[R, B, H, T]` enter."""
    head_dim, num_keys = operands.query.shape[-1], operands.key.shape[2]
    exists = context.valid[:, None, :]
    dtype = context.valid.dtype
    resident = jnp.sum(context.valid, axis=-1) * head_dim * planes
    query_bits = jnp.minimum(context.widths["qk_bits"], float(CODE_BITS))
    queries = jnp.broadcast_to(jnp.sum(exists, axis=-1), operands.query.shape[:2])
    counts = Counts(
        operations={"threshold.evaluate": operation(queries * planes, float(CODE_BITS), 1.0)}
    )
    # The last plane is there as far as a fractional number of planes says.
    last = jnp.ceil(gates.detach(planes)) - 1.0
    for index in range(CODE_BITS):
        there = jnp.where(last == index, planes - last, (last > index).astype(dtype))
        row_keys = entering[index] * exists * there
        alive = jnp.sum(row_keys, axis=-1)
        name = f"filter{index}"
        counts += Counts(
            operations={
                f"{name}.mac": operation(alive * head_dim, query_bits, 1.0),
                f"{name}.compare": operation(alive, query_bits, 1.0),
            },
            rows={name: row_statistics(row_keys, exists, num_keys)},
            streams={
                f"key{index}": stream(
                    fetched[index] * there, 1.0, head_dim, buffer="key", resident_bits=resident
                )
            },
        )
    return counts


def execution(
    context: Context,
    operands: Operands,
    selection: Selection,
    plan: Plan,
    value_weights: jax.Array,
) -> Counts:
    """Counts softmax and values of the keys that are left; their scores are there already, and all bits of the keys."""
    counts = exact_execution(context, operands, selection, plan, value_weights)
    operations = {key: value for key, value in counts.operations.items() if key != "qk.mac"}
    streams = {key: value for key, value in counts.streams.items() if key != "key_rest"}
    result: Counts = counts.replace(operations=operations, streams=streams)  # type: ignore[attr-defined]
    return result


bitserial = Mechanism(
    name="bitserial",
    summary="keys bit by bit, dropped as soon as their score cannot matter (BitStopper, arXiv 2512.06457)",
    knobs=knobs,
    thresholds=ThresholdScale(
        names=("distance from the maximum",),
        in_order=True,
        from_strength=from_strength,
        to_strength=to_strength,
        from_setting=from_setting,
        settings=((16.0,), (5.0,), (3.0,)),
        start_kept=(0.6,),
        kept=kept_fractions,
        pairs_entry=-1,
    ),
    has_rounds=True,
    codes=codes,
    soft=Hooks(filter=soft_filter, execution=execution, head_knobs=("threshold",)),
    hard=Hooks(filter=hard_filter, execution=execution, head_knobs=("threshold",)),
    bypass=Hooks(filter=whole_filter, execution=execution),
)
