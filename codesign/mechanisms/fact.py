"""FACT: attention predicted by leading ones before Q, K and V exist, one-hot rows copied, unimportant tokens in four bits.

Queries and keys are predicted from the leading ones of tokens and weights, scores from the leading ones of these. A row
keeps its largest scores. Where the largest leads by more than a threshold, the row is one-hot: its output is that value,
and its query, scores and products are left out. Keys and values that no row wants are not made. A token to which few rows
attend runs through the feed-forward network with activations of four bits.

References:
  Qin et al., "FACT: FFN-Attention Co-optimized Transformer Architecture with Eager Correlation Prediction", ISCA 2023,
  doi 10.1145/3579371.3589057. Eager prediction, the one-hot rule and mixed precision by importance are the paper's; from
  which circuit a leading one comes, what counts as importance (rows of all heads that keep a token, against the mean) and
  the threshold's form are reconstructions. Ours: of a causal model a token's importance, and the mean, are those of the
  rows that it can see; the largest thresholds switch either rule off.
"""

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from codesign import gates
from codesign.backward import dense_product
from codesign.log_codes import leading_one, leading_one_operand
from codesign.mechanisms.on_demand import LINEAR_BITS, predicted_operands, top_code, wanted_keys
from codesign.mechanisms.protocol import (
    NARROW_BITS,
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
    TensorFn,
    computed_rows,
)
from codesign.mechanisms.threshold_scale import (
    ThresholdScale,
    from_strength,
    kept_part,
    part_variable,
    to_strength,
)
from codesign.policy import bits_range
from codesign.quantize import code_limit, deployed_bits, exact_einsum, power_of_two
from codesign.segments import SHARE_ONE, hard_top, soft_top
from codesign.workload import Operation, Workload, operation, row_statistics, stream

ENTRIES = ("kept share", "one-hot gap", "importance")
"""Entries of the knob `threshold`."""
START = (0.25, 3.0, 1.0)
"""Kept share, gap in logits and importance threshold of a new policy (specification)."""
MAX_GAP = 16.0
"""What the gap tends to, in logits (ours)."""
MAX_IMPORTANCE = 4.0
"""What the importance threshold tends to, in means (ours)."""
OFF_PART = 1.0 - 2.0**-11
"""Part from which a rule is off (ours)."""
OFF_CODE = 2**20
"""Storage code of a head without one-hot rows; beyond any gap of two scores."""
IMPORTANCE_ONE = 256
"""The importance threshold is stored in 1/256 of the mean (8.8 fixed point)."""
SCORE_BITS = 20
"""Bits of a predicted score, sign included (as ESACT's)."""
SCORE_LIMIT = 2 ** (SCORE_BITS - 1) - 1
PREDICTION_BITS, PREDICTION_LIMIT = 8, 127
"""Width and largest magnitude of predicted queries and keys, bit and codes."""
CODE_BITS = 4.0
"""Sign and place of the leading one of an 8-bit code, bit."""
NARROW_LIMIT = 2 ** (NARROW_BITS - 1) - 1
"""Largest code of a narrow row."""
IMPORTANCE_WIDTH = 0.25
"""Width of the importance gate per temperature, in means (ours)."""


def knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns start values.

    Returns:
      `threshold` v `[L, H, 3]`: kept share sigmoid(v[0]), gap 16 sigmoid(v[1]) logits, and importance threshold
      4 (1 - sigmoid(v[2])) means, of which a layer takes its heads' mean.
    """
    parts = np.asarray([START[0], START[1] / MAX_GAP, 1.0 - START[2] / MAX_IMPORTANCE])
    start = jnp.asarray(part_variable(parts), jnp.float32)
    return {"threshold": jnp.broadcast_to(start, (num_layers, num_heads, len(ENTRIES)))}


def score_shift(head_dim: int) -> int:
    """Returns by how many bits predicted scores of heads of a width are shifted: the largest fill 20 bits."""
    return max(0, math.ceil(math.log2(4 ** (PREDICTION_BITS - 2) * head_dim)) - (SCORE_BITS - 1))


def codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns what the chip stores, int64.

    `threshold` `[L, H, 2]`: kept share in 1/1024, and gap in units of a product of predicted codes, 2^20 = off; the score
    that it is compared with is shifted back. `importance` `[L]` in 1/256 of the mean, 0 = off.
    """
    parts = kept_part(knobs["threshold"])
    share = np.clip(np.rint(parts[..., 0] * SHARE_ONE), 1, SHARE_ONE)
    unit = tensors["logit"] * 4.0 ** (knobs["qk_bits"] - PREDICTION_BITS)
    gap = np.minimum(np.rint(MAX_GAP * parts[..., 1] / unit[:, None]), OFF_CODE - 1)
    gap = np.where(parts[..., 1] >= OFF_PART, OFF_CODE, gap)
    cut = MAX_IMPORTANCE * (1.0 - np.mean(parts[..., 2], axis=-1))
    is_off = np.mean(parts[..., 2], axis=-1) >= OFF_PART
    return {
        "threshold": np.stack([share, gap], axis=-1).astype(np.int64),
        "importance": np.where(is_off, 0, np.rint(cut * IMPORTANCE_ONE)).astype(np.int64),
    }


def from_setting(
    setting: tuple[float, ...], shape: tuple[int, ...], ranges: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the variables of a kept share, a gap in logits (16 = off) and an importance threshold (0 = off)."""
    share, gap, importance = setting
    parts = np.asarray([share, gap / MAX_GAP, 1.0 - importance / MAX_IMPORTANCE])
    return from_strength(1.0 - np.broadcast_to(parts, shape), ranges)


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns kept pairs of rows that are computed, those rows, and full feed-forward rows, batch means, `[L, H, 3]`.

    Rows of four bits count as half.
    """
    operations, head_dim = workload.operations, workload.head_dim
    pairs = operations["filter0.shift_add"].count / head_dim
    width = float(workload.block_gemms["up"].inner)
    tokens = operations["predict.shift_add"].count / (2.0 * head_dim * width)
    computed = workload.rows["attention"].queries / tokens
    kept = operations["qk.mac"].count / head_dim / jnp.maximum(pairs * computed, 1e-9)
    full = (workload.block_gemms["up"].rows / tokens[..., 0])[..., None]
    fractions = [kept, computed, jnp.broadcast_to(full, kept.shape)]
    return jnp.stack([jnp.mean(one, axis=0) for one in fractions], axis=-1)


def _first_largest(scores: jax.Array, exists: jax.Array) -> jax.Array:
    """Returns whether a pair is the first of its row's largest that exist, bool `[B, H, T, S]`."""
    low = -(2**30)
    largest = jnp.argmax(jnp.where(exists, scores, low), axis=-1, keepdims=True)
    return (jnp.arange(scores.shape[-1])[None, None, None] == largest) & exists


def _gap(scores: jax.Array, exists: jax.Array, first: jax.Array) -> jax.Array:
    """Returns by how much a row's largest score leads, `[B, H, T]`; further than any threshold where it is alone."""
    far = 2.0 ** (SCORE_BITS + 8)
    best = jnp.sum(jnp.where(first, scores, 0), axis=-1)
    others = jnp.where(exists & ~first, scores, -far)
    return best - jnp.max(others, axis=-1)


def importance(pairs: jax.Array, valid: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns how often tokens are kept times how many tokens they see, and the sum of that of those, `[B, T]` each.

    Args:
      pairs: 1 for pairs that exist, `[B, 1, T, S]`.
      valid: 1 for tokens that exist, `[B, T]`.
      keep: Kept pairs, `[B, H, T, S]`.
    """
    rows = jnp.swapaxes(jnp.sum(keep, axis=1) * valid[:, :, None], 1, 2)
    seen = pairs[:, 0] * valid[:, None, :]
    received = jnp.sum(seen * rows, axis=-1)
    total = jnp.einsum("bij,bj->bi", seen, received, precision=jax.lax.Precision.HIGHEST)
    return received * jnp.sum(seen, axis=-1), total


def soft_plan(
    context: Context, x: jax.Array, numbers: Numbers, carry: Carry
) -> tuple[Plan, Counts]:
    """Plans by soft gates; straight-through decisions are those of `hard_plan`, and derivatives go to thresholds alone."""
    del carry
    relaxation = context.relaxation
    bits = deployed_bits(gates.detach(context.widths["qk_bits"]), *bits_range("qk_bits"))

    def product(codes: jax.Array, weights: jax.Array) -> jax.Array:
        return dense_product(leading_one_operand(codes), leading_one_operand(weights))

    query, key = predicted_operands(x, numbers, product, partial(top_code, code_bits=bits))
    if relaxation.straight_through:
        query, key = gates.detach(query), gates.detach(key)
    sums = jnp.einsum("bhtd,bhsd->bhts", leading_one_operand(query), leading_one_operand(key))
    shift = 2.0 ** score_shift(query.shape[-1])
    whole = jnp.clip(jnp.floor(gates.detach(sums) / shift), -SCORE_LIMIT, SCORE_LIMIT)
    scores = gates.straight_through(whole, sums / shift)
    part = jax.nn.sigmoid(context.knobs["threshold"])
    share, gap = part[:, 0], MAX_GAP * part[:, 1]
    unit = context.scales["query"] * context.scales["key"] / np.sqrt(query.shape[-1])
    gap = gap / gates.detach(unit * power_of_two(2.0 * (bits - PREDICTION_BITS)))
    has_one_hot = gates.detach(part[:, 1]) < OFF_PART
    cut_part = jnp.mean(part[:, 2])
    least = MAX_IMPORTANCE * (1.0 - cut_part)
    is_full_always = gates.detach(cut_part) >= OFF_PART
    if relaxation.straight_through:
        stored = jnp.clip(jnp.round(gates.detach(share) * SHARE_ONE), 1.0, SHARE_ONE)
        share = gates.straight_through(stored / SHARE_ONE, share)
        gap = gates.straight_through(jnp.minimum(jnp.round(gap), OFF_CODE - 1.0), gap)
        rounded = jnp.round(gates.detach(least) * IMPORTANCE_ONE) / IMPORTANCE_ONE
        least = gates.straight_through(rounded, least)
    exists = jnp.broadcast_to(context.pairs > 0.5, scores.shape)
    keep = soft_top(scores, context.pairs, share, SCORE_BITS, relaxation)
    first = _first_largest(whole, exists)
    lead = _gap(scores, exists, first) * shift - gap[None, :, None]
    spread = gates.gate_width(jnp.std(gates.detach(scores), axis=-1) * shift)
    is_on = has_one_hot[None, :, None]
    one_hot = jnp.where(is_on, jax.nn.sigmoid(lead / (relaxation.temperature * spread)), 0.0)
    if relaxation.straight_through:
        one_hot = gates.straight_through((lead > 0.0) & is_on, one_hot)
    keep = keep + one_hot[..., None] * (first.astype(keep.dtype) - keep)
    received, total = importance(context.pairs, context.valid, keep)
    ratio = received / jnp.maximum(total, 1.0)
    full = jax.nn.sigmoid((ratio - least) / (relaxation.temperature * IMPORTANCE_WIDTH))
    full = jnp.where(is_full_always, 1.0, full)
    if relaxation.straight_through:
        is_full = (received * IMPORTANCE_ONE >= least * IMPORTANCE_ONE * total) | is_full_always
        full = gates.straight_through(is_full, full)
    return _counted(context, query, key, scores, keep, one_hot, full)


def hard_plan(
    context: Context, x: jax.Array, numbers: Numbers, carry: Carry
) -> tuple[Plan, Counts]:
    """Plans in integers, as the chip does."""
    del carry
    dtype = context.valid.dtype
    dropped = (context.widths["qk_bits"] - PREDICTION_BITS).astype(jnp.int32)

    def product(codes: jax.Array, weights: jax.Array) -> jax.Array:
        return exact_einsum(
            "btk,kn->btn", leading_one(codes), leading_one(weights), PREDICTION_BITS
        )

    def cut(code: jax.Array) -> jax.Array:
        top = jnp.right_shift(code.astype(jnp.int32), dropped)
        return jnp.clip(top, -PREDICTION_LIMIT, PREDICTION_LIMIT)

    query, key = predicted_operands(x, numbers, product, cut)
    sums = exact_einsum(
        "bhtd,bhsd->bhts", leading_one(query), leading_one(key), PREDICTION_BITS
    ).astype(jnp.int32)
    shift = score_shift(query.shape[-1])
    scores = jnp.clip(jnp.right_shift(sums, shift), -SCORE_LIMIT, SCORE_LIMIT)
    threshold = context.knobs["threshold"]
    exists = jnp.broadcast_to(context.pairs > 0.5, scores.shape)
    keep = hard_top(scores, context.pairs, threshold[:, 0], SCORE_BITS)
    first = _first_largest(scores, exists)
    gap = threshold[:, 1][None, :, None]
    lead = _gap(scores.astype(jnp.float64), exists, first) * 2.0**shift
    one_hot = (lead > gap) & (gap != OFF_CODE)
    keep = jnp.where(one_hot[..., None], first, keep).astype(dtype)
    received, total = importance(context.pairs, context.valid, keep)
    full = received * IMPORTANCE_ONE >= context.knobs["importance"].astype(dtype) * total
    return _counted(context, query, key, scores, keep, one_hot.astype(dtype), full.astype(dtype))


def _counted(
    context: Context,
    query: jax.Array,
    key: jax.Array,
    scores: jax.Array,
    keep: jax.Array,
    one_hot: jax.Array,
    full: jax.Array,
) -> tuple[Plan, Counts]:
    """Returns the plan and what making it took."""
    batch, heads, _, head_dim = query.shape
    exists, width, shape = context.valid[:, None, :], context.width, (batch, heads)
    tokens = jnp.sum(exists, axis=-1)
    pairs = jnp.sum(jnp.sum(context.pairs, axis=-1) * exists, axis=-1)
    bits, score_bits = context.widths["qkv.activation_bits"], float(SCORE_BITS)

    def counted(count: jax.Array, bits_a: jax.Array | float, bits_b: float) -> Operation:
        return operation(jnp.broadcast_to(count, shape), bits_a, bits_b)

    counts = Counts(
        operations={
            "encode.encode": counted(tokens * (width / heads + 2.0 * head_dim), bits, CODE_BITS),
            "predict.shift_add": counted(tokens * (2.0 * width * head_dim), CODE_BITS, CODE_BITS),
            "filter0.shift_add": counted(pairs * head_dim, CODE_BITS, CODE_BITS),
            "select.compare": counted(pairs, score_bits, score_bits),
            # The gap of a row, and the importance of a token.
            "threshold.compare": counted(tokens * (1.0 + 1.0 / heads), score_bits, score_bits),
        },
        streams={
            "weight_codes": stream(
                jnp.full((*shape, 1), 2.0 * head_dim, keep.dtype), CODE_BITS, width
            )
        },
    )
    notes = {"query": query, "key": key, "scores": scores} if context.tracing else {}
    plan = Plan(queries=1.0 - one_hot, keep=keep, ffn_full=full, notes=notes)
    return plan, counts


def keep_planned(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps what was planned; a row that copies a value wants it too."""
    del operands, carry
    assert plan.keep is not None and plan.queries is not None
    trace = {}
    if context.tracing:
        assert plan.ffn_full is not None
        trace = {
            "predicted_query": plan.notes["query"],
            "predicted_key": plan.notes["key"],
            "scores": plan.notes["scores"],
            "keep": plan.keep[None] > 0.5,
            "one_hot": plan.queries < 0.5,
            "ffn_full": plan.ffn_full > 0.5,
        }
    selection = Selection(
        weights=plan.keep,
        fetched=wanted_keys(context, plan.keep),
        fetched_bits=jnp.zeros((), context.valid.dtype),
        trace=trace,
    )
    return selection, Counts()


def execution(
    context: Context,
    operands: Operands,
    selection: Selection,
    plan: Plan,
    value_weights: jax.Array,
) -> Counts:
    """Counts keys and values made on demand, exact attention of the rows that are computed, and what enters and leaves."""
    _, heads, _, head_dim = operands.query.shape
    width, exists = context.width, computed_rows(context, plan)
    keys_per_row = jnp.sum(selection.weights, axis=-1) * exists
    kept, used = (
        jnp.sum(jnp.sum(weights, axis=-1) * exists, axis=-1)
        for weights in (selection.weights, value_weights)
    )
    rows = jnp.broadcast_to(jnp.sum(exists, axis=-1), kept.shape)
    wanted = selection.fetched[..., -1]
    qk_bits, v_bits = context.widths["qk_bits"], context.widths["v_bits"]
    activation_bits = context.widths["qkv.activation_bits"]
    weight_bits = context.widths["qkv.weight_bits"]
    tokens = jnp.sum(context.valid, axis=-1)[:, None, None] / heads
    tokens = jnp.broadcast_to(tokens, (*kept.shape, 1))
    return Counts(
        operations={
            "generate.mac": operation(
                2.0 * wanted * width * head_dim, activation_bits, weight_bits
            ),
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
                jnp.full((*kept.shape, 1), 2.0 * head_dim, kept.dtype), weight_bits, width
            ),
        },
    )


def soft_rows(context: Context, x: jax.Array, plan: Plan, site: str) -> tuple[jax.Array, Counts]:
    """Rounds what enters the products of the feed-forward network to four bits where planned; derivative 1 (true: 0)."""
    if site not in ("up", "down") or plan.ffn_full is None:
        return x, Counts()
    scale = context.scales[site]
    name = f"{site}.activation_bits"
    bits = deployed_bits(gates.detach(context.widths[name]), *bits_range(name))
    step = power_of_two(jnp.maximum(bits - NARROW_BITS, 0.0))
    whole = jnp.floor(jnp.round(gates.detach(x) / scale) / step + 0.5)
    narrow = (
        jnp.where(step > 1.0, jnp.clip(whole, -NARROW_LIMIT, NARROW_LIMIT), whole) * step * scale
    )
    narrow = gates.straight_through(narrow, x)
    full = plan.ffn_full[:, :, None].astype(x.dtype)
    return narrow + full * (x - narrow), Counts()


def hard_rows(context: Context, x: jax.Array, plan: Plan, site: str) -> tuple[jax.Array, Counts]:
    """Rounds codes to four bits, halves up, where the plan says so."""
    if site not in ("up", "down") or plan.ffn_full is None:
        return x, Counts()
    bits = context.widths[f"{site}.activation_bits"]
    dropped = jnp.maximum(bits - NARROW_BITS, 0).astype(jnp.int32)
    half = jnp.right_shift(jnp.left_shift(1, dropped), 1)
    whole = jnp.right_shift(x.astype(jnp.int32) + half, dropped)
    limit = jnp.where(dropped > 0, NARROW_LIMIT, code_limit(LINEAR_BITS))
    narrow = jnp.left_shift(jnp.clip(whole, -limit, limit), dropped)
    return jnp.where(plan.ffn_full[:, :, None] > 0.5, x, narrow.astype(x.dtype)), Counts()


def _hooks(plan: PlanFn, rows: TensorFn) -> Hooks:
    return Hooks(
        plan=plan,
        filter=keep_planned,
        execution=execution,
        on_activation=rows,
        generates_keys=True,
        head_knobs=(),
    )


fact = Mechanism(
    name="fact",
    summary="attention predicted by leading ones, one-hot rows copied, narrow feed-forward rows (FACT, ISCA 2023)",
    knobs=knobs,
    thresholds=ThresholdScale(
        names=ENTRIES,
        in_order=True,
        from_strength=from_strength,
        to_strength=to_strength,
        from_setting=from_setting,
        settings=((1.0, 16.0, 0.0), (0.5, 5.0, 0.5), (0.25, 3.0, 1.0)),
        start_kept=(0.6, 0.9, 0.9),
        kept=kept_fractions,
        pairs_entry=0,
    ),
    codes=codes,
    soft=_hooks(soft_plan, soft_rows),
    hard=_hooks(hard_plan, hard_rows),
    bypass=Hooks(execution=execution, generates_keys=True),
)
