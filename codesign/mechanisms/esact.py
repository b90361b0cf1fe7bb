"""ESACT: attention predicted by hybrid logarithms, top-k rows, and rows that copy a similar neighbour.

Queries, keys and scores are predicted from the tokens by products of hybrid logarithms, before any of them exists; each
row keeps its largest predicted scores. Inside a window of rows, in order, a row whose kept scores resemble those of an
earlier critical row copies that row's attention; only critical rows get queries, and only what they keep gets keys and
values. Where enough heads agree on the row to copy, the token copies that row's feed-forward branch too.

Differs on purpose from the specification: predicted queries and keys are requantised like real ones and cut to their top
eight bits, one multiplier per column instead of one shift per head, because weights have one scale per column; predicted
scores enter the top-k unit as 20 bits, shifted by what heads of that width can exceed; tokens and weights have the widths
of the integer path, at most 8 bits; windows have 8 rows, and heads share the cut of the votes as the sum of their parts.

References:
  Liu, Deng, Pu and Lu, "ESACT: An End-to-End Sparse Accelerator for Compute-Intensive Transformers via Local Similarity",
  arXiv 2512.02403. Prediction, top-k, local similarity and what they save are the paper's; its text was not to be had, so
  the arithmetic, the measure of similarity, its threshold, the vote and all that is trainable are reconstructions.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codesign import gates
from codesign.backward import dense_product
from codesign.fake_quantize import RESIDUAL_BITS
from codesign.log_codes import hybrid_log, hybrid_log_operand
from codesign.mechanisms.on_demand import predicted_operands, top_code, wanted_keys
from codesign.mechanisms.protocol import (
    Carry,
    Context,
    Counts,
    Hooks,
    Mechanism,
    Numbers,
    Operands,
    Plan,
    PlanFn,
    Selection,
    computed_rows,
    own_weights,
)
from codesign.mechanisms.threshold_scale import (
    ThresholdScale,
    from_strength,
    kept_part,
    part_variable,
    to_strength,
)
from codesign.parts import map_examples
from codesign.policy import bits_range
from codesign.quantize import deployed_bits, exact_einsum
from codesign.segments import SHARE_ONE, hard_top, soft_top
from codesign.similarity import (
    SIMILARITY_BITS,
    hard_sources,
    hard_votes,
    row_distances,
    rows_of,
    soft_sources,
    soft_votes,
    windows_of,
)
from codesign.units import BITS_PER_BYTE
from codesign.workload import Operation, Workload, operation, row_statistics, stream

WINDOW = 8
"""Rows of a window (reconstruction)."""
MAX_SIMILARITY = 127 / 2**SIMILARITY_BITS
"""Largest similarity threshold: 7 bits, 6 of them fraction."""
OFF_CODE = 128
"""Storage code of a head that copies no row."""
OFF_PART = 1.0 - 2.0**-10
"""Part from which similarity or vote is off (ours)."""
SCORE_BITS = 20
"""Bits of a predicted score in the top-k unit, sign included (reconstruction)."""
SCORE_LIMIT = 2 ** (SCORE_BITS - 1) - 1
CODE_BITS = 5.0
"""Sign, place of the leading one and a mantissa bit of an 8-bit code, bit."""
PREDICTION_BITS, PREDICTION_LIMIT = 8, 127
"""Width and largest magnitude of predicted queries and keys, bit and codes."""
HYBRID_BITS = 9
"""Bits that hold a hybrid logarithm of an 8-bit code as a number, up to 128 in magnitude."""
SIMILARITY_WIDTH = 0.4
"""Width of the similarity gate per temperature, in units of s (reconstruction: 0.2 to 0.02)."""
VOTE_WIDTH = 1.0
"""Width of the vote's gate per temperature, in heads (ours)."""
START = (0.15, 0.25, 0.75)
"""Kept share, similarity threshold and part of the heads where a policy starts (reconstruction)."""

ENTRIES = ("kept share", "similarity", "vote")


def knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns start values.

    Returns:
      `threshold` v `[L, H, 3]`: kept share sigmoid(v[0]), similarity threshold 127/64 (1 - sigmoid(v[1])), and what the
      head adds to the votes that a feed-forward branch is copied for, sigmoid(v[2]).
    """
    parts = np.asarray([START[0], 1.0 - START[1] / MAX_SIMILARITY, START[2]])
    start = jnp.asarray(part_variable(parts), jnp.float32)
    return {"threshold": jnp.broadcast_to(start, (num_layers, num_heads, len(ENTRIES)))}


def codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns what the chip stores.

    Returns:
      `threshold` int64 `[L, H, 2]`: kept share in 1/1024 and similarity threshold in 1/64, 128 = off; `vote_cut` int64
      `[L]`: heads that must agree, one more than there are = off.
    """
    del tensors
    parts = kept_part(knobs["threshold"])
    share = np.clip(np.rint(parts[..., 0] * SHARE_ONE), 1, SHARE_ONE)
    similarity = np.rint((1.0 - parts[..., 1]) * MAX_SIMILARITY * 2**SIMILARITY_BITS)
    similarity = np.where(parts[..., 1] > OFF_PART, OFF_CODE, similarity)
    return {
        "threshold": np.stack([share, similarity], axis=-1).astype(np.int64),
        "vote_cut": np.asarray(_cut(parts[..., 2], np), np.int64),
    }


def _cut(parts: np.ndarray | jax.Array, xp: object) -> np.ndarray | jax.Array:
    """Returns the votes that heads' parts `[..., H]` add up to, whole, one more than there are heads if that is off."""
    num_heads = parts.shape[-1]
    total = xp.sum(parts, axis=-1)  # type: ignore[attr-defined]
    least = xp.maximum(xp.ceil(total - 1e-6), 1.0)  # type: ignore[attr-defined]
    return xp.where(total > OFF_PART * num_heads, num_heads + 1.0, least)  # type: ignore[attr-defined,no-any-return]


def from_setting(
    setting: tuple[float, ...], shape: tuple[int, ...], ranges: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the variables of a kept share, a similarity threshold (0 = off) and a part of the heads (1 = off)."""
    share, similarity, vote = setting
    parts = np.asarray([share, 1.0 - similarity / MAX_SIMILARITY, vote])
    return from_strength(1.0 - np.broadcast_to(parts, shape), ranges)


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns kept pairs of rows that are computed, those rows, and tokens computed behind attention, `[L, H, 3]`.

    Fractions, means over the batch.
    """
    operations, head_dim = workload.operations, workload.head_dim
    pairs = operations["filter0.shift_add"].count / head_dim
    tokens = operations["predict.shift_add"].count / (2.0 * head_dim * _width(workload))
    critical = workload.rows["attention"].queries / tokens
    kept = operations["qk.mac"].count / head_dim / (pairs * critical)
    computed = (workload.block_gemms["up"].rows / tokens[..., 0])[..., None]
    fractions = [kept, critical, jnp.broadcast_to(computed, kept.shape)]
    return jnp.stack([jnp.mean(one, axis=0) for one in fractions], axis=-1)


def _width(workload: Workload) -> float:
    return float(workload.block_gemms["up"].inner)


def _stored(context: Context) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns parts `[H, 3]`, and as the chip stores them shares `[H]`, similarities `[H]` and the cut of votes."""
    parts = gates.detach(jax.nn.sigmoid(context.knobs["threshold"]))
    share = jnp.clip(jnp.round(parts[:, 0] * SHARE_ONE), 1.0, SHARE_ONE)
    similarity = jnp.round((1.0 - parts[:, 1]) * MAX_SIMILARITY * 2**SIMILARITY_BITS)
    similarity = jnp.where(parts[:, 1] > OFF_PART, float(OFF_CODE), similarity)
    return parts, share, similarity, jnp.asarray(_cut(parts[:, 2], jnp))


def score_shift(head_dim: int) -> int:
    """Returns by how many bits predicted scores of heads of a width are shifted: the largest fill 20 bits."""
    largest = 2 ** (2 * PREDICTION_BITS - 2) * head_dim
    return max(0, math.ceil(math.log2(largest)) - (SCORE_BITS - 1))


def soft_plan(
    context: Context, x: jax.Array, numbers: Numbers, carry: Carry
) -> tuple[Plan, Counts]:
    """Plans by soft gates; straight-through the forward decisions are those of `hard_plan`."""
    del carry
    relaxation = context.relaxation
    bits = deployed_bits(gates.detach(context.widths["qk_bits"]), *bits_range("qk_bits"))

    def product(codes: jax.Array, weights: jax.Array) -> jax.Array:
        return dense_product(hybrid_log_operand(codes), hybrid_log_operand(weights))

    query, key = predicted_operands(x, numbers, product, partial(top_code, code_bits=bits))
    parts, share_code, similarity_code, vote_code = _stored(context)
    part = jax.nn.sigmoid(context.knobs["threshold"])
    share, vote = part[:, 0], jnp.sum(part[:, 2])
    similarity = MAX_SIMILARITY * (1.0 - part[:, 1])
    if relaxation.straight_through:
        share = gates.straight_through(share_code / SHARE_ONE, share)
        rounded = similarity_code / 2**SIMILARITY_BITS
        similarity = gates.straight_through(jnp.minimum(rounded, MAX_SIMILARITY), similarity)
    is_compared, num_rows = parts[:, 1] <= OFF_PART, x.shape[1]

    def decide(seen: dict[str, jax.Array]) -> dict[str, Any]:
        sums = jnp.matmul(
            hybrid_log_operand(seen["query"]), jnp.swapaxes(hybrid_log_operand(seen["key"]), 2, 3)
        )
        scaled = sums * 2.0 ** -score_shift(query.shape[-1])
        whole = jnp.clip(jnp.floor(gates.detach(scaled)), -SCORE_LIMIT, SCORE_LIMIT)
        scores = gates.straight_through(whole, scaled)
        keep = soft_top(scores, seen["pairs"], share, SCORE_BITS, relaxation)
        found = {"keep": keep, "distances": row_distances(keep * scores, WINDOW)}
        return found | ({"scores": scores} if context.tracing else {})

    seen = {"query": query, "key": key, "pairs": context.pairs}
    found = map_examples(decide, seen, query.shape[1] * num_rows**2)
    # Of windows, not of pairs: small arrays and many steps, so all examples at once.
    distances = found["distances"]
    width = SIMILARITY_WIDTH * relaxation.temperature
    sources = soft_sources(distances, similarity, is_compared, width, num_rows)
    if relaxation.straight_through:
        decided = hard_sources(distances, similarity_code, OFF_CODE, num_rows)
        sources = gates.straight_through(decided, sources)
    votes = jnp.sum(sources, axis=1)
    is_on = vote_code <= part.shape[0]
    ffn_sources = soft_votes(votes, vote, is_on, VOTE_WIDTH * relaxation.temperature)
    if relaxation.straight_through:
        decided = hard_votes(gates.detach(votes), vote_code)
        ffn_sources = gates.straight_through(decided, ffn_sources)
    return counted_plan(
        context,
        Prediction(query, key, found.get("scores")),
        found["keep"],
        sources,
        ffn_sources,
        is_compared.astype(votes.dtype),
    )


def hard_plan(
    context: Context, x: jax.Array, numbers: Numbers, carry: Carry
) -> tuple[Plan, Counts]:
    """Plans in integers, as the chip does."""
    del carry
    dtype = context.valid.dtype
    dropped = (context.widths["qk_bits"] - PREDICTION_BITS).astype(jnp.int32)

    def product(codes: jax.Array, weights: jax.Array) -> jax.Array:
        return exact_einsum("btk,kn->btn", hybrid_log(codes), hybrid_log(weights), HYBRID_BITS)

    def cut(code: jax.Array) -> jax.Array:
        top = jnp.right_shift(code.astype(jnp.int32), dropped)
        return jnp.clip(top, -PREDICTION_LIMIT, PREDICTION_LIMIT)

    query, key = predicted_operands(x, numbers, product, cut)
    sums = exact_einsum("bhtd,bhsd->bhts", hybrid_log(query), hybrid_log(key), HYBRID_BITS)
    shifted = jnp.right_shift(sums.astype(jnp.int32), score_shift(query.shape[-1]))
    scores = jnp.clip(shifted, -SCORE_LIMIT, SCORE_LIMIT)
    threshold = context.knobs["threshold"]
    keep = hard_top(scores, context.pairs, threshold[:, 0], SCORE_BITS)
    distances = row_distances(jnp.where(keep, scores, 0), WINDOW)
    sources = hard_sources(distances, threshold[:, 1], OFF_CODE, x.shape[1])
    votes = jnp.sum(sources, axis=1, dtype=jnp.int32)
    ffn_sources = hard_votes(votes, context.knobs["vote_cut"])
    return counted_plan(
        context,
        Prediction(query, key, scores),
        keep.astype(dtype),
        sources.astype(dtype),
        ffn_sources.astype(dtype),
        (threshold[:, 1] != OFF_CODE).astype(dtype),
    )


class Prediction(NamedTuple):
    """Predicted queries and keys `[B, H, T, d]` and scores `[B, H, T, S]`, the latter None where nobody asks."""

    query: jax.Array
    key: jax.Array
    scores: jax.Array | None


def counted_plan(
    context: Context,
    predicted: Prediction,
    keep: jax.Array,
    sources: jax.Array,
    ffn_sources: jax.Array,
    compares: jax.Array,
) -> tuple[Plan, Counts]:
    """Returns the plan and what making it took; `compares` `[H]` is 1 where rows are compared."""
    exists = context.valid[:, None, :]
    batch, heads, _, head_dim = predicted.query.shape
    width, shape = context.width, (batch, heads)
    critical = own_weights(sources)
    tokens = jnp.sum(exists, axis=-1)
    pairs = jnp.sum(jnp.sum(context.pairs, axis=-1) * exists, axis=-1)
    compared = _compared(jnp.sum(keep, axis=-1), critical * exists, exists) * compares[None, :]
    copied = jnp.sum((1.0 - critical) * exists, axis=-1)
    ffn_copied = jnp.sum((1.0 - own_weights(ffn_sources)) * context.valid, axis=-1, keepdims=True)
    copied_bytes = head_dim * context.widths["out.activation_bits"] / BITS_PER_BYTE
    branch_bytes = width * RESIDUAL_BITS / BITS_PER_BYTE / heads
    bits = context.widths["qkv.activation_bits"]

    def counted(count: jax.Array, bits_a: jax.Array | float, bits_b: float) -> Operation:
        return operation(jnp.broadcast_to(count, shape), bits_a, bits_b)

    score_bits = float(SCORE_BITS)
    counts = Counts(
        operations={
            "encode.encode": counted(tokens * (width / heads + 2.0 * head_dim), bits, CODE_BITS),
            "predict.shift_add": counted(tokens * (2.0 * width * head_dim), CODE_BITS, CODE_BITS),
            "filter0.shift_add": counted(pairs * head_dim, CODE_BITS, CODE_BITS),
            "select.compare": counted(pairs, score_bits, score_bits),
            "similarity.add": counted(compared, score_bits, score_bits),
            "copy.bytes": counted(copied * copied_bytes, BITS_PER_BYTE, BITS_PER_BYTE),
            "ffn.bytes": counted(ffn_copied * branch_bytes, BITS_PER_BYTE, BITS_PER_BYTE),
        },
        streams={
            "weight_codes": stream(
                jnp.full((*shape, 1), 2.0 * head_dim, critical.dtype), CODE_BITS, width
            )
        },
    )
    plan = Plan(
        queries=critical,
        keep=keep,
        attention_source=sources,
        ffn_source=ffn_sources,
        notes=predicted._asdict() if context.tracing else {},
    )
    return plan, counts


def _compared(kept: jax.Array, critical: jax.Array, exists: jax.Array) -> jax.Array:
    """Returns the entries that comparing rows with earlier critical ones of their window takes, `[B, H]`.

    Args:
      kept: Keys that a row keeps, `[B, H, T]`.
      critical: 1 for critical rows that exist, `[B, H, T]`.
      exists: 1 for rows that exist, `[B, 1, T]`.
    """
    by_window = windows_of(jnp.stack([kept, critical, critical * kept], axis=-1), WINDOW)
    before = np.tri(WINDOW, k=-1)
    earlier = jnp.einsum("tu,bhwun->bhwtn", jnp.asarray(before, kept.dtype), by_window)
    entries = by_window[..., 0] * earlier[..., 1] + earlier[..., 2]
    rows = rows_of(entries[..., None], kept.shape[-1])[..., 0]
    return jnp.sum(rows * exists, axis=-1)


def keep_planned(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps what was planned; only rows that are computed fetch keys."""
    del operands, carry
    assert plan.keep is not None
    trace = {}
    if context.tracing:
        assert plan.attention_source is not None and plan.ffn_source is not None
        trace = {
            "predicted_query": plan.notes["query"],
            "predicted_key": plan.notes["key"],
            "scores": plan.notes["scores"],
            "keep": plan.keep[None] > 0.5,
            "source": _places(plan.attention_source),
            "ffn_source": _places(plan.ffn_source),
        }
    selection = Selection(
        weights=plan.keep,
        fetched=wanted_keys(context, plan.keep * computed_rows(context, plan)[..., None]),
        fetched_bits=jnp.zeros((), context.valid.dtype),
        trace=trace,
    )
    return selection, Counts()


def _places(sources: jax.Array) -> jax.Array:
    """Returns the rows that weights `[..., T, w]` name, integers `[..., T]`."""
    places = jnp.argmax(sources, axis=-1).astype(jnp.int32)
    first = np.arange(sources.shape[-2], dtype=np.int32) // WINDOW * WINDOW
    return places + jnp.broadcast_to(first, places.shape)


def execution(
    context: Context,
    operands: Operands,
    selection: Selection,
    plan: Plan,
    value_weights: jax.Array,
) -> Counts:
    """Counts keys and values made on demand, exact attention of the rows that are computed, and what enters and leaves.

    Rows of a window share the keys and values that they read on chip.
    """
    _, heads, _, head_dim = operands.query.shape
    width, exists = context.width, computed_rows(context, plan)
    keys_per_row = jnp.sum(selection.weights, axis=-1) * exists
    kept, used = (
        jnp.sum(jnp.sum(weights, axis=-1) * exists, axis=-1)
        for weights in (selection.weights, value_weights)
    )
    rows = jnp.broadcast_to(jnp.sum(exists, axis=-1), kept.shape)
    wanted = selection.fetched[..., -1]
    level = min(WINDOW.bit_length(), selection.fetched.shape[-1]) - 1
    by_window = selection.fetched[..., level]
    qk_bits, v_bits = context.widths["qk_bits"], context.widths["v_bits"]
    activation_bits = context.widths["qkv.activation_bits"]
    pair_bytes = head_dim * (qk_bits + v_bits) / BITS_PER_BYTE
    tokens = jnp.broadcast_to(
        jnp.sum(context.valid, axis=-1)[:, None, None] / heads, (*kept.shape, 1)
    )
    return Counts(
        operations={
            "generate.mac": operation(
                2.0 * wanted * width * head_dim, activation_bits, context.widths["qkv.weight_bits"]
            ),
            "generate.bytes": operation(wanted * pair_bytes, BITS_PER_BYTE, BITS_PER_BYTE),
            "fetch.bytes": operation(by_window * pair_bytes, BITS_PER_BYTE, BITS_PER_BYTE),
            "qk.mac": operation(kept * head_dim, qk_bits, qk_bits),
            "softmax.exp": operation(kept, qk_bits, qk_bits),
            "pv.mac": operation(used * head_dim, qk_bits, v_bits),
            "output.divide": operation(rows * head_dim, qk_bits, v_bits),
        },
        rows={"attention": row_statistics(keys_per_row, exists, operands.key.shape[2])},
        streams={
            # All heads share the tokens that enter the layer and those that leave it.
            "tokens": stream(tokens, activation_bits, width),
            "ffn_output": stream(tokens, activation_bits, width),
            "generate_weights": stream(
                jnp.full((*kept.shape, 1), 2.0 * head_dim, kept.dtype),
                context.widths["qkv.weight_bits"],
                width,
            ),
        },
    )


def _hooks(plan: PlanFn) -> Hooks:
    return Hooks(
        plan=plan, filter=keep_planned, execution=execution, generates_keys=True, head_knobs=()
    )


esact = Mechanism(
    name="esact",
    summary="attention predicted by hybrid logarithms, top-k, similar rows copied (arXiv 2512.02403)",
    knobs=knobs,
    thresholds=ThresholdScale(
        names=ENTRIES,
        in_order=True,
        from_strength=from_strength,
        to_strength=to_strength,
        from_setting=from_setting,
        settings=((1.0, 0.0, 1.0), (0.5, 0.25, 0.75), (0.25, 0.25, 0.75)),
        start_kept=(0.6, 0.9, 0.95),
        kept=kept_fractions,
        pairs_entry=0,
    ),
    codes=codes,
    soft=_hooks(soft_plan),
    hard=_hooks(hard_plan),
    bypass=Hooks(execution=execution, generates_keys=True),
)
