"""Exact top-k: each query row keeps the keys of its largest exact scores. The oracle of selection, and its dearest one.

Scores of all pairs are computed at full width. The k-th largest of a row is found by bisection, one bit of it in each pass
over the row; a last pass takes equal ones in order of their place. Softmax and values run on the k keys that are kept.

Mechanism and machine are ours: what every other mechanism predicts is exact here, and costs what exactness costs.
"""

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
    exact_execution,
    fetched_whole,
)
from codesign.mechanisms.threshold_scale import (
    ThresholdScale,
    from_strength,
    kept_part,
    part_variable,
    to_strength,
)
from codesign.quantize import exact_einsum
from codesign.segments import SHARE_ONE, exact_top, soft_exact_top
from codesign.workload import (
    Workload,
    binary_fetched_vectors,
    fetched_vectors,
    operation,
    row_statistics,
    stream,
)

ATTENTION_BITS = 16
"""Most bits of queries and keys."""
START_SHARE = 0.25
"""Kept share of a new policy (ours)."""


def score_bits(qk_bits: jax.Array | float, head_dim: int) -> jax.Array | float:
    """Returns the bits of an exact score, sign included: 2 b + ceil(log2 d), 38 at 16 bits and a width of 64."""
    return 2.0 * qk_bits + float((head_dim - 1).bit_length())


def _widest(head_dim: int) -> int:
    """Returns the bits of the widest exact score."""
    return int(score_bits(float(ATTENTION_BITS), head_dim))


def knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns start values: `threshold` v `[L, H, 1]`, a quarter of the keys kept, kept share sigmoid(v)."""
    start = float(part_variable(np.asarray(START_SHARE)))
    return {"threshold": jnp.full((num_layers, num_heads, 1), start)}


def codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the kept shares as the chip stores them, in 1/1024: int64 `[L, H, 1]` in [1, 1024]."""
    del tensors
    share = np.rint(kept_part(knobs["threshold"]) * SHARE_ONE)
    return {"threshold": np.clip(share, 1, SHARE_ONE).astype(np.int64)}


def from_setting(
    setting: tuple[float, ...], shape: tuple[int, ...], ranges: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the variables of one kept share."""
    kept = np.broadcast_to(np.asarray(setting, np.float64), shape)
    return from_strength(1.0 - kept, ranges)


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns the kept fraction of pairs, mean over the batch, `[L, H, 1]`."""
    operations = workload.operations
    fraction = operations["pv.mac"].count / operations["qk.mac"].count
    return jnp.mean(fraction, axis=0)[..., None]


def soft_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps keys by a gate round the quantile of the row; straight-through decisions are exact for float32 scores."""
    del plan, carry
    relaxation = context.relaxation
    scores = jnp.einsum("bhtd,bhsd->bhts", operands.query, operands.key)
    share = jax.nn.sigmoid(context.knobs["threshold"][:, 0])
    if relaxation.straight_through:
        stored = jnp.clip(jnp.round(gates.detach(share) * SHARE_ONE), 1.0, SHARE_ONE)
        share = gates.straight_through(stored / SHARE_ONE, share)
    weights = soft_exact_top(
        scores, context.pairs, share, _widest(operands.query.shape[-1]), relaxation
    )
    if relaxation.straight_through:
        weights, fetched = binary_fetched_vectors(weights, context.valid[:, None])
    else:
        fetched = fetched_vectors(weights, context.valid[:, None])
    return _selection(context, operands, weights, fetched)


def hard_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps keys as the chip does."""
    del plan, carry
    scores = exact_einsum("bhtd,bhsd->bhts", operands.query, operands.key, ATTENTION_BITS)
    width = _widest(operands.query.shape[-1])
    keep = exact_top(scores, context.pairs, context.knobs["threshold"][:, 0], width)
    weights = keep.astype(context.valid.dtype)
    fetched = fetched_vectors(weights, context.valid[:, None], is_binary=True)
    return _selection(context, operands, weights, fetched)


def _selection(
    context: Context, operands: Operands, weights: jax.Array, fetched: jax.Array
) -> tuple[Selection, Counts]:
    """Returns the kept keys, `fetched` of whose values are read, and what finding them took."""
    batch_heads, head_dim = operands.query.shape[:2], operands.query.shape[-1]
    qk_bits = context.widths["qk_bits"]
    exists = context.valid[:, None, :]
    pairs = jnp.sum(jnp.sum(context.pairs, axis=-1) * exists, axis=-1)
    # One pass for each bit of the threshold, one for equal scores.
    passes = score_bits(qk_bits, head_dim) + 1.0
    compared = jnp.broadcast_to(pairs, batch_heads) * passes
    keys = jnp.sum(context.valid, axis=-1)
    counts = Counts(
        operations={"select.compare": operation(compared, passes, 1.0)},
        streams={
            "key0": stream(
                fetched_whole(context, batch_heads[1]),
                qk_bits,
                head_dim,
                buffer="key",
                resident_bits=keys * head_dim * qk_bits,
            )
        },
    )
    selection = Selection(
        weights=weights,
        fetched=fetched,
        fetched_bits=qk_bits,
        trace={"keep": (weights > 0.5)[None]} if context.tracing else {},
    )
    return selection, counts


def execution(
    context: Context,
    operands: Operands,
    selection: Selection,
    plan: Plan,
    value_weights: jax.Array,
) -> Counts:
    """Counts exact attention whose scores are those of all pairs: kept or not, they are there before the selection."""
    counts = exact_execution(context, operands, selection, plan, value_weights)
    query, num_keys = operands.query, operands.key.shape[2]
    qk_bits = context.widths["qk_bits"]
    exists = context.valid[:, None, :]
    keys = jnp.broadcast_to(jnp.sum(context.pairs, axis=-1) * exists, query.shape[:3])
    scored = jnp.sum(keys, axis=-1) * query.shape[-1]
    operations = counts.operations | {"qk.mac": operation(scored, qk_bits, qk_bits)}
    rows = counts.rows | {"all": row_statistics(keys, exists, num_keys)}
    result: Counts = counts.replace(operations=operations, rows=rows)  # type: ignore[attr-defined]
    return result


topk = Mechanism(
    name="topk",
    summary="exact top-k of every row by bisection of full-width scores; the oracle of selection",
    knobs=knobs,
    thresholds=ThresholdScale(
        names=("kept share",),
        in_order=True,
        from_strength=from_strength,
        to_strength=to_strength,
        from_setting=from_setting,
        settings=((1.0,), (0.5,), (0.25,)),
        start_kept=(0.6,),
        kept=kept_fractions,
        pairs_entry=-1,
    ),
    has_rounds=True,
    codes=codes,
    soft=Hooks(filter=soft_filter, execution=execution, head_knobs=("threshold",)),
    hard=Hooks(filter=hard_filter, execution=execution, head_knobs=("threshold",)),
    bypass=Hooks(execution=execution),
)
