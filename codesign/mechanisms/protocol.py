"""What a mechanism is: pure functions plugged into named hooks of one transformer block.

A `Mechanism` carries two sets of `Hooks`, `soft` (differentiable; relaxed or straight-through, as the
`Relaxation` says) and `hard` (integers and comparisons). Both sets have the same signatures and the
identity as default, so a mechanism states only the hooks it uses. Each hook returns its counts.

Attention operands and scores are *codes* on every path: whole numbers on the hard path (int32; scores
and branches before they are added float64, which holds them exactly) and on the straight-through path.
Other tensors are codes on the hard path and values on the soft one, where `Context.scales` has the
value of a code.

Order of the calls in a block, with the site of each tensor (docs/mechanisms.md):

    on_activation qkv -> plan -> on_activation query, key, value -> filter -> on_activation scores
    -> on_probabilities -> execution -> on_output attention -> carry -> on_activation out
    -> on_output attention_branch -> on_activation up, gelu, down -> on_output ffn_branch
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from codesign import gates
from codesign.gates import Relaxation
from codesign.mechanisms.threshold_scale import ThresholdScale
from codesign.tile_statistics import TileStatistics
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
    """What a hook added to the workload: see `codesign.workload` for the vocabularies.

    `densities` are fractions of elements that are not zero, `[B]` by site; `tiles` say how products without a zero lie,
    `[B, H]` by product; `observed` are maxima that the mechanism wants calibrated (`Context.calibrated`), by own names.
    """

    operations: dict[str, Operation] = struct.field(default_factory=dict)
    rows: dict[str, RowStatistics] = struct.field(default_factory=dict)
    streams: dict[str, Stream] = struct.field(default_factory=dict)
    densities: dict[str, jax.Array] = struct.field(default_factory=dict)
    tiles: dict[str, TileStatistics] = struct.field(default_factory=dict)
    observed: dict[str, jax.Array] = struct.field(default_factory=dict)

    def __add__(self, other: "Counts") -> "Counts":
        """Returns both sets of counts; a key counted twice is our own mistake."""
        mine, theirs = vars(self), vars(other)
        assert not any(mine[name].keys() & theirs[name].keys() for name in mine)
        return Counts(**{name: mine[name] | theirs[name] for name in mine})


@struct.dataclass
class Context:
    """What every hook may look at, for one layer.

    Attributes:
      knobs: This layer's knobs: trainable variables on the soft path, storage integers on the hard path.
      widths: Deployed widths in bit by knob name, scalars or `[R]`; on the soft path they carry the bits' gradient.
      ranges: Calibrated ranges of this layer; empty on the hard path, which stores integers made from them.
      relaxation: Temperature and path of the soft hooks; ignored by hard hooks.
      valid: 1 for tokens that exist and are not pruned, `[B, T]`.
      pairs: 1 for query-key pairs that exist (padding, causality, pruning), `[B, 1, T, S]`.
      scales: Real value of one code by tensor, scalars, for soft hooks that see values; empty on the hard path.
      tracing: Whether hooks return their decisions for the simulator and the emulator.
      calibrating: Whether this run measures the mechanism's own ranges.
      is_uniform: Whether all queries of an example may attend to the same keys: no causal or other mask but padding.
      width: Width of the residual stream, D; 0 where the model is not one of `codesign.models`.
    """

    knobs: dict[str, jax.Array]
    widths: dict[str, jax.Array]
    ranges: dict[str, jax.Array]
    relaxation: Relaxation
    valid: jax.Array
    pairs: jax.Array
    scales: dict[str, jax.Array] = struct.field(default_factory=dict)
    tracing: bool = struct.field(pytree_node=False, default=False)
    calibrating: bool = struct.field(pytree_node=False, default=False)
    is_uniform: bool = struct.field(pytree_node=False, default=False)
    width: int = struct.field(pytree_node=False, default=0)

    def calibrated(self, name: str, measured: jax.Array) -> tuple[jax.Array, Counts]:
        """Returns a range of the soft path: the stored one, or `measured` while calibrating.

        Raises:
          KeyError: If the range was not calibrated.
        """
        if not self.calibrating:
            return self.ranges[name], Counts()
        constant = gates.detach(measured)
        return constant, Counts(observed={name: constant})


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


class Numbers(Protocol):
    """What a path's arithmetic lends to `plan`: the product that makes Q, K and V, seen before it runs."""

    def codes(self, x: jax.Array, site: str) -> jax.Array:
        """Returns the activation that enters `site` as codes of its deployed width, shape of `x`."""

    def weight_codes(self, site: str) -> jax.Array:
        """Returns the weight of `site` as codes, `[inputs, outputs]`."""

    def estimate(self, accumulator: jax.Array, part: str) -> jax.Array:
        """Returns the codes that an estimate of a part of the product's accumulator becomes, `[B, H, T, d]`.

        Args:
          accumulator: Estimate of codes times the weight codes of that part (`part_columns`), `[B, T, H*d]`; bias and
            requantisation are those of the real product.
          part: `query`, `key` or `value`.
        """


OPERANDS = ("query", "key", "value")
"""Parts of the product `qkv`, in the order of its columns."""


def part_columns(product: jax.Array, part: str) -> jax.Array:
    """Returns the columns `[..., H*d]` of `query`, `key` or `value` among those of `qkv`, `[..., 3*H*d]`."""
    columns: jax.Array = jnp.split(product, len(OPERANDS), axis=-1)[OPERANDS.index(part)]
    return columns


NARROW_BITS = 4
"""Most bits of activations in rows of a feed-forward network that are planned to be narrow (FACT, ISCA 2023)."""


@struct.dataclass
class Plan:
    """What `plan` decided before Q, K and V exist; None means all, or no re-use.

    All are weights, 0 or 1 but on the relaxed path.

    Attributes:
      tokens: Tokens that live on, `[B, T]`; the others are gone from here on, pooling included.
      heads: Heads whose output counts, `[B, H]`.
      queries: Query rows that are computed, `[B, H, T]`.
      keys: Key and value rows that are generated, `[B, H, S]`.
      keep: Predicted pairs, `[B, H, T, S]`.
      attention_source: Row re-use: the rows of its window of w whose output a row takes, `[B, H, T, w]`.
      ffn_source: The same for the feed-forward network, `[B, T, w]`; rows that take their own are computed.
      ffn_full: Rows of that network whose activations have all their bits, `[B, T]`; the others have `NARROW_BITS` at
        most, and two of their products take the place of one.
      notes: What the mechanism's later hooks want to know.
    """

    tokens: jax.Array | None = None
    heads: jax.Array | None = None
    queries: jax.Array | None = None
    keys: jax.Array | None = None
    keep: jax.Array | None = None
    attention_source: jax.Array | None = None
    ffn_source: jax.Array | None = None
    ffn_full: jax.Array | None = None
    notes: dict[str, jax.Array] = struct.field(default_factory=dict)


@struct.dataclass
class Selection:
    """The keys attention runs on.

    Attributes:
      weights: Keep weights, `[B, H, T, S]`; 0 or 1 on the hard and straight-through paths.
      fetched: Key vectors still to be fetched by query block, `[B, H, G]`.
      fetched_bits: Key bits already on chip, scalar in bit.
      trace: `scores` and `keep` of every round, `[R, B, H, T, S]`, if the context traces.
      keys: Key and value rows generated on demand, `[B, H, S]`; None: those of the plan.
      scores: Scores that the softmax takes, `[B, H, T, S]`; None: query times key.
      notes: What `execution` wants to know, `[B, H, ...]`.
    """

    weights: jax.Array
    fetched: jax.Array
    fetched_bits: jax.Array
    trace: dict[str, jax.Array]
    keys: jax.Array | None = None
    scores: jax.Array | None = None
    notes: dict[str, jax.Array] = struct.field(default_factory=dict)


Carry: TypeAlias = Any
StartFn: TypeAlias = Callable[[int, int, int], Carry]
PlanFn: TypeAlias = Callable[[Context, jax.Array, Numbers, Carry], tuple[Plan, Counts]]
FilterFn: TypeAlias = Callable[[Context, Operands, Plan, Carry], tuple[Selection, Counts]]
ProbabilitiesFn: TypeAlias = Callable[
    [Context, jax.Array, Selection], tuple[jax.Array, jax.Array, Counts]
]
TensorFn: TypeAlias = Callable[[Context, jax.Array, Plan, str], tuple[jax.Array, Counts]]
WeightFn: TypeAlias = Callable[
    [Mapping[str, jax.Array], jax.Array, str, Relaxation], tuple[jax.Array, jax.Array]
]
ProductFn: TypeAlias = Callable[[Context, jax.Array, jax.Array, str], Counts]
ExecutionFn: TypeAlias = Callable[[Context, Operands, Selection, Plan, jax.Array], Counts]
CarryFn: TypeAlias = Callable[[Context, Carry, Plan, jax.Array, jax.Array], Carry]


def no_carry(batch: int, num_heads: int, num_tokens: int) -> Carry:
    """Returns an empty carry: the mechanism remembers nothing from layer to layer."""
    del batch, num_heads, num_tokens
    return ()


def plan_all(context: Context, x: jax.Array, numbers: Numbers, carry: Carry) -> tuple[Plan, Counts]:
    """Plans that every row is computed; `x` is the activation that enters `qkv`, `[B, T, D]`."""
    del context, x, numbers, carry
    return Plan(), Counts()


def keep_all(
    context: Context, operands: Operands, plan: Plan, carry: Carry
) -> tuple[Selection, Counts]:
    """Keeps every pair that exists and that the plan keeps, for the rows that are computed."""
    del carry
    query = operands.query
    weights = jnp.broadcast_to(context.pairs, (*query.shape[:3], operands.key.shape[2]))
    fetched = fetched_whole(context, query.shape[1])
    if plan.keep is not None:
        weights = weights * plan.keep
    if plan.keep is not None or plan.queries is not None:
        fetched = fetched_vectors(weights * computed_rows(context, plan)[..., None])
    selection = Selection(
        weights=weights,
        fetched=fetched,
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


def keep_activation(
    context: Context, x: jax.Array, plan: Plan, site: str
) -> tuple[jax.Array, Counts]:
    """Leaves the activation entering `site` as it is; at `qkv` there is no plan yet."""
    del context, plan, site
    return x, Counts()


def keep_weight(
    knobs: Mapping[str, jax.Array], kernel: jax.Array, site: str, relaxation: Relaxation
) -> tuple[jax.Array, jax.Array]:
    """Leaves a weight as it is; the second value is the density that its gradient goes to, scalar."""
    del knobs, site, relaxation
    return kernel, jnp.ones((), kernel.dtype)


def no_product(context: Context, left: jax.Array, right: jax.Array, site: str) -> Counts:
    """Counts nothing of a product: `left` `[B, H, n, k]`, `right` `[B or 1, H, k, m]`, H 1 where heads do not matter.

    Sites are the linear ones (`qkv` with the heads of Q, K and V side by side), whose `right` are codes of the weight, and
    `qk`, `pv`.
    """
    del context, left, right, site
    return Counts()


def reuse_rows(context: Context, y: jax.Array, plan: Plan, site: str) -> tuple[jax.Array, Counts]:
    """Replaces rows by those the plan re-uses, and clears the heads it drops.

    Args:
      context: The layer's context.
      y: What leaves: `attention` (heads side by side, before the output projection, `[B, T, H*d]`),
        `attention_branch` or `ffn_branch` (`[B, T, D]`, in the scale of the residual stream).
      plan: `attention_source` and `heads` apply to `attention`, `ffn_source` to `ffn_branch`.
      site: Which of the three.
    """
    del context
    result = y
    if site == "attention":
        if plan.attention_source is not None:
            result = _mixed_rows(plan.attention_source, result)
        if plan.heads is not None:
            split = jnp.reshape(result, (*y.shape[:2], plan.heads.shape[1], -1))
            kept = split.astype(plan.heads.dtype) * plan.heads[:, None, :, None]
            result = jnp.reshape(kept, y.shape).astype(y.dtype)
    elif site == "ffn_branch" and plan.ffn_source is not None:
        result = _mixed_rows(plan.ffn_source[:, None], result)
    return result, Counts()


def _mixed_rows(weights: jax.Array, y: jax.Array) -> jax.Array:
    """Returns rows `[B, T, H*d]` mixed inside windows of w by `[B, H, T, w]`, in the dtype of the rows."""
    batch, heads, tokens, window = weights.shape
    missing = -tokens % window
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, missing), (0, 0)))
    rows = jnp.pad(y, ((0, 0), (0, missing), (0, 0))).astype(weights.dtype)
    weights = jnp.reshape(weights, (batch, heads, -1, window, window))
    rows = jnp.reshape(rows, (batch, -1, window, heads, y.shape[-1] // heads))
    mixed = jnp.einsum("bhntu,bnuhd->bnthd", weights, rows)
    return jnp.reshape(mixed, (batch, tokens + missing, -1))[:, :tokens].astype(y.dtype)


def own_weights(sources: jax.Array) -> jax.Array:
    """Returns how much rows take of themselves, `[..., T]`, from weights on the rows of their window `[..., T, w]`."""
    rows, window = sources.shape[-2:]
    is_own = np.arange(rows)[:, None] % window == np.arange(window)[None, :]
    return jnp.sum(jnp.where(np.broadcast_to(is_own, sources.shape), sources, 0), axis=-1)


def keep_carry(
    context: Context, carry: Carry, plan: Plan, probabilities: jax.Array, attended: jax.Array
) -> Carry:
    """Leaves the carry as it is; `probabilities` `[B, H, T, S]`, `attended` `[B, T, H*d]`."""
    del context, plan, probabilities, attended
    return carry


def computed_rows(context: Context, plan: Plan) -> jax.Array:
    """Returns the weights of query rows that exist and are computed, `[B, 1, T]` or `[B, H, T]`."""
    exists = context.valid[:, None, :]
    return exists if plan.queries is None else exists * plan.queries


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
      plan: Its `queries` are what is computed at all.
      value_weights: Pairs whose value is used, `[B, H, T, S]`; the kept pairs unless probabilities are pruned too.

    References:
      Energon (arXiv 2110.09310), attention unit; counts of its specification, section 4.
    """
    query = operands.query
    head_dim, num_keys = query.shape[-1], operands.key.shape[2]
    qk_bits, v_bits = context.widths["qk_bits"], context.widths["v_bits"]
    output_bits = context.widths["out.activation_bits"]
    exists = computed_rows(context, plan)
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
    """One path's hooks; each default is the identity, or does what the plan and the selection say.

    `on_weight` (soft only: the chip stores pruned weights) sees a kernel `[inputs, outputs]` before it is quantised.
    `on_product` sees both operands of every product of a block and changes neither.
    `generates_keys`: `execution` counts K and V as made on the mechanism's own units
    (`generate.mac`), so that the dense product `qkv` counts Q alone.
    `skips_zeros`: the block counts the density of weights.
    `head_knobs`: knobs whose first axis in a layer is the head, if that is all that ties `filter`, `on_probabilities` and
    `execution` to heads, so that they may see some heads at a time; None: they see all.
    `splits_examples`: whether they may see some examples at a time all the same. A plan's notes are then `[B, H, ...]`.
    """

    start: StartFn = no_carry
    plan: PlanFn = plan_all
    filter: FilterFn = keep_all
    on_probabilities: ProbabilitiesFn = keep_probabilities
    on_activation: TensorFn = keep_activation
    execution: ExecutionFn = exact_execution
    on_output: TensorFn = reuse_rows
    on_weight: WeightFn = keep_weight
    on_product: ProductFn = no_product
    carry: CarryFn = keep_carry
    generates_keys: bool = False
    skips_zeros: bool = False
    head_knobs: tuple[str, ...] | None = None
    splits_examples: bool = False


def no_knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns no knobs: nothing to train beyond the bits every policy has."""
    del num_layers, num_heads
    return {}


def no_codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns no storage codes."""
    del knobs, tensors
    return {}


def stored_whole(knobs: Mapping[str, np.ndarray], kernel: np.ndarray, site: str) -> np.ndarray:
    """Returns the kernel as it is."""
    del knobs, site
    return kernel


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """A way to skip or cheapen work.

    Attributes:
      name: The registry's name.
      summary: One line for `codesign list`.
      knobs: Start values of the mechanism's own knobs, each with a leading axis L.
      thresholds: The scale of its knob `threshold`; None if it has none.
      has_rounds: Whether the last axis of `threshold` counts rounds of a filter.
      codes: Trained knobs to the integers the chip stores, given the real value of one code by
        tensor and the mechanism's calibrated ranges, `[L, ...]` (`residual` a scalar); `logit` is that of a score, query
        times key.
      own_ranges: Names of the ranges that it wants calibrated besides those of every model (`Context.calibrated`).
      prune_weight: One layer's trained knobs, kernel and site to the kernel that is quantised and stored.
      soft: Differentiable hooks.
      hard: Integer hooks.
      bypass: Hooks of both paths when its machine runs without it: the dense reference on that machine.
    """

    name: str
    summary: str
    knobs: Callable[[int, int], dict[str, jax.Array]] = no_knobs
    thresholds: ThresholdScale | None = None
    has_rounds: bool = False
    codes: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], dict[str, np.ndarray]] = (
        no_codes
    )
    own_ranges: tuple[str, ...] = ()
    prune_weight: Callable[[Mapping[str, np.ndarray], np.ndarray, str], np.ndarray] = stored_whole
    soft: Hooks = field(default_factory=Hooks)
    hard: Hooks = field(default_factory=Hooks)
    bypass: Hooks = field(default_factory=Hooks)
