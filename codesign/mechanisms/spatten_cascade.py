"""SpAtten's cascade: tokens and heads ranked by what layers so far attended to and put out, the least of them pruned.

Of a causal model a query knows what it and the queries before it did, so importances are kept by query; where all queries
see all tokens, all know the same, and what one of them prunes is gone for all.
"""

import jax
import jax.numpy as jnp
import numpy as np

from codesign import gates
from codesign.gates import Relaxation
from codesign.mechanisms.protocol import Carry, Context, Counts, Numbers, Plan
from codesign.segments import SHARE_ONE, exact_top, soft_exact_top

ATTENTION_BITS = 16
"""Most bits of queries, keys and probabilities; those of all layers are summed in as many."""
IMPORTANCE_BITS = 40
"""Bits of an importance, sign included."""
OFF_PART = 1.0 - 2.0**-11
"""Parts from here on mean all (ours)."""


def start(batch: int, num_heads: int, num_tokens: int) -> Carry:
    """Returns what no layer has added to yet: importances of keys and heads by query, and what is left of pairs."""
    pairs = jnp.zeros((batch, num_tokens, num_tokens))
    return {
        "token": pairs,
        "head": jnp.zeros((batch, num_tokens, num_heads)),
        "exists": pairs,
        "keep": pairs,
        "share": jnp.ones((2,)),
        "layer": jnp.zeros((), jnp.int32),
    }


def _planned(
    context: Context, carry: Carry, largest: jax.Array, heads: jax.Array, share: jax.Array
) -> tuple[Plan, Counts]:
    """Returns the plan of tokens among the `largest` `[B, 1, T, S]` and of `heads` `[B, T, H]` of each query."""
    is_first = carry["layer"] == 0
    exists = jnp.where(is_first, context.pairs, carry["exists"][:, None])
    before = jnp.where(is_first, context.pairs, carry["keep"][:, None])
    there = context.valid[:, None, :, None]
    seen_by = jnp.sum(exists * there, axis=2, keepdims=True)
    is_young = (seen_by < jnp.sum(there, axis=2, keepdims=True)) & (seen_by > 0)
    length = context.valid.shape[1]
    own = jnp.asarray(np.eye(length, dtype=bool))[None, None] & is_young
    stays = own | (jnp.arange(length) == 0)[None, None, None, :]
    keep = jnp.where(stays | is_first, before, largest * before)
    tokens = jnp.max(keep * there, axis=(1, 2))
    by_row = jnp.where(is_first, 1.0, jnp.moveaxis(heads, 2, 1))
    rows = by_row * (tokens * context.valid)[:, None, :]
    weights = keep * by_row[..., None]
    alive = jnp.sum(tokens * context.valid, axis=-1)
    # One choice serves all queries, unless some cannot see all tokens: then each has its own.
    number = by_row.shape[1]
    one, each = alive + number, jnp.sum(before * there, axis=(1, 2, 3)) + alive * number
    compared = jnp.where(jnp.any(is_young, axis=(1, 2, 3)), each, one) / number
    plan = Plan(
        tokens=tokens,
        heads=jnp.sum(rows, axis=-1) / jnp.maximum(alive, 1.0)[:, None],
        queries=rows,
        keys=jnp.max(weights * there, axis=2),
        keep=weights,
        notes={
            "exists": exists[:, 0],
            "keep": keep[:, 0],
            "share": share,
            "compared": jnp.broadcast_to(compared[:, None], rows.shape[:2]),
        },
    )
    return plan, Counts()


def keep_output(context: Context, y: jax.Array, plan: Plan, site: str) -> tuple[jax.Array, Counts]:
    """Leaves the output as it is: a head that is gone for a query attended to nothing and put out 0."""
    del context, plan, site
    return y, Counts()


def whole_or(part: jax.Array) -> jax.Array:
    """Returns parts, those from `OFF_PART` on as 1."""
    return gates.straight_through(jnp.where(gates.detach(part) >= OFF_PART, 1.0, part), part)


def as_stored(share: jax.Array, relaxation: Relaxation) -> jax.Array:
    """Returns shares in whole 1/1024 where the forward value is the deployed one."""
    if not relaxation.straight_through:
        return share
    stored = jnp.clip(jnp.round(gates.detach(share) * SHARE_ONE), 1.0, SHARE_ONE)
    return gates.straight_through(stored / SHARE_ONE, share)


def soft_plan(
    context: Context, x: jax.Array, numbers: Numbers, carry: Carry
) -> tuple[Plan, Counts]:
    """Prunes tokens and heads by gates; straight-through, derivatives go to the shares alone."""
    del x, numbers
    relaxation = context.relaxation
    part = whole_or(jax.nn.sigmoid(context.knobs["threshold"][:2]))
    cumulative = carry["share"] * part
    share = as_stored(cumulative, relaxation)
    token, head = carry["token"], carry["head"]
    if relaxation.straight_through:
        token, head = gates.detach(token), gates.detach(head)
    exists = jnp.where(carry["layer"] == 0, context.pairs, carry["exists"][:, None])
    largest = soft_exact_top(token[:, None], exists, share[:1], IMPORTANCE_BITS, relaxation)
    every = jnp.ones_like(head[:, None])
    heads = soft_exact_top(head[:, None], every, share[1:], IMPORTANCE_BITS, relaxation)
    return _planned(context, carry, largest, heads[:, 0], cumulative)


def hard_plan(
    context: Context, x: jax.Array, numbers: Numbers, carry: Carry
) -> tuple[Plan, Counts]:
    """Prunes tokens and heads as the chip does."""
    del x, numbers
    share, dtype = context.knobs["threshold"], context.valid.dtype
    exists = jnp.where(carry["layer"] == 0, context.pairs, carry["exists"][:, None])
    largest = exact_top(carry["token"][:, None], exists, share[:1], IMPORTANCE_BITS)
    head = carry["head"][:, None]
    heads = exact_top(head, jnp.ones_like(head), share[1:2], IMPORTANCE_BITS)
    return _planned(
        context, carry, largest.astype(dtype), heads[:, 0].astype(dtype), carry["share"]
    )


def soft_carry(
    context: Context, carry: Carry, plan: Plan, probabilities: jax.Array, attended: jax.Array
) -> Carry:
    """Adds probabilities and sizes of outputs in their real units."""
    return _carried(context, carry, plan, probabilities, jnp.abs(attended))


def hard_carry(
    context: Context, carry: Carry, plan: Plan, probabilities: jax.Array, attended: jax.Array
) -> Carry:
    """Adds probabilities in 16 bits, and sizes of outputs times the layer's factor."""
    shift = ATTENTION_BITS - context.widths["qk_bits"].astype(jnp.int32)
    whole = jnp.left_shift(probabilities.astype(jnp.int32), shift).astype(jnp.float64)
    size = jnp.abs(attended).astype(jnp.float64) * context.knobs["head_factor"].astype(jnp.float64)
    return _carried(context, carry, plan, whole, size)


def _carried(
    context: Context, carry: Carry, plan: Plan, probabilities: jax.Array, size: jax.Array
) -> Carry:
    """Returns the carry with a layer's attention in it: a query learns from those that it can see."""
    number = probabilities.shape[1]
    received = jnp.sum(probabilities, axis=1)
    by_head = jnp.sum(jnp.reshape(size, (*size.shape[:2], number, -1)), axis=-1)
    known = context.pairs[:, 0] * context.valid[:, :, None] * context.valid[:, None, :]
    token, head = (
        jnp.einsum(
            "bij,bjs->bis", known.astype(added.dtype), added, precision=jax.lax.Precision.HIGHEST
        )
        for added in (received, by_head)
    )
    return {
        "token": carry["token"] + token.astype(carry["token"].dtype),
        "head": carry["head"] + head.astype(carry["head"].dtype),
        **{
            name: plan.notes[name].astype(carry[name].dtype) for name in ("exists", "keep", "share")
        },
        "layer": carry["layer"] + 1,
    }
