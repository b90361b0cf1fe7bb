"""Energon: mix-precision multi-round filtering (MP-MRF) of attention keys.

Each query row filters its keys in rounds of growing key precision; a key survives a round if its low-bit score exceeds
a threshold between the row's mean and its maximum (or minimum). Exact attention runs on the survivors.

References:
  Zhou et al., "Energon: Towards Efficient Acceleration of Transformers Using Dynamic Sparse Attention", IEEE TCAD,
  arXiv 2110.09310. Widths, rounds, and the row statistics in the threshold are the paper's as its published reading
  notes give them. The threshold's exact form, nested codes, the rational alpha, and the never-empty rule are
  reconstructions.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from codesign import gates
from codesign.mechanisms.energon_round import (
    ALPHA_ONE,
    FILTER_BITS,
    OFF_CODE,
    deployed_round,
    exact_total,
    filter_operand,
    hard_round,
    soft_round,
)
from codesign.mechanisms.protocol import (
    Carry,
    Context,
    Counts,
    Hooks,
    Mechanism,
    Operands,
    Plan,
    Selection,
    fetched_whole,
)
from codesign.mechanisms.threshold_scale import ThresholdScale
from codesign.policy import bits_range
from codesign.quantize import deployed_bits, exact_einsum
from codesign.workload import (
    Workload,
    binary_fetched_vectors,
    fetched_vectors,
    grid_levels,
    operation,
    row_statistics,
    stream,
)

MAX_ALPHA = 0.99
"""Largest |alpha| that a start value or a common move gives: the gradient of tanh fades beyond (ours)."""
OFF_ALPHA = -1.0
"""alpha of a round that keeps all, in settings."""
NUM_ROUNDS = 2
"""Rounds of the published machine."""
KEY_BITS = (2.0, 4.0)  # filter widths in bit: INT2, then INT4 keys (arXiv 2110.09310)
QUERY_BITS = 4.0  # against INT4 queries (arXiv 2110.09310)


def knobs(num_layers: int, num_heads: int, num_rounds: int = NUM_ROUNDS) -> dict[str, jax.Array]:
    """Returns start values: alpha 0 in every round and the published filter widths.

    Returns:
      `threshold` v `[L, H, R]` (alpha = tanh v), `query_bits` `[L]` and `key_bits` `[L, R]` in bit.
    """
    widths = [KEY_BITS[0] + 2.0 * r for r in range(num_rounds)]
    return {
        "threshold": jnp.zeros((num_layers, num_heads, num_rounds)),
        "query_bits": jnp.full((num_layers,), QUERY_BITS),
        "key_bits": jnp.broadcast_to(jnp.asarray(widths), (num_layers, num_rounds)),
    }


def alpha_code(alpha: jax.Array | np.ndarray) -> jax.Array:
    """Returns the storage code of alpha: round(128 alpha) in [-127, 127], or -128 (off) below -127.5/128."""
    scaled = ALPHA_ONE * jnp.asarray(alpha)
    return jnp.where(
        scaled < OFF_CODE + 0.5, float(OFF_CODE), jnp.clip(jnp.round(scaled), -127.0, 127.0)
    )


def codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the thresholds as the chip stores them: int64 `[L, H, R]` in 1/128, -128 = keep all."""
    del tensors
    alpha = np.tanh(np.asarray(knobs["threshold"], np.float64))
    scaled = ALPHA_ONE * alpha
    rounded = np.clip(np.rint(scaled), -127, 127)
    return {"threshold": np.where(scaled < OFF_CODE + 0.5, OFF_CODE, rounded).astype(np.int64)}


def from_strength(strength: np.ndarray, ranges: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the threshold variable v = atanh(alpha) with alpha = 2 * strength - 1, limited to (-0.99, 0.99)."""
    del ranges
    return np.arctanh(np.clip(2.0 * strength - 1.0, -MAX_ALPHA, MAX_ALPHA))


def to_strength(threshold: np.ndarray, ranges: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns (alpha + 1) / 2."""
    del ranges
    return (np.tanh(np.asarray(threshold, np.float64)) + 1.0) / 2.0


def from_setting(
    setting: tuple[float, ...], shape: tuple[int, ...], ranges: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the threshold variable of one alpha per round; -1 switches a round off (as near as 0.99 comes to it)."""
    alpha = np.broadcast_to(np.asarray(setting, np.float64), shape)
    return from_strength((alpha + 1.0) / 2.0, ranges)


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns the kept fraction of pairs after each round, mean over the batch, `[L, H, R]`."""
    operations = workload.operations
    rounds = sum(name.endswith(".statistic") for name in operations)
    after = [operations[f"filter{index}.statistic"].count for index in range(1, rounds)]
    pairs = operations["filter0.statistic"].count
    fractions = [count / pairs for count in (*after, operations["softmax.exp"].count)]
    return jnp.stack([jnp.mean(fraction, axis=0) for fraction in fractions], axis=-1)


def soft_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Filters in rounds of sigmoid gates; straight-through the forward decisions are those of `hard_filter`."""
    del plan, carry
    relaxation = context.relaxation
    straight_through = relaxation.straight_through
    query = operands.query
    # Transposed, the products below need no other copy of the keys, neither forward nor backward.
    key = jnp.swapaxes(operands.key, 2, 3)
    alpha = jnp.tanh(context.knobs["threshold"])
    stored = alpha_code(gates.detach(alpha))
    alpha = (
        gates.straight_through(jnp.clip(stored, -127.0, 127.0) / ALPHA_ONE, alpha)
        if straight_through
        else alpha
    )
    # Codes and filters have their deployed widths on the relaxed path too, where counts use fractional ones.
    widths = {
        name: deployed_bits(gates.detach(context.widths[name]), *bits_range(name))
        for name in ("qk_bits", "query_bits", "key_bits")
    }
    code_bits = widths["qk_bits"]
    query_low = filter_operand(
        query,
        context.knobs["query_bits"],
        widths["query_bits"],
        code_bits,
        straight_through=straight_through,
    )
    weights = jnp.broadcast_to(context.pairs, (*query.shape[:3], key.shape[3])).astype(query.dtype)
    all_weights, fetched = [weights], []
    rows = context.valid[:, None]
    trace: dict[str, list[jax.Array]] = {"scores": [], "keep": []}
    for index in range(alpha.shape[-1]):
        key_low = filter_operand(
            key,
            context.knobs["key_bits"][index],
            widths["key_bits"][index],
            code_bits,
            straight_through=straight_through,
        )
        scores = jnp.matmul(query_low, key_low)
        if straight_through:
            weights = deployed_round(
                scores,
                weights,
                alpha[:, index],
                stored[:, index].astype(jnp.int32),
                relaxation.temperature,
                exact_total(query_low, key_low, weights),
            )
            weights, vectors = binary_fetched_vectors(weights, rows)
        else:
            gate = soft_round(scores, weights, context.pairs, alpha[:, index], relaxation)
            is_off = (stored[:, index] == OFF_CODE)[None, :, None, None]
            weights = weights * jnp.where(is_off, 1.0, gate)
            vectors = fetched_vectors(weights, rows)
        all_weights.append(weights)
        fetched.append(vectors)
        trace["scores"].append(scores)
        trace["keep"].append(weights > 0.5)
    return _selection(context, operands, all_weights, fetched, trace)


def truncated(code: jax.Array, dropped: jax.Array) -> jax.Array:
    """Returns codes without their lowest `dropped` bits, in their own type."""
    return jnp.right_shift(code, dropped.astype(code.dtype))


def hard_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Filters in integer rounds, as the chip does."""
    del plan, carry
    query, key = operands.query, operands.key
    thresholds = context.knobs["threshold"]
    code_bits = context.widths["qk_bits"]
    query_low = truncated(query, code_bits - context.widths["query_bits"])
    keep = jnp.broadcast_to(context.pairs > 0.5, (*query.shape[:3], key.shape[2]))
    all_weights, fetched = [keep.astype(context.valid.dtype)], []
    trace: dict[str, list[jax.Array]] = {"scores": [], "keep": []}
    for index in range(thresholds.shape[-1]):
        key_low = truncated(key, code_bits - context.widths["key_bits"][index])
        scores = exact_einsum("bhtd,bhsd->bhts", query_low, key_low, FILTER_BITS)
        code = thresholds[:, index].astype(jnp.int32)
        is_on = jnp.any(code != OFF_CODE)
        # A branch skips a round that is off for all heads; it also keeps XLA from working out the decisions anew wherever
        # they are read (on a CPU a third of MiniLM's time).
        keep = jax.lax.cond(is_on, hard_round, lambda scores, keep, code: keep, scores, keep, code)
        all_weights.append(keep.astype(context.valid.dtype))
        fetched.append(fetched_vectors(all_weights[-1], context.valid[:, None], is_binary=True))
        trace["scores"].append(scores)
        trace["keep"].append(keep)
    return _selection(context, operands, all_weights, fetched, trace)


def _selection(
    context: Context,
    operands: Operands,
    all_weights: list[jax.Array],
    fetched: list[jax.Array],
    trace: dict[str, list[jax.Array]],
) -> tuple[Selection, Counts]:
    """Returns the last round's selection and the counts of all rounds.

    `all_weights[r]` enter round r, after which `fetched[r]` vectors are wanted.
    """
    head_dim, num_keys = operands.query.shape[-1], operands.key.shape[2]
    exists = context.valid[:, None, :, None]
    widths = context.widths
    query_bits, key_bits = widths["query_bits"], widths["key_bits"]
    counts = Counts()
    planes = [key_bits[0]] + [key_bits[r] - key_bits[r - 1] for r in range(1, len(all_weights) - 1)]
    keys = jnp.sum(context.valid, axis=-1)
    resident = keys * head_dim * widths["qk_bits"]
    # Bits of the longest list's entries: of the example's own keys, whatever it is padded to.
    powers = jnp.asarray([2.0**g for g in range(grid_levels(num_keys))], keys.dtype)
    index_bits = jnp.maximum(jnp.sum(keys[:, None] > powers[None, :], axis=1), 1)[:, None]
    listed = jnp.zeros((), context.valid.dtype)
    before = [fetched_whole(context, operands.query.shape[1]), *fetched]
    for index, plane in enumerate(planes):
        row_keys = jnp.sum(all_weights[index], axis=-1) * exists[..., 0]
        alive = jnp.sum(row_keys, axis=-1)
        row_survivors = jnp.sum(all_weights[index + 1], axis=-1) * exists[..., 0]
        listed = listed + jnp.sum(row_survivors, axis=-1)
        name = f"filter{index}"
        counts += Counts(
            operations={
                f"{name}.mac": operation(alive * head_dim, query_bits, plane),
                f"{name}.statistic": operation(alive, query_bits, plane),
                f"{name}.compare": operation(alive, query_bits, plane),
            },
            rows={name: row_statistics(row_keys, exists[..., 0], num_keys)},
            streams={
                f"key{index}": stream(
                    before[index], plane, head_dim, buffer="key", resident_bits=resident
                )
            },
        )
    queries = jnp.broadcast_to(jnp.sum(exists[..., 0], axis=-1), listed.shape)
    counts += Counts(
        operations={
            "threshold.evaluate": operation(queries * len(planes), 16.0, 8.0),
            "index.bits": operation(listed * index_bits, 1.0, 1.0),
        }
    )
    selection = Selection(
        weights=all_weights[-1],
        fetched=fetched[-1],
        fetched_bits=key_bits[-1],
        trace={name: jnp.stack(values) for name, values in trace.items()}
        if context.tracing
        else {},
    )
    return selection, counts


energon = Mechanism(
    name="energon",
    summary="multi-round low-bit filtering of keys by a row threshold (arXiv 2110.09310)",
    knobs=knobs,
    thresholds=ThresholdScale(
        names=tuple(f"round {index}" for index in range(NUM_ROUNDS)),
        in_order=True,
        from_strength=from_strength,
        to_strength=to_strength,
        from_setting=from_setting,
        settings=((OFF_ALPHA, OFF_ALPHA), (-0.5, -0.25), (0.0, 0.0)),
        start_kept=(0.85, 0.6),
        kept=kept_fractions,
        pairs_entry=-1,
    ),
    has_rounds=True,
    codes=codes,
    soft=Hooks(filter=soft_filter, head_knobs=("threshold",)),
    hard=Hooks(filter=hard_filter, head_knobs=("threshold",)),
)
