"""What a mechanism is: pure functions plugged into named hooks of one transformer block.

A `Mechanism` carries two sets of `Hooks`, `soft` (differentiable; relaxed or straight-through, as the `Relaxation` says)
and `hard` (integers and comparisons). Both sets have the same signatures and the identity as default, so a mechanism
states only the hooks it uses. Hooks see *codes*: integer-valued arrays on the hard and straight-through paths. Each
hook returns its counts.

Order of the calls in a block:

    plan -> [Q, K, V made] -> filter -> [scores, softmax] -> on_probabilities -> execution -> carry
         -> [output projection] -> on_output("attention") -> [FFN] -> on_output("ffn")

and `on_activation(site)` before every dense product.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from codesign.gates import Relaxation
from codesign.workload import (
    Operation,
    RowStatistics,
    Stream,
    fetched_vectors,
    operation,
    row_statistics,
    stream,
)


@struct.dataclass
class Counts:
    """What a hook added to the workload: see `codesign.workload` for the three vocabularies."""

    operations: dict[str, Operation] = struct.field(default_factory=dict)
    rows: dict[str, RowStatistics] = struct.field(default_factory=dict)
    streams: dict[str, Stream] = struct.field(default_factory=dict)

    def __add__(self, other: "Counts") -> "Counts":
        """Returns both sets of counts; a key counted twice is our own mistake."""
        assert not self.operations.keys() & other.operations.keys()
        return Counts(
            operations=self.operations | other.operations,
            rows=self.rows | other.rows,
            streams=self.streams | other.streams,
        )


@struct.dataclass
class Context:
    """What every hook may look at, for one layer.

    Attributes:
      knobs: This layer's knobs: trainable variables on the soft path, storage integers on the hard path.
      widths: Deployed widths in bit by knob name, scalars or `[R]`; on the soft path they carry the bits' gradient.
      ranges: The mechanism's calibrated ranges and shifts for this layer.
      relaxation: Temperature and path of the soft hooks; ignored by hard hooks.
      valid: 1 for tokens that exist, `[B, T]`.
      pairs: 1 for query-key pairs that exist (padding and causality), `[B, 1, T, S]`.
      tracing: Whether hooks return their decisions for the simulator and the emulator.
    """

    knobs: dict[str, jax.Array]
    widths: dict[str, jax.Array]
    ranges: dict[str, jax.Array]
    relaxation: Relaxation
    valid: jax.Array
    pairs: jax.Array
    tracing: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Operands:
    """Codes of one layer's attention: `query`, `key`, `value` `[B, H, T, d]`.

    A logit is `query . key * logit_scale`; a value is `value * value_scale`.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    logit_scale: jax.Array
    value_scale: jax.Array


@struct.dataclass
class Plan:
    """What `plan` decided before Q, K and V exist; None means all, or no re-use.

    Attributes:
      queries: Weight of each query row that is computed, `[B, H, T]`.
      keys: Weight of each key row that is generated, `[B, H, S]`.
      keep: Predicted keep weights, `[B, H, T, S]`.
      attention_source: Row re-use: weights of the rows whose output a row takes, `[B, H, T, T]`.
      ffn_source: The same for the feed-forward network, `[B, T, T]`.
    """

    queries: jax.Array | None = None
    keys: jax.Array | None = None
    keep: jax.Array | None = None
    attention_source: jax.Array | None = None
    ffn_source: jax.Array | None = None


@struct.dataclass
class Selection:
    """The keys attention runs on.

    Attributes:
      weights: Keep weights, `[B, H, T, S]`; 0 or 1 on the hard and straight-through paths.
      fetched: Key vectors still to be fetched by query block, `[B, H, G]`.
      fetched_bits: Key bits already on chip, scalar in bit.
      trace: `scores` and `keep` of every round, `[R, B, H, T, S]`, if the context traces.
    """

    weights: jax.Array
    fetched: jax.Array
    fetched_bits: jax.Array
    trace: dict[str, jax.Array]


Carry: TypeAlias = Any
StartFn: TypeAlias = Callable[[int, int, int], Carry]
PlanFn: TypeAlias = Callable[
    [Context, jax.Array, Mapping[str, jax.Array], Carry], tuple[Plan, Counts]
]
FilterFn: TypeAlias = Callable[[Context, Operands, Plan, Carry], tuple[Selection, Counts]]
ProbabilitiesFn: TypeAlias = Callable[
    [Context, jax.Array, Selection], tuple[jax.Array, jax.Array, Counts]
]
ActivationFn: TypeAlias = Callable[[Context, jax.Array, str], tuple[jax.Array, Counts]]
ExecutionFn: TypeAlias = Callable[[Context, Operands, Selection, Plan, jax.Array], Counts]
OutputFn: TypeAlias = Callable[[Context, jax.Array, Plan, str], tuple[jax.Array, Counts]]
CarryFn: TypeAlias = Callable[[Context, Carry, jax.Array, jax.Array], Carry]


def no_carry(batch: int, num_heads: int, num_tokens: int) -> Carry:
    """Returns an empty carry: the mechanism remembers nothing from layer to layer."""
    del batch, num_heads, num_tokens
    return ()


def plan_all(
    context: Context, x: jax.Array, weights: Mapping[str, jax.Array], carry: Carry
) -> tuple[Plan, Counts]:
    """Plans that every row is computed."""
    del context, x, weights, carry
    return Plan(), Counts()


def keep_all(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps every pair that exists; each head's keys are fetched whole for every query block."""
    del carry
    query = operands.query
    weights = jnp.broadcast_to(context.pairs, (*query.shape[:3], operands.key.shape[2]))
    if plan.keep is not None:
        weights = weights * plan.keep
    selection = Selection(
        weights=weights,
        fetched=fetched_whole(context, query.shape[1]),
        fetched_bits=jnp.zeros((), context.valid.dtype),
        trace={},
    )
    return selection, Counts()


def keep_probabilities(
    context: Context, probabilities: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array, Counts]:
    """Leaves probabilities `[B, H, T, S]` as they are; the value of every kept pair is used."""
    del context
    return probabilities, selection.weights, Counts()


def keep_activation(context: Context, x: jax.Array, site: str) -> tuple[jax.Array, Counts]:
    """Leaves the activation entering `site` as it is."""
    del context, site
    return x, Counts()


def keep_output(
    context: Context, y: jax.Array, plan: Plan, branch: str
) -> tuple[jax.Array, Counts]:
    """Leaves a branch's output `[B, T, D]` as it is."""
    del context, plan, branch
    return y, Counts()


def keep_carry(
    context: Context, carry: Carry, probabilities: jax.Array, attended: jax.Array
) -> Carry:
    """Leaves the carry as it is."""
    del context, probabilities, attended
    return carry


def fetched_whole(context: Context, num_heads: int) -> jax.Array:
    """Returns the vectors fetched when every query block reads all existing keys, `[B, H, G]`."""
    vectors = fetched_vectors(context.pairs * context.valid[:, None, :, None])
    return jnp.broadcast_to(vectors, (vectors.shape[0], num_heads, vectors.shape[2]))


def exact_execution(
    context: Context,
    operands: Operands,
    selection: Selection,
    plan: Plan,
    value_weights: jax.Array,
) -> Counts:
    """Counts exact attention over the kept pairs: scores, softmax, values, and the vectors they read.

    Args:
      context: The layer's context.
      operands: Codes of Q, K, V.
      selection: The kept pairs.
      plan: What is computed at all.
      value_weights: Pairs whose value is used, `[B, H, T, S]`; the kept pairs unless probabilities are pruned too.

    References:
      Energon (arXiv 2110.09310), attention unit; counts of its specification, section 4.
    """
    del plan
    query = operands.query
    head_dim, num_keys = query.shape[-1], operands.key.shape[2]
    qk_bits, v_bits = context.widths["qk_bits"], context.widths["v_bits"]
    output_bits = context.widths["out.activation_bits"]
    exists = context.valid[:, None, :]
    keys_per_row = jnp.sum(selection.weights, axis=-1) * exists
    kept = jnp.sum(keys_per_row, axis=-1)
    used = jnp.sum(jnp.sum(value_weights, axis=-1) * exists, axis=-1)
    queries = jnp.broadcast_to(jnp.sum(exists, axis=-1), kept.shape)
    keys = jnp.sum(context.valid, axis=-1)
    return Counts(
        operations={
            "qk.mac": operation(kept * head_dim, qk_bits, qk_bits),
            "softmax.exp": operation(kept, qk_bits, qk_bits),
            "softmax.reciprocal": operation(queries, qk_bits, qk_bits),
            "pv.mac": operation(used * head_dim, qk_bits, v_bits),
            "output.multiply": operation(queries * head_dim, qk_bits, v_bits),
        },
        rows={"attention": row_statistics(keys_per_row, exists, num_keys)},
        streams={
            "query": stream(queries[..., None], qk_bits, head_dim),
            "output": stream(queries[..., None], output_bits, head_dim),
            "key_rest": stream(
                selection.fetched,
                qk_bits - selection.fetched_bits,
                head_dim,
                buffer="key",
                resident_bits=keys * head_dim * qk_bits,
            ),
            "value": stream(
                selection.fetched,
                v_bits,
                head_dim,
                buffer="value",
                resident_bits=keys * head_dim * v_bits,
            ),
        },
    )


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """One path's hooks; each default is the identity, or exact attention over what is kept."""

    start: StartFn = no_carry
    plan: PlanFn = plan_all
    filter: FilterFn = keep_all
    on_probabilities: ProbabilitiesFn = keep_probabilities
    on_activation: ActivationFn = keep_activation
    execution: ExecutionFn = exact_execution
    on_output: OutputFn = keep_output
    carry: CarryFn = keep_carry


def no_knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns no knobs: nothing to train beyond the bits every policy has."""
    del num_layers, num_heads
    return {}


def no_codes(knobs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns no storage codes."""
    del knobs
    return {}


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """A way to skip or cheapen work.

    Attributes:
      name: The registry's name.
      summary: One line for `codesign list`.
      knobs: Start values of the mechanism's own knobs, each with a leading axis L.
      codes: Trained knobs to the integers the chip stores.
      soft: Differentiable hooks.
      hard: Integer hooks.
    """

    name: str
    summary: str
    knobs: Callable[[int, int], dict[str, jax.Array]] = no_knobs
    codes: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = no_codes
    soft: Hooks = field(default_factory=Hooks)
    hard: Hooks = field(default_factory=Hooks)
