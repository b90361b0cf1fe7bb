"""SpAtten: tokens and heads pruned in cascade, values pruned by row, scores from high bits with low ones read on demand.

A token's importance is the attention it got so far, over layers, heads and queries; a head's the size of its output. Each
layer keeps the most important of both, and what is pruned is gone for all later layers. Scores come from the high bits of
queries and keys; a row whose largest probability is too small reads the low bits and starts again. Of a row's
probabilities the largest are kept, and only their values are read.

Of a causal model a query knows what it and the queries before it attended to, as in generation: its keys and heads are
pruned, not the tokens, and a key once pruned from a row stays so.

Stored shares are cumulative over layers, each the product of the trained parts up to it.

References:
  Wang, Zhang, Han, "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning", HPCA 2021, arXiv
  2012.09852, and its repository (mit-han-lab/spatten). Ours: kept numbers are rounded up; the first layer, which knows
  nothing, keeps all; the first token stays, since a classifier may read it, and a token that some query cannot see keeps
  itself; low bits are four (6 + 4 and 8 + 4 there); a threshold for them above 255/256 always reads them.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from codesign import gates
from codesign.mechanisms.protocol import (
    Carry,
    Context,
    Counts,
    Hooks,
    Mechanism,
    Operands,
    Plan,
    Selection,
    computed_rows,
    exact_execution,
)
from codesign.mechanisms.spatten_cascade import (
    ATTENTION_BITS,
    OFF_PART,
    as_stored,
    hard_carry,
    hard_plan,
    keep_output,
    soft_carry,
    soft_plan,
    start,
    whole_or,
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
from codesign.segments import SHARE_ONE, hard_top, soft_exact_top
from codesign.tables import exp_table, table_exponentials
from codesign.workload import (
    Stream,
    Workload,
    fetched_vectors,
    operation,
    row_statistics,
    stream,
)

LOW_BITS = 4
"""Bits that a row reads on demand (arXiv 2012.09852: 6 + 4 and 8 + 4)."""
FACTOR_BITS = 10
"""Bits of a layer's factor on the sizes of its heads' outputs, whose codes differ in scale."""
PROBABILITY_ONE = 256
"""The threshold of the largest probability is stored in 1/256."""
ALWAYS_CODE = PROBABILITY_ONE + 1
"""Storage code of a layer that always reads all bits."""
ENTRIES = ("tokens", "heads", "values", "low bits")
"""Entries of the knob `threshold`: parts of tokens, heads and values that stay, and the threshold for reading low bits."""
START = (0.95, 0.97, 0.5, 0.1)
"""Parts of a new policy by entry (ours, but the last: arXiv 2012.09852)."""
REFETCH_WIDTH = 0.1
"""Unit of the temperature of the gate that reads low bits, a probability (ours: its usual threshold)."""


def knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns start values: `threshold` v `[L, 4]`, the parts of `ENTRIES` being sigmoid(v)."""
    del num_heads
    start = jnp.asarray(part_variable(np.asarray(START)), jnp.float32)
    return {"threshold": jnp.broadcast_to(start, (num_layers, len(ENTRIES)))}


def codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns what the chip stores, int64.

    `threshold` `[L, 4]`: cumulative shares of tokens and of heads and the share of values in 1/1024, and the threshold for
    low bits in 1/256, 257 reads them always; `head_factor` `[L]`, the size of a code of the heads' outputs.
    """
    parts = kept_part(knobs["threshold"])
    whole = np.where(parts >= OFF_PART, 1.0, parts)
    shares = np.stack([*np.cumprod(whole[:, :2], axis=0).T, whole[:, 2]], axis=-1)
    stored = np.clip(np.rint(shares * SHARE_ONE), 1, SHARE_ONE)
    low = np.where(parts[:, 3] >= OFF_PART, ALWAYS_CODE, np.rint(parts[:, 3] * PROBABILITY_ONE))
    factor = np.rint(tensors["out"] / np.max(tensors["out"]) * 2.0**FACTOR_BITS)
    return {
        "threshold": np.concatenate([stored, low[:, None]], axis=-1).astype(np.int64),
        "head_factor": np.maximum(factor, 1).astype(np.int64),
    }


def ramp(num_layers: int, kept: float, first: int) -> np.ndarray:
    """Returns kept shares by layer, `[L]`: all before layer `first`, then falling evenly to `kept` at the last."""
    steps = np.arange(num_layers) - first + 1
    return 1.0 + (kept - 1.0) * np.maximum(steps, 0) / max(num_layers - first, 1)


def from_setting(
    setting: tuple[float, ...], shape: tuple[int, ...], ranges: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the variables of final shares of tokens and heads, a share of values, and a threshold for low bits.

    Tokens start to go after the first 15 % of layers, heads after 30 % (repository), as a ramp.
    """
    del ranges
    num_layers = shape[0]
    parts = np.empty(shape)
    for entry, begin in ((0, 0.15), (1, 0.3)):
        shares = ramp(num_layers, setting[entry], max(1, math.ceil(begin * num_layers)))
        parts[:, entry] = shares / np.concatenate([[1.0], shares[:-1]])
    parts[:, 2:] = setting[2:]
    return part_variable(parts)


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns fractions of tokens and heads that live, values that are used, pairs read in full, batch means, `[L, 4]`."""
    rows = workload.rows
    queries, existing = rows["attention"].queries, rows["all"].queries
    alive = jnp.sum(queries > 0, axis=2)
    kept = jnp.sum(rows["attention"].segments[..., 0], axis=2)
    fractions = (
        jnp.max(queries, axis=2) / jnp.maximum(jnp.max(existing, axis=2), 1.0),
        alive / queries.shape[2],
        jnp.sum(rows["used"].segments[..., 0], axis=2) / jnp.maximum(kept, 1.0),
        jnp.sum(rows["qk"].segments[..., 0], axis=2) / jnp.maximum(kept, 1.0),
    )
    return jnp.stack([jnp.mean(fraction, axis=0) for fraction in fractions], axis=-1)


def soft_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Scores by high bits, and by all of them where a gate says so."""
    del carry
    relaxation = context.relaxation
    weights = _weights(context, plan)
    step = power_of_two(jnp.asarray(float(LOW_BITS), context.valid.dtype))
    high = jnp.einsum(
        "bhtd,bhsd->bhts", *(_cut(code, step) for code in (operands.query, operands.key))
    )
    whole = jnp.einsum("bhtd,bhsd->bhts", operands.query, operands.key)
    logits = high * operands.logit_scale
    top = jnp.max(jnp.where(weights > 0.5, logits, -jnp.inf), axis=-1, keepdims=True)
    top = gates.detach(jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights * jnp.exp(jnp.minimum(logits - top, 0.0)), axis=-1, keepdims=True)
    has_any = total > 0.0
    largest = jnp.where(has_any, 1.0 / jnp.where(has_any, total, 1.0), 1.0)
    part = jax.nn.sigmoid(context.knobs["threshold"][3])
    is_always = gates.detach(part) >= OFF_PART
    if relaxation.straight_through:
        stored = jnp.round(gates.detach(part) * PROBABILITY_ONE) / PROBABILITY_ONE
        part = gates.straight_through(stored, part)
        largest = gates.detach(largest)
    gate = jax.nn.sigmoid((part - largest) / (relaxation.temperature * REFETCH_WIDTH))
    low = jnp.where(is_always, 1.0, gate)
    if relaxation.straight_through:
        low = gates.straight_through((largest < part) | is_always, low)
    low = low * has_any
    return _selection(context, plan, weights, high + low * (whole - high), low[..., 0])


def hard_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Scores by high bits, and by all of them where the chip reads them."""
    del carry
    weights = _weights(context, plan)
    kept = weights > 0.5
    query, key = (
        jnp.right_shift(code.astype(jnp.int32), LOW_BITS) for code in (operands.query, operands.key)
    )
    high = exact_einsum("bhtd,bhsd->bhts", query, key, ATTENTION_BITS - LOW_BITS)
    high = high.astype(jnp.float64) * 4.0**LOW_BITS
    whole = exact_einsum("bhtd,bhsd->bhts", operands.query, operands.key, ATTENTION_BITS)
    top = jnp.max(jnp.where(kept, high, -jnp.inf), axis=-1, keepdims=True)
    table = jnp.asarray(exp_table())
    powers = table_exponentials(
        jnp.where(kept, top - high, 0.0),
        context.knobs["exp_mantissa"],
        context.knobs["exp_shift"],
        table,
    )
    total = jnp.sum(jnp.where(kept, powers, 0).astype(jnp.int64), axis=-1, keepdims=True)
    code = context.knobs["threshold"][3].astype(jnp.int64)
    is_small = table[0].astype(jnp.int64) * PROBABILITY_ONE < code * total
    low = (is_small | (code == ALWAYS_CODE)) & (total > 0)
    scores = jnp.where(low, whole.astype(jnp.float64), high)
    return _selection(context, plan, weights, scores, low[..., 0].astype(weights.dtype))


def _cut(code: jax.Array, step: jax.Array) -> jax.Array:
    """Returns codes without the part below `step`, a power of two; derivative 1 (true: 0)."""
    return gates.straight_through(jnp.floor(code / step) * step, code)


def _weights(context: Context, plan: Plan) -> jax.Array:
    """Returns the pairs that the plan leaves, `[B, H, T, S]`."""
    assert plan.keep is not None
    return context.pairs * plan.keep


def _selection(
    context: Context, plan: Plan, weights: jax.Array, scores: jax.Array, low: jax.Array
) -> tuple[Selection, Counts]:
    """Returns the planned pairs and their scores; rows `low` `[B, H, T]` read low bits."""
    kept = weights * computed_rows(context, plan)[..., None]
    assert plan.tokens is not None and plan.queries is not None
    trace = {
        "keep": jnp.stack([kept, kept * low[..., None]]) > 0.5,
        "tokens": plan.tokens > 0.5,
        "heads": plan.queries > 0.5,
    }
    selection = Selection(
        weights=weights,
        fetched=fetched_vectors(kept, is_binary=context.relaxation.straight_through),
        fetched_bits=jnp.zeros((), weights.dtype),
        trace=trace if context.tracing else {},
        scores=scores,
        notes={"low": low},
    )
    return selection, Counts()


def soft_probabilities(
    context: Context, probabilities: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array, Counts]:
    """Keeps the largest probabilities of a row by a gate round their quantile."""
    relaxation = context.relaxation
    part = jax.nn.sigmoid(context.knobs["threshold"][2])
    share = as_stored(whole_or(part), relaxation)
    share = jnp.broadcast_to(share, (probabilities.shape[1],))
    bits = deployed_bits(gates.detach(context.widths["qk_bits"]), *bits_range("qk_bits"))
    whole = probabilities * code_limit(bits)
    if relaxation.straight_through:
        whole = gates.detach(jnp.round(whole))
    pairs = (selection.weights > 0.5).astype(probabilities.dtype)
    used = selection.weights * soft_exact_top(whole, pairs, share, ATTENTION_BITS, relaxation)
    return probabilities * used, used, Counts()


def hard_probabilities(
    context: Context, probabilities: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array, Counts]:
    """Keeps the largest probabilities of a row, the first of equals first."""
    share = jnp.broadcast_to(context.knobs["threshold"][2], (probabilities.shape[1],))
    used = hard_top(probabilities, selection.weights, share, ATTENTION_BITS)
    used = used & (selection.weights > 0.5)
    return probabilities * used, used.astype(selection.weights.dtype), Counts()


def execution(
    context: Context,
    operands: Operands,
    selection: Selection,
    plan: Plan,
    value_weights: jax.Array,
) -> Counts:
    """Counts scores by high and by all bits, softmax, selections, and the values that are used."""
    query = operands.query
    head_dim, num_keys = query.shape[-1], operands.key.shape[2]
    qk_bits, v_bits = context.widths["qk_bits"], context.widths["v_bits"]
    high_bits = qk_bits - LOW_BITS
    rows = computed_rows(context, plan)
    row_keys = jnp.sum(selection.weights, axis=-1) * rows
    row_low = row_keys * selection.notes["low"]
    row_used = jnp.sum(value_weights, axis=-1) * rows
    kept, low, used = (jnp.sum(keys, axis=-1) for keys in (row_keys, row_low, row_used))
    queries = jnp.broadcast_to(jnp.sum(rows, axis=-1), kept.shape)
    again = jnp.sum(rows * selection.notes["low"], axis=-1)
    exists = plan.notes["exists"][:, None]
    present = (jnp.sum(exists, axis=2) > 0).astype(kept.dtype)
    all_keys = jnp.broadcast_to(jnp.sum(exists, axis=-1) * present, row_keys.shape)
    resident = jnp.sum(context.valid, axis=-1) * head_dim
    is_binary = context.relaxation.straight_through
    kept_rows = selection.weights * rows[..., None]
    low_vectors, value_vectors = (
        fetched_vectors(mask, is_binary=is_binary)
        for mask in (
            kept_rows * selection.notes["low"][..., None],
            value_weights * rows[..., None],
        )
    )

    def keys(vectors: jax.Array, bits: jax.Array | float) -> Stream:
        return stream(vectors, bits, head_dim, buffer="key", resident_bits=resident * qk_bits)

    return Counts(
        operations={
            "filter0.mac": operation(kept * head_dim, high_bits, high_bits),
            "threshold.compare": operation(queries, 16.0, 1.0),
            "qk.mac": operation(low * head_dim, qk_bits, qk_bits),
            "softmax.exp": operation(kept + low, qk_bits, qk_bits),
            "softmax.reciprocal": operation(queries + again, qk_bits, qk_bits),
            "select.compare": operation(kept + plan.notes["compared"], qk_bits, 1.0),
            "pv.mac": operation(used * head_dim, qk_bits, v_bits),
            "output.multiply": operation(queries * head_dim, qk_bits, v_bits),
        },
        rows={
            "all": row_statistics(all_keys, present, num_keys),
            "filter0": row_statistics(row_keys, rows, num_keys),
            "qk": row_statistics(row_low, rows, num_keys),
            "attention": row_statistics(row_keys, rows, num_keys),
            "used": row_statistics(row_used, rows, num_keys),
        },
        streams={
            "query": stream(queries[..., None], qk_bits, head_dim),
            "output": stream(queries[..., None], context.widths["out.activation_bits"], head_dim),
            "key0": keys(selection.fetched, high_bits),
            "key1": keys(low_vectors, float(LOW_BITS)),
            "value": stream(
                value_vectors, v_bits, head_dim, buffer="value", resident_bits=resident * v_bits
            ),
        },
    )


def whole_execution(
    context: Context,
    operands: Operands,
    selection: Selection,
    plan: Plan,
    value_weights: jax.Array,
) -> Counts:
    """Counts exact attention on the machine: all bits at once, all values."""
    counts = exact_execution(context, operands, selection, plan, value_weights)
    rows = counts.rows | dict.fromkeys(("qk", "used"), counts.rows["attention"])
    result: Counts = counts.replace(rows=rows)  # type: ignore[attr-defined]
    return result


spatten = Mechanism(
    name="spatten",
    summary="tokens and heads pruned in cascade, values by row, low bits on demand (SpAtten, arXiv 2012.09852)",
    knobs=knobs,
    thresholds=ThresholdScale(
        names=ENTRIES,
        in_order=False,
        from_strength=from_strength,
        to_strength=to_strength,
        from_setting=from_setting,
        settings=((1.0, 1.0, 1.0, 1.0), (0.7, 0.8, 0.5, 0.1), (0.3, 0.6, 0.2, 0.1)),
        start_kept=(0.85, 0.95, 0.5, 0.3),
        kept=kept_fractions,
    ),
    codes=codes,
    soft=Hooks(
        start=start,
        plan=soft_plan,
        filter=soft_filter,
        on_probabilities=soft_probabilities,
        execution=execution,
        on_output=keep_output,
        carry=soft_carry,
    ),
    hard=Hooks(
        start=start,
        plan=hard_plan,
        filter=hard_filter,
        on_probabilities=hard_probabilities,
        execution=execution,
        on_output=keep_output,
        carry=hard_carry,
    ),
    bypass=Hooks(execution=whole_execution),
)
