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
from codesign.mechanisms.protocol import (
    Carry,
    Context,
    Counts,
    Hooks,
    Mechanism,
    Operands,
    Plan,
    Selection,
    ThresholdScale,
)
from codesign.policy import bits_range
from codesign.quantize import deployed_bits, exact_einsum, power_of_two
from codesign.workload import Workload, fetched_vectors, operation, row_statistics, stream

ALPHA_ONE = 128
"""alpha is stored in 1/128 (8 bits, 7 of them fraction)."""
MAX_ALPHA = 0.99
"""Largest |alpha| that a start value or a common move gives: the gradient of tanh fades beyond (ours)."""
OFF_ALPHA = -1.0
"""alpha of a round that keeps all, in settings."""
OFF_CODE = -128
"""Storage code of a round that keeps all."""
NUM_ROUNDS = 2
"""Rounds of the published machine."""
KEY_BITS = (2.0, 4.0)  # filter widths in bit: INT2, then INT4 keys (arXiv 2110.09310)
QUERY_BITS = 4.0  # against INT4 queries (arXiv 2110.09310)
FILTER_LIMIT = 128**2
"""Largest product of two filter codes: both have at most 8 bits."""


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


def hard_round(scores: jax.Array, alive: jax.Array, code: jax.Array) -> jax.Array:
    """Returns which alive keys survive a round, by the integer threshold of the row.

    `theta = floor((|a| m + (128-|a|) mean) / 128)` with m the maximum (a >= 0) or the minimum of the alive scores,
    computed without a product or division per pair; strict comparison; the alive key of lowest index that has the
    maximum stays.

    Args:
      scores: Integer scores, int32 `[B, H, T, S]`; `S * max|score|` must stay below 2^31.
      alive: Keys alive at the start of the round, bool `[B, H, T, S]`.
      code: Storage codes, int32 `[H]`.

    Returns:
      Survivors, bool `[B, H, T, S]`.

    References:
      Energon's specification, section 2, "integer threshold": equal to the rational definition.
    """
    limits = np.iinfo(scores.dtype)
    number = jnp.sum(alive, axis=-1, dtype=scores.dtype)
    total = jnp.sum(jnp.where(alive, scores, 0), axis=-1)
    top = jnp.max(jnp.where(alive, scores, limits.min), axis=-1)
    bottom = jnp.min(jnp.where(alive, scores, limits.max), axis=-1)
    has_any = number > 0
    safe_number = jnp.maximum(number, 1)
    a = code.astype(scores.dtype)[None, :, None]
    weight = jnp.abs(a)
    extreme = jnp.where(has_any, jnp.where(a >= 0, top, bottom), 0)
    quotient = jnp.floor_divide(total, safe_number)
    rest = total - quotient * safe_number
    mean_part = (ALPHA_ONE - weight) * quotient + jnp.floor_divide(
        (ALPHA_ONE - weight) * rest, safe_number
    )
    theta = jnp.right_shift(weight * extreme + mean_part, 7)
    first_top = jnp.argmax(jnp.where(alive, scores, limits.min), axis=-1)
    is_first_top = jnp.arange(scores.shape[-1])[None, None, None, :] == first_top[..., None]
    survives = (scores > theta[..., None]) | is_first_top | (a == OFF_CODE)[..., None]
    return alive & survives


def soft_round(
    scores: jax.Array,
    weights: jax.Array,
    pairs: jax.Array,
    alpha: jax.Array,
    relaxation: gates.Relaxation,
) -> jax.Array:
    """Returns the gate of a round, differentiable in alpha and in the scores.

    `sigmoid((S - theta) / (temperature * std))` with the threshold of `hard_round` before its floor; statistics are
    weighted by the alive weights; maximum and minimum run over keys with w >= 0.5; only the std is held constant.

    Args:
      scores: Scores, `[B, H, T, S]`.
      weights: Alive weights at the start of the round, `[B, H, T, S]`.
      pairs: 1 for pairs that exist, `[B, 1, T, S]`.
      alpha: Threshold parameter in (-1, 1), `[H]`.
      relaxation: Temperature, in units of the row's standard deviation.
    """
    alive = weights >= 0.5
    alive = jnp.where(jnp.any(alive, axis=-1, keepdims=True), alive, pairs > 0.5)
    has_any = jnp.any(alive, axis=-1, keepdims=True)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-6)
    mean = jnp.sum(weights * scores, axis=-1, keepdims=True) / total
    variance = jnp.sum(weights * jnp.square(scores - mean), axis=-1, keepdims=True) / total
    top = jnp.max(jnp.where(alive, scores, -jnp.inf), axis=-1, keepdims=True)
    bottom = jnp.min(jnp.where(alive, scores, jnp.inf), axis=-1, keepdims=True)
    # Finite in a row without any key too: infinity times a zero gradient would be NaN.
    top, bottom = jnp.where(has_any, top, 0.0), jnp.where(has_any, bottom, 0.0)
    a = alpha[None, :, None, None]
    # Written so that it is exact in a row of equal scores, which then get half a gate each.
    theta = mean + a * jnp.where(a >= 0.0, top - mean, mean - bottom)
    soft = gates.Relaxation(
        temperature=relaxation.temperature, smoothness=relaxation.smoothness, straight_through=False
    )
    spread = jnp.sqrt(gates.detach(variance))
    return gates.gate(scores, theta, soft, spread=spread)


def filter_operand(
    code: jax.Array,
    bits: jax.Array,
    width: jax.Array,
    code_bits: jax.Array,
    *,
    straight_through: bool,
) -> jax.Array:
    """Returns the top bits of a code, floor(code * 2^(b - b_a)), differentiable in the code and in b.

    Derivatives: 2^(b - b_a) to the code (true: 0); to the bits the difference of the two neighbouring truncations.

    Args:
      code: Codes of `code_bits` bits, `[..., d]`.
      bits: Trainable width of the filter, scalar.
      width: Deployed width of the filter, scalar.
      code_bits: Deployed width of `code`, scalar.
      straight_through: Whether the forward value is the deployed one.
    """
    bits = jnp.asarray(bits, code.dtype)
    high_limit = bits_range("query_bits")[1]
    low = jnp.minimum(jnp.floor(bits), high_limit - 1.0)
    fraction = bits - low

    def truncated(b: jax.Array) -> jax.Array:
        step = gates.detach(power_of_two(code_bits - b))
        ratio = code / step
        return gates.straight_through(jnp.floor(ratio), ratio) * step

    unit = gates.detach(power_of_two(width - code_bits))
    soft = ((1.0 - fraction) * truncated(low) + fraction * truncated(low + 1.0)) * unit
    if not straight_through:
        return soft
    return gates.straight_through(jnp.floor(code * unit), soft)


def soft_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Filters in rounds of sigmoid gates; straight-through the forward decisions are those of `hard_filter`."""
    del plan, carry
    relaxation = context.relaxation
    straight_through = relaxation.straight_through
    query, key = operands.query, operands.key
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
    weights = jnp.broadcast_to(context.pairs, (*query.shape[:3], key.shape[2])).astype(query.dtype)
    keep = weights > 0.5
    all_weights = [weights]
    trace: dict[str, list[jax.Array]] = {"scores": [], "keep": []}
    for index in range(alpha.shape[-1]):
        key_low = filter_operand(
            key,
            context.knobs["key_bits"][index],
            widths["key_bits"][index],
            code_bits,
            straight_through=straight_through,
        )
        scores = jnp.einsum("bhtd,bhsd->bhts", query_low, key_low)
        gate = soft_round(scores, weights, context.pairs, alpha[:, index], relaxation)
        is_off = (stored[:, index] == OFF_CODE)[None, :, None, None]
        gate = jnp.where(is_off, 1.0, gate)
        if straight_through:
            codes_in = jnp.round(gates.detach(scores)).astype(jnp.int32)
            keep = hard_round(codes_in, keep, stored[:, index].astype(jnp.int32))
            weights = gates.straight_through(keep.astype(weights.dtype), weights * gate)
        else:
            weights = weights * gate
            keep = weights > 0.5
        all_weights.append(weights)
        trace["scores"].append(scores)
        trace["keep"].append(keep)
    return _selection(context, operands, all_weights, trace)


def hard_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Filters in integer rounds, as the chip does."""
    del plan, carry
    query, key = operands.query, operands.key
    thresholds = context.knobs["threshold"]
    code_bits = context.widths["qk_bits"]
    query_low = jnp.right_shift(query, code_bits - context.widths["query_bits"])
    keep = jnp.broadcast_to(context.pairs > 0.5, (*query.shape[:3], key.shape[2]))
    all_weights = [keep.astype(context.valid.dtype)]
    trace: dict[str, list[jax.Array]] = {"scores": [], "keep": []}
    for index in range(thresholds.shape[-1]):
        key_low = jnp.right_shift(key, code_bits - context.widths["key_bits"][index])
        scores = exact_einsum("bhtd,bhsd->bhts", query_low, key_low, FILTER_LIMIT).astype(jnp.int32)
        keep = hard_round(scores, keep, thresholds[:, index].astype(jnp.int32))
        all_weights.append(keep.astype(context.valid.dtype))
        trace["scores"].append(scores)
        trace["keep"].append(keep)
    return _selection(context, operands, all_weights, trace)


def _selection(
    context: Context,
    operands: Operands,
    all_weights: list[jax.Array],
    trace: dict[str, list[jax.Array]],
) -> tuple[Selection, Counts]:
    """Returns the last round's selection and the counts of all rounds; `all_weights[r]` enter round r."""
    head_dim, num_keys = operands.query.shape[-1], operands.key.shape[2]
    exists = context.valid[:, None, :, None]
    widths = context.widths
    query_bits, key_bits = widths["query_bits"], widths["key_bits"]
    counts = Counts()
    planes = [key_bits[0]] + [key_bits[r] - key_bits[r - 1] for r in range(1, len(all_weights) - 1)]
    keys = jnp.sum(context.valid, axis=-1)
    resident = keys * head_dim * widths["qk_bits"]
    index_bits = float(np.ceil(np.log2(max(num_keys, 2))))
    listed = jnp.zeros((), context.valid.dtype)
    fetched = fetched_vectors(context.pairs * exists)
    fetched = jnp.broadcast_to(
        fetched, (fetched.shape[0], operands.query.shape[1], fetched.shape[2])
    )
    for index, plane in enumerate(planes):
        row_keys = jnp.sum(all_weights[index] * exists, axis=-1)
        alive = jnp.sum(row_keys, axis=-1)
        row_survivors = jnp.sum(all_weights[index + 1] * exists, axis=-1)
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
                    fetched, plane, head_dim, buffer="key", resident_bits=resident
                )
            },
        )
        fetched = fetched_vectors(all_weights[index + 1] * exists)
    queries = jnp.broadcast_to(jnp.sum(exists[..., 0], axis=-1), listed.shape)
    counts += Counts(
        operations={
            "threshold.evaluate": operation(queries * len(planes), 16.0, 8.0),
            "index.bits": operation(listed * index_bits, 1.0, 1.0),
        }
    )
    selection = Selection(
        weights=all_weights[-1],
        fetched=fetched,
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
    ),
    has_rounds=True,
    codes=codes,
    soft=Hooks(filter=soft_filter),
    hard=Hooks(filter=hard_filter),
)
