"""Attention a few examples and heads at a time, so that what it computes by pair stays in the processor's caches.

Examples never look at each other, and heads only through what a mechanism plans or carries on. Arrays by pair are by far
the largest of a layer: several megabytes each, and dozens of steps write and read them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from codesign.backward import keeping_marked, kept
from codesign.mechanisms.protocol import Context, Counts, Hooks, Operands, Plan, keep_carry
from codesign.parts import MAX_PAIRS, most_examples
from codesign.workload import Operation


@struct.dataclass
class Attention:
    """What attention did.

    `attended` heads side by side, `[B, T, H*d]`, as the activation that enters `out`; `counts`; `keys` generated on
    demand; `trace` of the filter and tensors by pair, `[B, H, T, S]`, both empty if it was split.
    """

    attended: jax.Array
    counts: Counts
    keys: jax.Array | None = None
    trace: dict[str, jax.Array] = struct.field(default_factory=dict)
    pairs: dict[str, jax.Array] = struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How many examples and heads are computed at a time; both divide what there is."""

    examples: int
    heads: int


def chunks_of(operands: Operands, *, splits_heads: bool = True) -> Chunks:
    """Returns the largest chunks that stay within `MAX_PAIRS`, of all heads unless `splits_heads`."""
    batch, heads, queries, _ = operands.query.shape
    pairs = queries * operands.key.shape[2]
    own = heads
    if splits_heads and heads * pairs > MAX_PAIRS:
        own = max(
            n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * pairs <= MAX_PAIRS)
        )
    return Chunks(most_examples(batch, own * pairs), own)


def may_split(context: Context, plan: Plan, hooks: Hooks) -> bool:
    """Whether attention may run in parts: nobody wants to see it whole, no tokens are pruned, nothing is carried on."""
    is_whole = context.tracing or context.calibrating or hooks.carry is not keep_carry
    has_parts = hooks.head_knobs is not None or hooks.splits_examples
    return has_parts and plan.tokens is None and not is_whole


def in_chunks(
    attend: Callable[[Context, Operands, Plan], Attention],
    context: Context,
    operands: Operands,
    plan: Plan,
    hooks: Hooks,
) -> Attention:
    """Returns what `attend` does with everything at once, computed chunk by chunk.

    Args:
      attend: Attention of some examples and heads.
      context: The layer's context.
      operands: Codes of the layer.
      plan: What was planned; all of it, `[B, H, ...]`, is split too, but for what concerns tokens after attention.
      hooks: The mechanism's hooks.
    """
    chunks = chunks_of(operands, splits_heads=hooks.head_knobs is not None)
    batch, heads, _, head_dim = operands.query.shape
    if (chunks.examples, chunks.heads) == (batch, heads):
        whole = attend(context, operands, plan)
        return Attention(whole.attended, whole.counts, whole.keys)
    by_batch, by_head = batch // chunks.examples, heads // chunks.heads

    def examples_of(x: jax.Array) -> jax.Array:
        """`[B, ...]` to `[chunks, b, ...]`."""
        split = jnp.reshape(x, (by_batch, 1, chunks.examples, *x.shape[1:]))
        repeated = jnp.broadcast_to(split, (by_batch, by_head, *split.shape[2:]))
        return jnp.reshape(repeated, (-1, *split.shape[2:]))

    def heads_of(x: jax.Array) -> jax.Array:
        """`[H, ...]` to `[chunks, h, ...]`."""
        split = jnp.reshape(x, (1, by_head, chunks.heads, *x.shape[1:]))
        repeated = jnp.broadcast_to(split, (by_batch, *split.shape[1:]))
        return jnp.reshape(repeated, (-1, *split.shape[2:]))

    def both_of(x: jax.Array) -> jax.Array:
        """`[B, H, T, d]` to `[chunks, b, h, T, d]`."""
        shape = (by_batch, chunks.examples, by_head, chunks.heads, *x.shape[2:])
        split = jnp.swapaxes(jnp.reshape(x, shape), 1, 2)
        return jnp.reshape(split, (-1, *split.shape[2:]))

    own_knobs = {name: heads_of(context.knobs[name]) for name in hooks.head_knobs or ()}
    parts = {
        "operands": tuple(both_of(x) for x in (operands.query, operands.key, operands.value)),
        "valid": examples_of(context.valid),
        "pairs": examples_of(context.pairs),
        "knobs": own_knobs,
        "plan": jax.tree.map(both_of, plan.replace(ffn_source=None, ffn_full=None)),  # type: ignore[attr-defined]
    }

    def one(part: dict[str, Any]) -> tuple[jax.Array, Counts]:
        query, key, value = part["operands"]
        own = context.replace(  # type: ignore[attr-defined]
            knobs=context.knobs | part["knobs"], valid=part["valid"], pairs=part["pairs"]
        )
        done = attend(
            own,
            operands.replace(query=query, key=key, value=value),  # type: ignore[attr-defined]
            part["plan"],
        )
        return done.attended, done.counts

    attended, counts = jax.lax.map(keeping_marked(one), parts)
    grid = (by_batch, by_head)
    attended = jnp.reshape(attended, (*grid, *attended.shape[1:]))
    attended = jnp.moveaxis(attended, 1, 3)  # [chunks, b, T, chunks, h*d]
    tokens = attended.shape[2]
    attended = kept(jnp.reshape(attended, (batch, tokens, heads * head_dim)))
    return Attention(attended, _together(counts, chunks, grid))


def _together(stacked: Counts, chunks: Chunks, grid: tuple[int, int]) -> Counts:
    """Returns the counts of all chunks as one, from leaves `[chunks, ...]`."""

    def shared(x: jax.Array) -> jax.Array:
        return x[0]

    def by_example(x: jax.Array) -> jax.Array:
        if x.shape[1] != chunks.examples:
            return x[0]
        split = jnp.reshape(x, (*grid, *x.shape[1:]))[:, 0]
        return jnp.reshape(split, (-1, *x.shape[2:]))

    def mean_of_heads(x: jax.Array) -> jax.Array:
        return jnp.reshape(
            jnp.mean(jnp.reshape(x, (*grid, *x.shape[1:])), axis=1), (-1, *x.shape[2:])
        )

    def by_both(x: jax.Array) -> jax.Array:
        split = jnp.swapaxes(jnp.reshape(x, (*grid, *x.shape[1:])), 1, 2)
        return jnp.reshape(split, (grid[0] * x.shape[1], grid[1] * x.shape[2], *x.shape[3:]))

    return Counts(
        operations={
            name: Operation(by_both(o.count), shared(o.bits_a), shared(o.bits_b))
            for name, o in stacked.operations.items()
        },
        rows={name: jax.tree.map(by_both, r) for name, r in stacked.rows.items()},
        streams={
            name: s.replace(  # type: ignore[attr-defined]
                vectors=by_both(s.vectors),
                bits=shared(s.bits),
                resident_bits=by_example(s.resident_bits),
            )
            for name, s in stacked.streams.items()
        },
        densities={name: mean_of_heads(x) for name, x in stacked.densities.items()},
        tiles=jax.tree.map(by_both, stacked.tiles),
        observed={name: jnp.max(x, axis=0) for name, x in stacked.observed.items()},
    )
