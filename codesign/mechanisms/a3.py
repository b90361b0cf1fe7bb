"""A3: candidate keys by a search over products of components, exact scores of these, and a threshold after scoring.

Columns of the keys are sorted once. A query then takes M_s steps: each adds the largest product of components that is left
to the score of its key, and the smallest one likewise, unless the sum over all keys would turn negative. Keys of positive
score are candidates; a query without any takes all. Of their exact scores those within t of the largest stay.

Search steps have no derivative: candidates and cost of the two powers of two beside a fractional log2 M_s are both found,
and their difference is its derivative. Straight-through and relaxed, the search itself is a constant.

References:
  Ham et al., "A3: Accelerating Attention Mechanisms in Neural Networks with Approximation", HPCA 2020, arXiv 2002.10941.
  The search is confirmed by a published critique; the guard, the logarithmic form of t = ln(100 / T_pct) and the settings
  are recalled, unconfirmed. Reconstructed: ties go to the lowest key, then the lowest column; a query without candidates
  takes all keys. Ours: of a causal model, a query steps over the keys behind it without a cost; the largest t switches the
  search off, which is the published machine without approximation.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from codesign import gates
from codesign.backward import kept, row_spread
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
from codesign.policy import bits_range
from codesign.quantize import deployed_bits, exact_einsum, power_of_two
from codesign.workload import Workload, operation, row_statistics

ATTENTION_BITS = 16
"""Most bits of queries and keys."""
MAX_DISTANCE = 16.0
"""What t tends to, in logits (ours)."""
START_DISTANCE = 3.0
"""t of a new policy in logits: T_pct = 5, the conservative setting (recalled)."""
DISTANCE_ONE = 256.0
"""t is rounded to 1/256 of a logit before it is stored in units of a score (8.8 fixed point)."""
OFF_PART = 1.0 - 2.0**-11
"""Part of `MAX_DISTANCE` from which on a head takes all keys without a search (ours)."""
OFF_CODE = 2**40
"""Storage code of such a head; beyond any distance of two scores."""
START_SEARCH_BITS = 6.0
"""log2 of the search steps of a new policy: half of 128 keys, the conservative setting (recalled)."""
MOST_STEPS = 2 ** int(bits_range("search_bits")[1])
"""Most steps of a search."""


@struct.dataclass
class Search:
    """Products that a search took, axes: largest or smallest (2), step (`MOST_STEPS`), B, H, T.

    Attributes:
      rows: Keys they were added to, int32; of a step that took nothing any.
      values: Products, 0 where nothing was taken.
    """

    rows: jax.Array
    values: jax.Array


def knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns start values: `threshold` v `[L, H, 1]` (t = 16 sigmoid v logits) and `search_bits` `[L]`, log2 M_s."""
    start = float(part_variable(np.asarray(START_DISTANCE / MAX_DISTANCE)))
    return {
        "threshold": jnp.full((num_layers, num_heads, 1), start),
        "search_bits": jnp.full((num_layers,), START_SEARCH_BITS),
    }


def codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the distances as stored: int64 `[L, H, 1]`, in units of a score; 2^40 keeps all without a search."""
    part = kept_part(knobs["threshold"])
    fixed = np.rint(MAX_DISTANCE * part * DISTANCE_ONE) / DISTANCE_ONE
    whole = np.minimum(np.rint(fixed / tensors["logit"][:, None, None]), OFF_CODE - 1)
    return {"threshold": np.where(part >= OFF_PART, OFF_CODE, whole).astype(np.int64)}


def from_setting(
    setting: tuple[float, ...], shape: tuple[int, ...], ranges: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the variables of one distance in logits; 16 keeps all."""
    distance = np.broadcast_to(np.asarray(setting, np.float64), shape)
    return from_strength(1.0 - distance / MAX_DISTANCE, ranges)


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns the kept fraction of pairs, mean over the batch, `[L, H, 1]`."""
    kept = workload.operations["softmax.exp"].count
    fraction = kept / workload.rows["all"].segments[..., 0]
    return jnp.mean(fraction, axis=0)[..., None]


def _sorted_columns(key: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns columns of the keys in falling, rising and given order, and their places, `[B, H, 3, S, d]`.

    Equal ones stand in the order of their keys, keys that do not exist behind all others.
    """
    places = jnp.broadcast_to(
        jnp.arange(key.shape[2], dtype=jnp.int32)[None, None, :, None], key.shape
    )
    behind = jnp.broadcast_to(valid[:, None, :, None] < 0.5, key.shape).astype(jnp.int32)
    orders = []
    for ranked in (-key, key, places):
        orders.append(jax.lax.sort((behind, ranked, places), dimension=2, num_keys=3)[2])
    order = jnp.stack(orders, axis=2)
    values = jnp.take_along_axis(jnp.broadcast_to(key[:, :, None], order.shape), order, axis=3)
    return values, order


WORD = 32
"""Places of a sorted column in a word of those that a query may attend to."""


@struct.dataclass
class _Sight:
    """Which places of sorted columns a query may attend to, `[B, H, T, 3 * W * d]` words of 32 places, the first lowest.

    `num_words` is W, `head_dim` d.
    """

    words: jax.Array
    num_words: int = struct.field(pytree_node=False)
    head_dim: int = struct.field(pytree_node=False)

    def following(self, places: jax.Array, kinds: jax.Array, column: jax.Array) -> jax.Array:
        """Returns the first place from `places` on that is seen, int32 `[2, B, H, T, n]`; beyond all if none is."""
        word = jnp.arange(self.num_words, dtype=jnp.int32)
        index = (kinds[..., None] * self.num_words + word[(None,) * kinds.ndim]) * self.head_dim
        index = jnp.moveaxis(index + column[..., None], 0, 3)  # [B, H, T, 2, n, W]
        flat = jnp.reshape(index, (*index.shape[:3], -1))
        words = jnp.reshape(jnp.take_along_axis(self.words, flat, axis=3), index.shape)
        words = jnp.moveaxis(words, 3, 0)
        behind = places[..., None] - WORD * word[(None,) * kinds.ndim]
        all_bits = jnp.uint32(2**WORD - 1)
        mask = jnp.left_shift(all_bits, jnp.clip(behind, 0, WORD - 1).astype(jnp.uint32))
        words = words & jnp.where(behind >= WORD, jnp.uint32(0), mask)
        first = jnp.argmax(words != 0, axis=-1, keepdims=True).astype(jnp.int32)
        found = jnp.take_along_axis(words, first, axis=-1)[..., 0]
        lowest = found & (~found + jnp.uint32(1))
        bit = jax.lax.population_count(lowest - jnp.uint32(1)).astype(jnp.int32)
        return jnp.where(found == 0, WORD * self.num_words, WORD * first[..., 0] + bit)


def _sight(order: jax.Array, visible: jax.Array) -> _Sight:
    """Returns what queries see of sorted columns.

    Args:
      order: Keys by place, `[B, H, 3, S, d]`.
      visible: Whether a query may attend to a key, bool `[B, 1, T, S]`.
    """
    batch, heads, _, length, head_dim = order.shape
    flat = jnp.reshape(order, (batch, heads, 1, -1))
    queries = visible.shape[2]
    seen = jnp.take_along_axis(
        jnp.broadcast_to(visible, (batch, heads, queries, length)),
        jnp.broadcast_to(flat, (batch, heads, queries, flat.shape[-1])),
        axis=3,
    )
    seen = jnp.reshape(seen, (batch, heads, queries, 3, length, head_dim))
    seen = jnp.pad(seen, [(0, 0)] * 4 + [(0, -length % WORD), (0, 0)])
    bits = jnp.reshape(seen, (*seen.shape[:4], -1, WORD, head_dim)).astype(jnp.uint32)
    weights = jnp.asarray(1 << np.arange(WORD, dtype=np.uint32), jnp.uint32)
    words = jnp.sum(bits * weights[(None,) * 5][..., None], axis=5, dtype=jnp.uint32)
    number = words.shape[4]
    return _Sight(jnp.reshape(words, (*words.shape[:3], -1)), number, head_dim)


def search(
    query: jax.Array,
    key: jax.Array,
    valid: jax.Array,
    visible: jax.Array | None,
    steps: jax.Array,
    *,
    has_guard: bool = True,
    most: int = MOST_STEPS,
) -> Search:
    """Runs the candidate search of all queries; not differentiable.

    Args:
      query: Codes, `[B, H, T, d]`.
      key: Codes of the same type, `[B, H, S, d]`.
      valid: 1 for keys that exist, `[B, S]`.
      visible: Whether a query may attend to a key, bool `[B, 1, T, S]`; None: to all that exist, which is faster.
      steps: M_s, int32 scalar, at most `most`.
      has_guard: Whether the smallest product is left out where the sum over all keys would turn negative.
      most: Steps there is room for.
    """
    columns, order = _sorted_columns(key, valid)
    batch_heads, (length, head_dim) = key.shape[:2], key.shape[2:]
    tables = [jnp.reshape(table, (*batch_heads, -1)) for table in (columns, order)]
    sight = None if visible is None else _sight(order, visible)
    num_keys = jnp.sum(valid > 0.5, axis=-1, dtype=jnp.int32)[None, :, None, None, None]
    # Axis 0 from here on: the largest products, and the smallest, which are the largest of the negated query.
    ends = jnp.stack([query, -query])
    kinds = jnp.where(ends > 0, 0, jnp.where(ends < 0, 1, 2))
    column = jnp.arange(head_dim, dtype=jnp.int32)[None, None, None, None]
    is_float = jnp.issubdtype(query.dtype, jnp.floating)
    far = jnp.asarray(-np.inf if is_float else np.iinfo(np.int32).min, query.dtype)

    def entries(
        places: jax.Array, kinds: jax.Array, column: jax.Array, factor: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns places from `places` on that are seen, products and keys there, `[2, B, H, T, n]`."""
        if sight is not None:
            places = sight.following(places, kinds, jnp.broadcast_to(column, places.shape))
        index = (kinds * length + jnp.minimum(places, length - 1)) * head_dim + column
        flat = jnp.reshape(jnp.moveaxis(index, 0, 2), (*batch_heads, -1))
        shape = (*batch_heads, 2, *index.shape[3:])
        element, owner = (
            jnp.moveaxis(jnp.reshape(jnp.take_along_axis(table, flat, axis=2), shape), 2, 0)
            for table in tables
        )
        return places, jnp.where(places < num_keys, factor * element, far), owner

    places, products, keys = entries(jnp.zeros(ends.shape, jnp.int32), kinds, column, ends)

    def run(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        places, products, keys, total, rows, values = state
        best = jnp.max(products, axis=-1, keepdims=True)
        is_best = products == best
        row = jnp.min(jnp.where(is_best, keys, length), axis=-1, keepdims=True)
        chosen = jnp.argmax(is_best & (keys == row), axis=-1, keepdims=True).astype(jnp.int32)
        row = jnp.minimum(row[..., 0], length - 1)
        value = jnp.where(best[..., 0] > far, best[..., 0], 0).astype(total.dtype)
        value = jnp.stack([value[0], -value[1]])
        after = total + value[0]
        is_low_taken = jnp.ones_like(after, bool)
        if has_guard:
            is_low_taken = after + value[1] >= 0
        taken = jnp.stack([jnp.ones_like(is_low_taken), is_low_taken])
        value = jnp.where(taken, value, 0)
        is_moved = (column == chosen) & taken[..., None]
        place, kind, factor = (
            jnp.take_along_axis(x, chosen, axis=-1) for x in (places, kinds, ends)
        )
        next_place, following, next_key = entries(place + 1, kind, chosen, factor)
        return (
            jnp.where(is_moved, next_place, places),
            jnp.where(is_moved, following, products),
            jnp.where(is_moved, next_key, keys),
            after + value[1],
            jax.lax.dynamic_update_index_in_dim(rows, row, step, 1),
            jax.lax.dynamic_update_index_in_dim(values, value, step, 1),
        )

    sums = jnp.result_type(float)
    found = (2, most, *query.shape[:3])
    state = (
        places,
        products,
        keys,
        jnp.zeros(query.shape[:3], sums),
        jnp.zeros(found, jnp.int32),
        jnp.zeros(found, sums),
    )
    *_, rows, values = jax.lax.fori_loop(0, steps, run, state)
    return Search(rows=rows, values=values)


def searched_scores(found: Search, steps: jax.Array, num_keys: int) -> jax.Array:
    """Returns what the first `steps` steps added up to by key, `[B, H, T, S]`."""
    is_within = jnp.arange(found.values.shape[1]) < steps
    values = jnp.where(is_within[None, :, None, None, None], found.values, 0)
    shape = found.values.shape[2:]
    number = int(np.prod(shape))
    flat = jnp.reshape(jnp.arange(number), shape)[None, None] * num_keys + found.rows
    total = jnp.zeros((number * num_keys,), values.dtype)
    total = total.at[jnp.ravel(flat)].add(jnp.ravel(values), mode="promise_in_bounds")
    return jnp.reshape(total, (*shape, num_keys))


def candidates(scores: jax.Array, exists: jax.Array, is_off: jax.Array) -> jax.Array:
    """Returns which keys are scored exactly, bool `[B, H, T, S]`: those of positive score, all where there is none.

    Args:
      scores: Scores of the search, `[B, H, T, S]`.
      exists: Pairs that exist, bool, of the same shape.
      is_off: Whether a head searches nothing and takes all, bool `[H]`.
    """
    positive = (scores > 0) & exists
    is_any = jnp.any(positive, axis=-1, keepdims=True)
    return jnp.where(is_any & ~is_off[None, :, None, None], positive, exists)


def soft_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps candidates by gates on exact scores; straight-through the forward decisions are the deployed ones."""
    del plan, carry
    relaxation = context.relaxation
    straight_through = relaxation.straight_through
    query, key = operands.query, operands.key
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key)
    part = jax.nn.sigmoid(context.knobs["threshold"][:, 0])
    is_off = gates.detach(part) >= OFF_PART
    distance = MAX_DISTANCE * part
    if straight_through:
        fixed = jnp.round(gates.detach(distance) * DISTANCE_ONE) / DISTANCE_ONE
        distance = gates.straight_through(fixed, distance)
    distance = distance / gates.detach(operands.logit_scale)
    low_limit, high_limit = bits_range("search_bits")
    trained = context.knobs["search_bits"]
    low = jnp.clip(jnp.floor(gates.detach(trained)), low_limit, high_limit - 1.0)
    found = search(
        gates.detach(query),
        gates.detach(key),
        context.valid,
        _visible(context),
        power_of_two(low + 1.0).astype(jnp.int32),
    )
    exists = jnp.broadcast_to(context.pairs > 0.5, scores.shape)
    width = relaxation.temperature * gates.gate_width(
        row_spread(gates.detach(scores), context.pairs)
    )
    margin = distance[None, :, None, None]
    off = is_off[None, :, None, None]
    chosen, soft, hard = [], [], []
    for steps in (power_of_two(low), power_of_two(low + 1.0)):
        # Kept, so that the backward pass does not search again.
        mask = kept(candidates(searched_scores(found, steps, scores.shape[3]), exists, is_off))
        top = jnp.max(jnp.where(mask, scores, -jnp.inf), axis=-1, keepdims=True)
        above = scores - jnp.where(jnp.isfinite(top), top, 0.0) + margin
        gate = jnp.where(off, 1.0, jax.nn.sigmoid(above / width))
        chosen.append(mask.astype(scores.dtype))
        soft.append(chosen[-1] * gate)
        hard.append(mask & ((above >= 0.0) | off))
    fraction = trained - low
    scored = chosen[0] + fraction * (chosen[1] - chosen[0])
    weights = soft[0] + fraction * (soft[1] - soft[0])
    if straight_through:
        is_high = deployed_bits(gates.detach(trained), low_limit, high_limit) > low
        scored = gates.straight_through(jnp.where(is_high, chosen[1], chosen[0]), scored)
        weights = gates.straight_through(jnp.where(is_high, hard[1], hard[0]), weights)
    return _selection(context, operands, weights, scored, is_off)


def hard_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps candidates as the chip does."""
    del plan, carry
    steps = jnp.left_shift(1, context.knobs["search_bits"].astype(jnp.int32))
    query, key = (code.astype(jnp.int32) for code in (operands.query, operands.key))
    found = search(query, key, context.valid, _visible(context), steps)
    scores = exact_einsum("bhtd,bhsd->bhts", operands.query, operands.key, ATTENTION_BITS)
    exists = jnp.broadcast_to(context.pairs > 0.5, scores.shape)
    searched = searched_scores(found, steps, scores.shape[3])
    code = context.knobs["threshold"][:, 0]
    is_off = code == OFF_CODE
    mask = candidates(searched, exists, is_off)
    scores = scores.astype(jnp.float64)
    top = jnp.max(jnp.where(mask, scores, -jnp.inf), axis=-1, keepdims=True)
    keep = mask & (scores >= top - code.astype(jnp.float64)[None, :, None, None])
    dtype = context.valid.dtype
    return _selection(context, operands, keep.astype(dtype), mask.astype(dtype), is_off, searched)


def _visible(context: Context) -> jax.Array | None:
    """Returns the pairs that exist; None where a key's existence says all."""
    return None if context.is_uniform else context.pairs > 0.5


def _selection(
    context: Context,
    operands: Operands,
    weights: jax.Array,
    scored: jax.Array,
    is_off: jax.Array,
    searched: jax.Array | None = None,
) -> tuple[Selection, Counts]:
    """Returns the kept keys among those `scored`, and what searching took; all keys and values are read."""
    head_dim = operands.query.shape[-1]
    qk_bits = context.widths["qk_bits"]
    exists = context.valid[:, None, :]
    shape = operands.query.shape[:3]
    is_on = jnp.where(is_off, 0.0, 1.0)[None, :]
    bits = context.widths["search_bits"].astype(context.valid.dtype)
    smooth = jnp.exp2(bits)
    whole = jnp.where(jnp.round(bits) == bits, power_of_two(bits), smooth)
    per_row = gates.straight_through(whole, smooth) * is_on
    steps = jnp.broadcast_to(exists * per_row[..., None], shape)
    taken = 2.0 * jnp.sum(steps, axis=-1)
    compared = jnp.sum(jnp.sum(scored, axis=-1) * exists, axis=-1) * is_on
    levels = float((head_dim - 1).bit_length())
    counts = Counts(
        operations={
            "predict.multiply": operation(taken, qk_bits, qk_bits),
            "predict.compare": operation(taken * levels, 2.0 * qk_bits, 1.0),
            "threshold.compare": operation(compared, 2.0 * qk_bits, 1.0),
        },
        rows={"searched": row_statistics(steps, exists, MOST_STEPS)},
    )
    trace = {"keep": jnp.stack([scored, weights]) > 0.5}
    if searched is not None:
        trace["scores"] = searched
    selection = Selection(
        weights=weights,
        fetched=fetched_whole(context, shape[1]),
        fetched_bits=jnp.zeros((), context.valid.dtype),
        trace=trace if context.tracing else {},
        notes={"scored": scored},
    )
    return selection, counts


def whole_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps and scores every pair: the published machine without approximation."""
    selection, counts = keep_all(context, operands, plan, carry)
    notes = {"scored": selection.weights}
    result: Selection = selection.replace(notes=notes)  # type: ignore[attr-defined]
    return result, counts


def execution(
    context: Context,
    operands: Operands,
    selection: Selection,
    plan: Plan,
    value_weights: jax.Array,
) -> Counts:
    """Counts exact scores of candidates, then softmax and values of what the threshold leaves."""
    counts = exact_execution(context, operands, selection, plan, value_weights)
    num_keys, exists = operands.key.shape[2], context.valid[:, None, :]
    qk_bits = context.widths["qk_bits"]
    scored = jnp.sum(selection.notes["scored"], axis=-1) * exists
    existing = jnp.broadcast_to(jnp.sum(context.pairs, axis=-1) * exists, scored.shape)
    number = jnp.sum(scored, axis=-1)
    operations = counts.operations | {
        "qk.mac": operation(number * operands.query.shape[-1], qk_bits, qk_bits)
    }
    rows = counts.rows | {
        "all": row_statistics(existing, exists, num_keys),
        "scored": row_statistics(scored, exists, num_keys),
    }
    result: Counts = counts.replace(operations=operations, rows=rows)  # type: ignore[attr-defined]
    return result


a3 = Mechanism(
    name="a3",
    summary="candidates by a search over products of components, then a threshold (A3, arXiv 2002.10941)",
    knobs=knobs,
    thresholds=ThresholdScale(
        names=("distance from the maximum",),
        in_order=True,
        from_strength=from_strength,
        to_strength=to_strength,
        from_setting=from_setting,
        settings=((16.0,), (3.0,), (2.3,)),
        start_kept=(0.4,),
        kept=kept_fractions,
        pairs_entry=-1,
    ),
    has_rounds=True,
    codes=codes,
    soft=Hooks(filter=soft_filter, execution=execution, head_knobs=("threshold",)),
    hard=Hooks(filter=hard_filter, execution=execution, head_knobs=("threshold",)),
    bypass=Hooks(filter=whole_filter, execution=execution),
)
