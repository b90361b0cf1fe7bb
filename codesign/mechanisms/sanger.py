"""Sanger: a mask from 4-bit attention probabilities, exact attention on what it leaves, rows packed and split.

Queries and keys are divided by their norms and quantised to 4 bits; scores of these, times the norms, give predicted
probabilities, and a pair stays if its own exceeds a threshold. The machine cuts the mask's rows into pieces of 64 keys,
drops empty ones and splits the others into segments of 16 pairs, one for each row of its array.

Differs from the specification: the soft gate compares logarithms, `sigmoid((ln P - ln tau) / width)`, because
probabilities of a row span decades and one width cannot serve them; on the chip norms are in units of 2^(b - 8) codes;
threshold 0 keeps all, whatever the exponential of a far key is.

References:
  Lu et al., "Sanger: A Co-Design Framework for Enabling Sparse Attention using Reconfigurable Architecture", MICRO 2021,
  and its repository (hatsu3/Sanger), in which no gradient reaches threshold or mask. Reconstructed: the largest key of a
  row always stays (there an empty row attends evenly).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

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
)
from codesign.mechanisms.threshold_scale import ThresholdScale
from codesign.policy import bits_range
from codesign.quantize import deployed_bits, exact_einsum, multiplier, power_of_two
from codesign.tables import EXP_FRACTION_BITS, exp_table, quotient, table_exponentials
from codesign.workload import (
    Workload,
    binary_fetched_vectors,
    fetched_vectors,
    operation,
    piece_statistics,
    row_statistics,
    stream,
)

LOW_LIMIT, LOW_BITS = 7, 4
"""Largest code and width of a predicting operand (Sanger)."""
NORM_BITS = 8
"""Bits of a norm below the place of the largest code: norms are in units of 2^(b - 8) codes (ours)."""
RANGE_ONE = 2**15
"""Ranges of directions are stored in 1/32768."""
PROBABILITY_BITS = 16
"""Fraction bits of the threshold."""
START_PROBABILITY = 2e-3
"""Threshold of a new policy (Sanger: SQuAD, CLOTH, GPT-2)."""
OFF_PROBABILITY = 2.0 ** -(PROBABILITY_BITS + 1)
"""Thresholds up to here are stored as 0, which keeps all."""
MAX_EXPONENT = PROBABILITY_BITS + 2
"""What the threshold spans, in octaves below 1, off included."""
PIECE = 64
"""Keys of a piece of a row of the mask (Sanger)."""
RANGES = ("sanger_query", "sanger_key")
"""Calibrated ranges: largest element of a query's and of a key's direction."""


def knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns start values: `threshold` v = ln tau, `[L, H, 1]`."""
    return {"threshold": jnp.full((num_layers, num_heads, 1), float(np.log(START_PROBABILITY)))}


def codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns what the chip stores, int64.

    `threshold` `[L, H, 1]` in 1/65536, 0 keeps all; `query_range`, `key_range` `[L]` in 1/32768; `mask_mantissa` and
    `mask_shift` `[L]`, from a distance of predicted scores to 4096ths of an octave.
    """
    probability = np.exp(np.minimum(knobs["threshold"], 0.0))
    stored = np.rint(probability * 2.0**PROBABILITY_BITS)
    ranges = [
        np.clip(np.rint(tensors[name] * RANGE_ONE), 1, RANGE_ONE).astype(np.int64)
        for name in RANGES
    ]
    norm = 2.0 ** (knobs["qk_bits"] - NORM_BITS)
    unit = tensors["logit"] * norm**2 * ranges[0] * ranges[1] / (LOW_LIMIT * RANGE_ONE) ** 2
    mantissa, shift = multiplier(unit * np.log2(np.e) * 2.0**EXP_FRACTION_BITS)
    return {
        "threshold": np.where(probability <= OFF_PROBABILITY, 0, stored).astype(np.int64),
        "query_range": ranges[0],
        "key_range": ranges[1],
        "mask_mantissa": mantissa,
        "mask_shift": shift,
    }


def from_strength(strength: np.ndarray, ranges: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns v = ln tau, tau = 2^(18 (strength - 1)): 1 keeps the largest key alone, 0 all."""
    del ranges
    octaves = MAX_EXPONENT * (np.asarray(strength, np.float64) - 1.0)
    variable: np.ndarray = octaves * np.log(2.0)
    return variable


def to_strength(threshold: np.ndarray, ranges: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the inverse of `from_strength`, within [0, 1]."""
    del ranges
    octaves = np.asarray(threshold, np.float64) / np.log(2.0)
    strength: np.ndarray = np.clip(1.0 + octaves / MAX_EXPONENT, 0.0, 1.0)
    return strength


def from_setting(
    setting: tuple[float, ...], shape: tuple[int, ...], ranges: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the variables of one threshold; 0 keeps all."""
    del ranges
    tau = np.broadcast_to(np.asarray(setting, np.float64), shape)
    return np.log(np.maximum(tau, 2.0**-MAX_EXPONENT))


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns the kept fraction of pairs, mean over the batch, `[L, H, 1]`."""
    operations = workload.operations
    fraction = operations["softmax.exp"].count / operations["filter0.exp"].count
    return jnp.mean(fraction, axis=0)[..., None]


def _norms(code: jax.Array) -> jax.Array:
    """Returns the norms of rows of codes, `[B, H, T, 1]`, at least 1."""
    squares = jnp.sum(jnp.square(code), axis=-1, keepdims=True)
    return jnp.sqrt(jnp.maximum(squares, 1.0))


def soft_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps pairs by gates on predicted log-probabilities; straight-through the forward decisions are the deployed ones.

    Exponentials are floating point here and a table there: a pair whose probability lies within 1/4096 of an octave of the
    threshold may be decided otherwise. Straight-through, derivatives go to the threshold alone.
    """
    del plan, carry
    relaxation = context.relaxation
    bits = deployed_bits(gates.detach(context.widths["qk_bits"]), *bits_range("qk_bits"))
    norm_unit = power_of_two(bits - NORM_BITS)
    counts, predicted = Counts(), []
    scale = operands.logit_scale * jnp.square(norm_unit)
    for name, code, exists in (
        (RANGES[0], operands.query, context.valid),
        (RANGES[1], operands.key, context.valid),
    ):
        if relaxation.straight_through:
            code = gates.detach(code)
        norm = _norms(code)
        direction = code / norm
        largest = jnp.max(jnp.abs(direction) * exists[:, None, :, None])
        range_, measured = context.calibrated(name, largest)
        counts += measured
        stored = jnp.clip(jnp.round(gates.detach(range_) * RANGE_ONE), 1, RANGE_ONE) / RANGE_ONE
        ratio = direction * (LOW_LIMIT / stored)
        low = gates.straight_through(jnp.clip(jnp.round(ratio), -LOW_LIMIT, LOW_LIMIT), ratio)
        whole = gates.straight_through(jnp.round(norm / norm_unit), norm / norm_unit)
        predicted.append((low, whole))
        scale = scale * stored / LOW_LIMIT
    (query, query_norm), (key, key_norm) = predicted
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key)
    logits = scores * query_norm * jnp.swapaxes(key_norm, 2, 3) * gates.detach(scale)
    exists = jnp.broadcast_to(context.pairs > 0.5, logits.shape)
    top = gates.detach(jnp.max(jnp.where(exists, logits, -jnp.inf), axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    total = jnp.sum(jnp.where(exists, jnp.exp(logits - top), 0.0), axis=-1, keepdims=True)
    log_probability = logits - top - jnp.log(jnp.maximum(total, 1e-30))
    log_tau = jnp.minimum(context.knobs["threshold"][:, 0], 0.0)
    one = 2.0**PROBABILITY_BITS
    tau = jnp.exp(gates.detach(log_tau))
    is_off = (tau <= OFF_PROBABILITY)[None, :, None, None]
    stored_tau = jnp.maximum(jnp.round(tau * one), 1.0) / one
    if relaxation.straight_through:
        log_tau = gates.straight_through(jnp.log(stored_tau), log_tau)
    width = relaxation.temperature * gates.gate_width(
        row_spread(gates.detach(logits), context.pairs)
    )
    gate = jax.nn.sigmoid((log_probability - log_tau[None, :, None, None]) / width)
    weights = jnp.broadcast_to(context.pairs, logits.shape) * jnp.where(is_off, 1.0, gate)
    first = _first_largest(logits, exists)
    if relaxation.straight_through:
        above = log_probability > log_tau[None, :, None, None]
        hard = exists & (above | is_off | first)
        weights, fetched = binary_fetched_vectors(
            gates.straight_through(hard, weights), context.valid[:, None]
        )
    else:
        weights = jnp.where(first, 1.0, weights)
        fetched = fetched_vectors(weights, context.valid[:, None])
    selection, added = _selection(context, operands, weights, fetched)
    return selection, counts + added


def hard_filter(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps pairs as the chip does."""
    del plan, carry
    arrays = context.knobs
    low, norms = [], []
    for code, name in ((operands.query, "query_range"), (operands.key, "key_range")):
        wide = code.astype(jnp.float64)
        norm = _norms(wide)
        divisor = norm * arrays[name].astype(jnp.float64)
        whole = jnp.round(quotient(wide * float(LOW_LIMIT * RANGE_ONE), divisor))
        low.append(jnp.clip(whole, -LOW_LIMIT, LOW_LIMIT).astype(jnp.int32))
        unit = power_of_two((NORM_BITS - arrays["qk_bits"]).astype(jnp.float64))
        norms.append(jnp.round(norm * unit))
    products = exact_einsum("bhtd,bhsd->bhts", low[0], low[1], LOW_BITS)
    scores = products.astype(jnp.float64) * (norms[0] * jnp.swapaxes(norms[1], 2, 3))
    exists = jnp.broadcast_to(context.pairs > 0.5, scores.shape)
    top = jnp.max(jnp.where(exists, scores, -jnp.inf), axis=-1, keepdims=True)
    powers = table_exponentials(
        jnp.where(exists, top - scores, 0.0),
        arrays["mask_mantissa"],
        arrays["mask_shift"],
        jnp.asarray(exp_table()),
    )
    masses = jnp.where(exists, powers, 0).astype(jnp.int64)
    tau = arrays["threshold"][:, 0].astype(jnp.int64)[None, :, None, None]
    total = jnp.sum(masses, axis=-1, keepdims=True)
    above = (masses << PROBABILITY_BITS) > tau * total
    keep = exists & (above | (tau == 0) | _first_largest(scores, exists))
    weights = keep.astype(context.valid.dtype)
    fetched = fetched_vectors(weights, context.valid[:, None], is_binary=True)
    return _selection(context, operands, weights, fetched, scores)


def _first_largest(scores: jax.Array, exists: jax.Array) -> jax.Array:
    """Returns whether a pair is the first of its row's largest that exist, bool `[B, H, T, S]`."""
    largest = jnp.argmax(jnp.where(exists, scores, -jnp.inf), axis=-1, keepdims=True)
    return (jnp.arange(scores.shape[-1])[None, None, None] == largest) & exists


def _selection(
    context: Context,
    operands: Operands,
    weights: jax.Array,
    fetched: jax.Array,
    scores: jax.Array | None = None,
) -> tuple[Selection, Counts]:
    """Returns the kept keys, `fetched` of whose vectors are read, and what predicting them took."""
    batch_heads, head_dim = operands.query.shape[:2], operands.query.shape[-1]
    num_keys = operands.key.shape[2]
    exists = context.valid[:, None, :]
    row_pairs = jnp.broadcast_to(
        jnp.sum(context.pairs, axis=-1) * exists, (*batch_heads, weights.shape[2])
    )
    pairs = jnp.sum(row_pairs, axis=-1)
    resident = jnp.sum(context.valid, axis=-1) * head_dim * LOW_BITS
    low = float(LOW_BITS)
    counts = Counts(
        operations={
            "filter0.mac": operation(pairs * head_dim, low, low),
            "filter0.exp": operation(pairs, low, low),
            "threshold.compare": operation(pairs, float(PROBABILITY_BITS), 1.0),
        },
        rows={"filter0": row_statistics(row_pairs, exists, num_keys)},
        streams={
            "key0": stream(
                fetched_whole(context, batch_heads[1]),
                low,
                head_dim,
                buffer="key",
                resident_bits=resident,
            )
        },
    )
    trace = {"keep": (weights > 0.5)[None]}
    if scores is not None:
        trace["scores"] = scores
    selection = Selection(
        weights=weights,
        fetched=fetched,
        fetched_bits=jnp.zeros((), context.valid.dtype),
        trace=trace if context.tracing else {},
    )
    return selection, counts


def execution(
    context: Context,
    operands: Operands,
    selection: Selection,
    plan: Plan,
    value_weights: jax.Array,
) -> Counts:
    """Counts exact attention on the kept pairs, whose rows the machine takes in pieces of 64 keys."""
    counts = exact_execution(context, operands, selection, plan, value_weights)
    pieces = piece_statistics(selection.weights * context.valid[:, None, :, None], PIECE)
    result: Counts = counts.replace(rows=counts.rows | {"packed": pieces})  # type: ignore[attr-defined]
    return result


sanger = Mechanism(
    name="sanger",
    summary="a mask from 4-bit attention probabilities, rows packed and split (Sanger, MICRO 2021)",
    knobs=knobs,
    thresholds=ThresholdScale(
        names=("probability",),
        in_order=True,
        from_strength=from_strength,
        to_strength=to_strength,
        from_setting=from_setting,
        settings=((0.0,), (2e-3,), (2e-2,)),
        start_kept=(0.6,),
        kept=kept_fractions,
        pairs_entry=-1,
    ),
    has_rounds=True,
    codes=codes,
    own_ranges=RANGES,
    soft=Hooks(filter=soft_filter, execution=execution, head_knobs=("threshold",)),
    hard=Hooks(filter=hard_filter, execution=execution, head_knobs=("threshold",)),
    bypass=Hooks(execution=execution),
)
