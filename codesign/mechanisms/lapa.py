"""LAPA: keys and scores predicted by shifts, plane by plane, keys dropped between planes, K and V made on demand.

Keys are predicted from the tokens and the leading ones of the weights before any key exists (ALOC). Rounds then add up
scores from ever more of the predicted keys' bits and the leading ones of the real queries (MRSA); after each round a key
stays if its score lies no further below the row's maximum than a trained part of the maximum's distance from the mean
(DDF). Only tokens that some query of a head still wants become keys and values of that head.

Differs on purpose from the specification: predicted keys are requantised like real ones and cut to their top eight bits,
one multiplier per column instead of one shift per head, because weights have one scale per column; K and V are made from
tokens and weights of the integer path, at most 8 bits.

References:
  Wang et al., "LAPA: Log-Domain Prediction-Driven Dynamic Sparsity Accelerator for Transformer Model", arXiv 2512.07855.
  Only its abstract was to be had: the three parts are the paper's, their arithmetic is a reconstruction.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from codesign import gates
from codesign.backward import row_spread
from codesign.gates import Relaxation
from codesign.log_codes import leading_one, leading_one_operand
from codesign.mechanisms.on_demand import (
    BYPASS,
    hard_plan,
    on_demand,
    soft_plan,
    top_code,
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
    part_variable,
    to_strength,
)
from codesign.policy import bits_range
from codesign.quantize import deployed_bits, exact_einsum, power_of_two
from codesign.workload import Workload, operation

ALPHA_ONE = 128
"""alpha is stored in 1/128 (8 bits, 7 of them fraction)."""
MAX_ALPHA = 2.0
"""What alpha tends to (ours): 255/128 is the loosest threshold that is stored."""
OFF_CODE = 256
"""Storage code of a round that keeps all."""
KEY_BITS = (2.0, 4.0, 8.0)
"""Bits of the predicted keys that the rounds see, sign included (reconstruction: each costs as much as all before it)."""
CODE_BITS, CODE_LIMIT = 8, 127
"""Width and largest magnitude of predicted keys and of queries in the prediction, bit and codes."""
QUERY_CODE_BITS = 4.0
"""Sign and place of the leading one of an 8-bit query, bit."""
START_ALPHAS = (1.25, 1.10, 1.00)
"""Start values, which keep 78, 45 and 19 % of Gaussian rows (reconstruction)."""
FAR = 2**24
"""Further below than any score."""


def knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns start values: `threshold` v `[L, H, 3]` (alpha = 2 sigmoid v) and `key_bits` `[L, 3]` in bit."""
    start = jnp.asarray(part_variable(np.asarray(START_ALPHAS) / MAX_ALPHA), jnp.float32)
    return {
        "threshold": jnp.broadcast_to(start, (num_layers, num_heads, len(KEY_BITS))),
        "key_bits": jnp.broadcast_to(jnp.asarray(KEY_BITS), (num_layers, len(KEY_BITS))),
    }


def codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the thresholds as the chip stores them: int64 `[L, H, R]` in 1/128, 256 = keep all."""
    del tensors
    scaled = ALPHA_ONE * MAX_ALPHA * kept_part(knobs["threshold"])
    return {"threshold": np.where(scaled > 255.5, OFF_CODE, np.rint(scaled)).astype(np.int64)}


def from_setting(
    setting: tuple[float, ...], shape: tuple[int, ...], ranges: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the variable of one alpha per round; 2 switches a round off."""
    alpha = np.broadcast_to(np.asarray(setting, np.float64), shape)
    return from_strength(1.0 - alpha / MAX_ALPHA, ranges)


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns the kept fraction of pairs after each round, mean over the batch, `[L, H, R]`."""
    operations = workload.operations
    rounds = sum(name.endswith(".statistic") for name in operations)
    after = [operations[f"filter{index}.statistic"].count for index in range(1, rounds)]
    last = operations["pv.mac"].count / workload.head_dim
    pairs = operations["filter0.statistic"].count
    return jnp.stack([jnp.mean(count / pairs, axis=0) for count in (*after, last)], axis=-1)


def hard_round(scores: jax.Array, alive: jax.Array, code: jax.Array) -> jax.Array:
    """Returns which alive keys survive a round: `max - P <= floor(a (n max - sum) / (128 n))` over the n alive keys.

    Args:
      scores: Integer scores, int32 `[B, H, T, S]`; `S` times twice their magnitude must stay below 2^31.
      alive: Keys alive at the start of the round, bool `[B, H, T, S]`.
      code: Storage codes, int32 `[H]`.

    Returns:
      Survivors, bool `[B, H, T, S]`.
    """
    a = code.astype(jnp.int32)[None, :, None, None]
    top = jnp.max(jnp.where(alive, scores, -FAR), axis=-1, keepdims=True)
    below = top - scores
    number = jnp.sum(alive, axis=-1, keepdims=True, dtype=jnp.int32)
    total = jnp.sum(jnp.where(alive, below, 0), axis=-1, keepdims=True, dtype=jnp.int32)
    divisor = jnp.maximum(number, 1)
    quotient = jnp.floor_divide(total, divisor)
    rest = total - quotient * divisor
    slack = jnp.right_shift(a * quotient + jnp.floor_divide(a * rest, divisor), 7)
    return alive & ((below <= slack) | (a == OFF_CODE))


def soft_round(
    scores: jax.Array,
    weights: jax.Array,
    pairs: jax.Array,
    alpha: jax.Array,
    relaxation: Relaxation,
    spread: jax.Array,
) -> jax.Array:
    """Returns the gate of a round, differentiable in alpha and in the scores.

    `sigmoid((P - theta) / (temperature * unit))`, `theta = max - alpha (max - mean)`; the mean is weighted, the maximum
    runs over keys with w >= 0.5; only the unit is held constant: the spread of what is alive, at least half of `spread`.

    Of one key alive, or of several equal ones, the spread is 0, of few it may be that of one unit of scores that lie ten
    thousand apart; and scores of a first plane may be 0 but for one, while their derivatives are those of whole keys. A
    gate as narrow as that would drown all other derivatives.

    Args:
      scores: Scores, `[B, H, T, S]`.
      weights: Alive weights at the start of the round, `[B, H, T, S]`.
      pairs: 1 for pairs that exist, `[B, 1, T, S]`.
      alpha: Threshold parameter in (0, 2), `[H]`.
      relaxation: Temperature, in the unit above.
      spread: Standard deviation of the scores that all planes give, over all keys of a row, `[B, H, T, 1]`; where it is
        0 nothing tells keys apart, and no derivative is left.
    """
    alive = weights >= 0.5
    alive = jnp.where(jnp.any(alive, axis=-1, keepdims=True), alive, pairs > 0.5)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-6)
    mean = jnp.sum(weights * scores, axis=-1, keepdims=True) / total
    variance = jnp.sum(weights * jnp.square(scores - mean), axis=-1, keepdims=True) / total
    top = jnp.max(jnp.where(alive, scores, -jnp.inf), axis=-1, keepdims=True)
    # Finite in a row without any key too: infinity times a zero gradient would be NaN.
    top = jnp.where(jnp.any(alive, axis=-1, keepdims=True), top, 0.0)
    theta = top - alpha[None, :, None, None] * (top - mean)
    unit = jnp.maximum(jnp.sqrt(gates.detach(variance)), gates.detach(spread) / 2.0)
    unit = jnp.where(unit > gates.MIN_SPREAD, unit, FAR)
    return gates.soft_gate(scores, theta, temperature=relaxation.temperature * unit)


def plane_operand(
    code: jax.Array, bits: jax.Array, width: jax.Array, relaxation: Relaxation
) -> jax.Array:
    """Returns 8-bit codes whose magnitude keeps its top bits, differentiable in the code and in the bits.

    Derivatives: 1 to the code (true: 0); to the bits the difference of the two neighbouring widths.

    Args:
      code: Codes in [-127, 127], any shape.
      bits: Trained width, sign included, scalar.
      width: Deployed width, scalar.
      relaxation: Whether the forward value is the deployed one.
    """
    low_limit, high_limit = bits_range("key_bits")
    low = jnp.clip(jnp.floor(gates.detach(bits)), low_limit, high_limit - 1.0)

    def cut(to: jax.Array) -> jax.Array:
        step = gates.detach(power_of_two(CODE_BITS - to))
        whole = jnp.sign(code) * jnp.floor(jnp.abs(code) / step) * step
        return gates.straight_through(whole, code)

    fraction = bits - low
    mixed = (1.0 - fraction) * cut(low) + fraction * cut(low + 1.0)
    return gates.straight_through(cut(width), mixed) if relaxation.straight_through else mixed


def soft_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Filters in rounds of sigmoid gates; straight-through the forward decisions are those of `hard_filter`.

    Straight-through there are derivatives to thresholds and planes, none to queries and predicted keys.
    """
    del carry
    relaxation = context.relaxation
    dtype = operands.query.dtype
    alpha = MAX_ALPHA * jax.nn.sigmoid(context.knobs["threshold"])
    scaled = ALPHA_ONE * gates.detach(alpha)
    stored = jnp.where(scaled > 255.5, float(OFF_CODE), jnp.round(scaled))
    if relaxation.straight_through:
        alpha = gates.straight_through(jnp.minimum(stored, 255.0) / ALPHA_ONE, alpha)
    widths = {
        name: deployed_bits(gates.detach(context.widths[name]), *bits_range(name))
        for name in ("qk_bits", "key_bits")
    }
    query = leading_one_operand(top_code(operands.query, widths["qk_bits"]))
    key = top_code(jnp.swapaxes(plan.notes["key"], 2, 3), widths["qk_bits"])
    if relaxation.straight_through:
        # Deployed decisions hang on leading ones and few planes, which small steps of weights seldom change: derivatives
        # to them are noise that drowns those of the attention. Thresholds and planes learn here, weights from the rest.
        query, key = gates.detach(query), gates.detach(key)
    weights = jnp.broadcast_to(context.pairs, (*query.shape[:3], key.shape[3])).astype(dtype)
    all_weights = [weights]
    all_scores = [
        jnp.matmul(query, plane_operand(key, trained, width, relaxation))
        for trained, width in zip(context.knobs["key_bits"], widths["key_bits"], strict=True)
    ]
    whole = gates.detach(jnp.matmul(query, key))
    spread = row_spread(whole, context.pairs)
    for index, scores in enumerate(all_scores):
        # First planes leave so few values that hundreds of keys of a row lie on its threshold; their derivatives are taken
        # where the whole keys' scores lie.
        located = gates.straight_through(whole, scores) if relaxation.straight_through else scores
        gate = soft_round(located, weights, context.pairs, alpha[:, index], relaxation, spread)
        is_off = (stored[:, index] == OFF_CODE)[None, :, None, None]
        left = weights * jnp.where(is_off, 1.0, gate)
        if relaxation.straight_through:
            hard = hard_round(
                gates.detach(scores).astype(jnp.int32), weights > 0.5, stored[:, index]
            )
            left = gates.straight_through(hard, left)
        weights = left
        all_weights.append(weights)
    return _selection(context, operands, plan, all_weights, all_scores)


def hard_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Filters in integer rounds, as the chip does."""
    del carry
    dropped = (context.widths["qk_bits"] - CODE_BITS).astype(jnp.int32)
    query, key = (
        jnp.clip(jnp.right_shift(code.astype(jnp.int32), dropped), -CODE_LIMIT, CODE_LIMIT)
        for code in (operands.query, plan.notes["key"])
    )
    powers = leading_one(query)
    keep = jnp.broadcast_to(context.pairs > 0.5, (*query.shape[:3], key.shape[2]))
    all_weights, all_scores = [keep.astype(context.valid.dtype)], []
    for index in range(context.knobs["threshold"].shape[-1]):
        hidden = (CODE_BITS - context.widths["key_bits"][index]).astype(jnp.int32)
        size = jnp.left_shift(jnp.right_shift(jnp.abs(key), hidden), hidden)
        scores = exact_einsum("bhtd,bhsd->bhts", powers, jnp.sign(key) * size, CODE_BITS)
        keep = hard_round(scores, keep, context.knobs["threshold"][:, index])
        all_weights.append(keep.astype(context.valid.dtype))
        all_scores.append(scores)
    return _selection(context, operands, plan, all_weights, all_scores)


def _selection(
    context: Context,
    operands: Operands,
    plan: Plan,
    all_weights: list[jax.Array],
    all_scores: list[jax.Array],
) -> tuple[Selection, Counts]:
    """Returns the last round's selection and the counts of all rounds; `all_weights[r]` enter round r."""
    exists = context.valid[:, None, :]
    head_dim, shape = operands.query.shape[-1], operands.query.shape[:2]
    qk_bits, key_bits = context.widths["qk_bits"], context.widths["key_bits"]
    queries = jnp.broadcast_to(jnp.sum(exists, axis=-1), shape)
    counts = Counts(
        operations={"encode.encode": operation(queries * head_dim, qk_bits, QUERY_CODE_BITS)}
    )
    # The first plane has the sign besides.
    seen = [jnp.ones_like(key_bits[0]), *key_bits]
    for index in range(len(all_scores)):
        alive = jnp.sum(jnp.sum(all_weights[index], axis=-1) * exists, axis=-1)
        plane = seen[index + 1] - seen[index]
        name = f"filter{index}"
        counts += Counts(
            operations={
                f"{name}.shift_add": operation(alive * head_dim, plane, QUERY_CODE_BITS),
                f"{name}.statistic": operation(alive, CODE_BITS, CODE_BITS),
                f"{name}.compare": operation(alive, CODE_BITS, CODE_BITS),
            }
        )
    trace = {
        "predicted_key": plan.notes["key"],
        "scores": jnp.stack(all_scores),
        "keep": jnp.stack(all_weights[1:]) > 0.5,
    }
    selection = Selection(
        weights=all_weights[-1],
        fetched=wanted_keys(context, all_weights[-1]),
        fetched_bits=jnp.zeros((), context.valid.dtype),
        trace=trace if context.tracing else {},
    )
    return selection, counts


lapa = Mechanism(
    name="lapa",
    summary="keys predicted by shifts, filtered plane by plane, K and V on demand (arXiv 2512.07855)",
    knobs=knobs,
    thresholds=ThresholdScale(
        names=tuple(f"round {index}" for index in range(len(KEY_BITS))),
        in_order=True,
        from_strength=from_strength,
        to_strength=to_strength,
        from_setting=from_setting,
        settings=((2.0, 2.0, 2.0), (1.25, 1.1, 1.0), (1.0, 1.0, 1.0)),
        start_kept=(0.9, 0.75, 0.6),
        kept=kept_fractions,
        pairs_entry=-1,
    ),
    has_rounds=True,
    codes=codes,
    soft=on_demand(soft_plan, soft_filter),
    hard=on_demand(hard_plan, hard_filter),
    bypass=BYPASS,
)
