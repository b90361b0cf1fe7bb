"""What SOFA and LAPA share: keys predicted by shifts, and keys and values made only for tokens that some query wants.

Keys are estimated from the tokens and the leading ones of the weights before any key exists, and requantised like real
ones. The prediction finds the pairs; the tokens that a query of a head wants then become keys and values of that head,
which never leave the chip.

References:
  Wang et al., "SOFA", MICRO 2024, arXiv 2407.10416: prediction of keys, on-demand keys and values, stationary tokens.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from codesign import gates
from codesign.backward import dense_product
from codesign.log_codes import leading_one, leading_one_operand
from codesign.mechanisms.protocol import (
    Carry,
    Context,
    Counts,
    FilterFn,
    Hooks,
    Numbers,
    Operands,
    Plan,
    PlanFn,
    Selection,
    part_columns,
)
from codesign.quantize import code_limit, exact_einsum, power_of_two
from codesign.workload import fetched_vectors, grid_levels, operation, row_statistics, stream

LINEAR_BITS = 8
"""Most bits of tokens and weights."""
WEIGHT_CODE_BITS = 4.0
"""Sign and leading-zero count of an 8-bit weight, bit (arXiv 2407.10416)."""


ProductFn: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def predicted_operands(
    x: jax.Array,
    numbers: Numbers,
    product: ProductFn,
    cut: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Returns predicted queries and keys as 8-bit codes `[B, H, T, d]`, from one product with both weights."""
    parts = ("query", "key")
    weights = numbers.weight_codes("qkv")
    columns = jnp.concatenate([part_columns(weights, part) for part in parts], axis=-1)
    sums = jnp.split(product(numbers.codes(x, "qkv"), columns), 2, axis=-1)
    query, key = (cut(numbers.estimate(one, part)) for one, part in zip(sums, parts, strict=True))
    return query, key


def _planned(
    context: Context, x: jax.Array, numbers: Numbers, product: ProductFn
) -> tuple[Plan, Counts]:
    """Predicts keys from activations `[B, T, D]`; `product` multiplies codes by the leading ones of weight codes."""
    weights = part_columns(numbers.weight_codes("qkv"), "key")
    key = numbers.estimate(product(numbers.codes(x, "qkv"), weights), "key")
    tokens = jnp.sum(context.valid, axis=-1, keepdims=True)
    width, head_dim = x.shape[-1], key.shape[-1]
    products = jnp.broadcast_to(tokens * width * head_dim, key.shape[:2])
    bits = context.widths["qkv.activation_bits"]
    counts = Counts(
        operations={"predict.shift_add": operation(products, bits, WEIGHT_CODE_BITS)},
        streams={
            # Heads take turns on a block of tokens, which is read once for all of them.
            "tokens": stream(
                jnp.broadcast_to(tokens / key.shape[1], key.shape[:2])[..., None], bits, width
            ),
            "weight_codes": stream(_blocks(context, key.shape) * head_dim, WEIGHT_CODE_BITS, width),
        },
    )
    return Plan(notes={"key": key}), counts


def _blocks(context: Context, shape: tuple[int, ...]) -> jax.Array:
    """Returns the blocks of 1, 2, 4, ... tokens of each example, `[B, H, G]`, for keys of `shape` `[B, H, S, d]`."""
    tokens = jnp.sum(context.valid, axis=-1)
    sizes = jnp.asarray([2.0**level for level in range(grid_levels(shape[2]))], tokens.dtype)
    number = gates.straight_through(
        jnp.ceil(tokens[:, None] / sizes[None, :]), tokens[:, None] / sizes[None, :]
    )
    return jnp.broadcast_to(number[:, None, :], (*shape[:2], len(sizes)))


def soft_plan(
    context: Context, x: jax.Array, numbers: Numbers, carry: Carry
) -> tuple[Plan, Counts]:
    """Predicts keys; the estimate's derivative to the weights is that of the product times its gain."""
    del carry

    def product(codes: jax.Array, weights: jax.Array) -> jax.Array:
        return dense_product(codes, leading_one_operand(weights))

    return _planned(context, x, numbers, product)


def hard_plan(
    context: Context, x: jax.Array, numbers: Numbers, carry: Carry
) -> tuple[Plan, Counts]:
    """Predicts keys in integers."""
    del carry

    def product(codes: jax.Array, weights: jax.Array) -> jax.Array:
        return exact_einsum("btk,kn->btn", codes, leading_one(weights), LINEAR_BITS)

    return _planned(context, x, numbers, product)


def wanted_keys(context: Context, weights: jax.Array) -> jax.Array:
    """Returns the keys that blocks of queries want, `[B, H, G]`."""
    # The relaxation of the hard path says straight-through too.
    is_binary = context.relaxation.straight_through
    return fetched_vectors(weights, context.valid[:, None, :], is_binary=is_binary)


def execution(
    context: Context,
    operands: Operands,
    selection: Selection,
    plan: Plan,
    value_weights: jax.Array,
) -> Counts:
    """Counts keys and values made on demand, and attention over the kept pairs.

    With `segments` among the notes of the selection, `[B, H]`, attention runs segment by segment: a segment's best score is
    exponentiated and checked against that of the others once, and its sums join theirs.
    """
    del plan
    batch, heads, queries, head_dim = operands.query.shape
    width = context.width
    exists = context.valid[:, None, :]
    keys_per_row = jnp.sum(selection.weights, axis=-1) * exists
    kept, used = (
        jnp.sum(jnp.sum(weights, axis=-1) * exists, axis=-1)
        for weights in (selection.weights, value_weights)
    )
    rows = jnp.broadcast_to(jnp.sum(exists, axis=-1), kept.shape)
    joins = selection.notes.get("segments", jnp.zeros((), context.valid.dtype))
    wanted = selection.fetched[..., -1]
    # A token is read again if a query of any head wants it.
    together = jnp.reshape(selection.weights, (batch, 1, heads * queries, -1))
    every_row = jnp.tile(context.valid, (1, heads))[:, None, :]
    tokens = fetched_vectors(together, every_row, is_binary=context.relaxation.straight_through)
    share = jnp.broadcast_to(tokens[..., -1] / heads, kept.shape)
    qk_bits, v_bits = context.widths["qk_bits"], context.widths["v_bits"]
    activation_bits = context.widths["qkv.activation_bits"]
    weight_bits = context.widths["qkv.weight_bits"]
    joining = {
        "softmax.add": operation(kept + joins * (head_dim + 1), qk_bits, qk_bits),
        "softmax.compare": operation(joins, qk_bits, qk_bits),
        "softmax.multiply": operation(joins * (head_dim + 1), qk_bits, qk_bits),
    }
    blocks = _blocks(context, operands.key.shape)
    return Counts(
        operations={
            "generate.mac": operation(
                2.0 * wanted * width * head_dim, activation_bits, weight_bits
            ),
            "qk.mac": operation(kept * head_dim, qk_bits, qk_bits),
            "softmax.exp": operation(kept + joins, qk_bits, qk_bits),
            "pv.mac": operation(used * head_dim, qk_bits, v_bits),
            "output.divide": operation(rows * head_dim, qk_bits, v_bits),
        }
        | (joining if "segments" in selection.notes else {}),
        rows={"attention": row_statistics(keys_per_row, exists, operands.key.shape[2])},
        streams={
            "generate_tokens": stream(share[..., None], activation_bits, width),
            "generate_weights": stream(blocks * (2.0 * head_dim), weight_bits, width),
            "query": stream(rows[..., None], qk_bits, head_dim),
            "output": stream(rows[..., None], context.widths["out.activation_bits"], head_dim),
        },
    )


def on_demand(plan: PlanFn, filter_pairs: FilterFn) -> Hooks:
    """Returns the hooks of a path that predicts keys in `plan` and finds pairs in `filter_pairs`."""
    return Hooks(
        plan=plan,
        filter=filter_pairs,
        execution=execution,
        generates_keys=True,
        splits_examples=True,
    )


BYPASS = Hooks(execution=execution, generates_keys=True)
"""Nothing predicted, every key made: dense attention on the same machine."""


def top_code(code: jax.Array, code_bits: jax.Array) -> jax.Array:
    """Returns the top 8 bits of codes of a deployed width, in [-127, 127]; derivative 2^(8 - b) (true: 0)."""
    ratio = code * gates.detach(power_of_two(LINEAR_BITS - code_bits))
    limit = code_limit(LINEAR_BITS)
    whole = jnp.clip(jnp.floor(ratio), -limit, limit)
    return gates.straight_through(whole, ratio)
