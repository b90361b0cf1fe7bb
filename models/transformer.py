"""One transformer block, written once over an arithmetic and a mechanism's hooks, and the scan over layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from codesign.backward import keeping_marked
from codesign.mechanisms.protocol import (
    NARROW_BITS,
    Carry,
    Context,
    Counts,
    Hooks,
    Operands,
    Plan,
    keep_probabilities,
    no_product,
    own_weights,
)
from codesign.models.arithmetic import Arithmetic
from codesign.models.chunks import Attention, in_chunks, may_split
from codesign.structure import ModelStructure
from codesign.vocabulary import SITES, check_key
from codesign.workload import Gemm, Workload, gemm, layers_second

TENSORS = {"scores": "raw_scores", "out": "context", "down": "hidden"}
"""Names in docs/integer_path.md of tensors that enter a site of another name."""


@struct.dataclass
class BlockOutput:
    """What one layer (or, after the scan, all layers) returns beside the residual stream.

    `workload` counts; `trace` decisions and tensors by name; `observed` absolute maxima by tensor name.
    """

    workload: Workload
    trace: dict[str, jax.Array]
    observed: dict[str, jax.Array]


@struct.dataclass
class ModelOutput:
    """A model's result.

    Attributes:
      logits: `[B, C]`, or `[B, T, C]` with one output per token; integers on the hard path, see docs/integer_path.md.
      workload: Counts per example.
      trace: Decisions and tensors of all layers, `[L, ...]`; empty unless traced.
      observed: Absolute maxima for calibration, `layers` `[L]` and `ends`; empty on the hard path.
      num_pooled: Tokens whose features the logits are made of, `[B]`: those left with mean pooling, else 1.
    """

    logits: jax.Array
    workload: Workload
    trace: dict[str, jax.Array]
    observed: dict[str, dict[str, jax.Array]]
    num_pooled: jax.Array


def block(
    arithmetic: Arithmetic,
    hooks: Hooks,
    context: Context,
    structure: ModelStructure,
    residual: jax.Array,
    carry: Carry,
) -> tuple[jax.Array, jax.Array, Carry, BlockOutput]:
    """Runs one transformer block, pre-norm or post-norm as the arithmetic reads and adds.

    Args:
      arithmetic: Float or integer arithmetic of this layer.
      hooks: The mechanism's hooks for the same path.
      context: This layer's knobs, masks and relaxation.
      structure: Sizes of the model.
      residual: Residual stream, `[B, T, D]`.
      carry: What the mechanism passes from layer to layer.

    Returns:
      The residual stream, the tokens that live on `[B, T]`, the carry, and this layer's output.
    """
    counts, plan = Counts(), Plan()
    tensors: dict[str, jax.Array] = {}

    def entering(x: jax.Array, site: str) -> jax.Array:
        nonlocal counts
        x, added = hooks.on_activation(context, x, plan, site)
        counts += added
        tensors[TENSORS.get(site, site)] = x
        return x

    def leaving(y: jax.Array, site: str) -> jax.Array:
        nonlocal counts
        y, added = hooks.on_output(context, y, plan, site)
        counts += added
        tensors[site] = y
        return y

    def multiplied(x: jax.Array, site: str, *, heads_in: int = 1, heads_out: int = 1) -> None:
        """Shows a linear layer to the hooks; of its input or its output heads stand side by side."""
        nonlocal counts
        if hooks.on_product is not no_product:
            weight = arithmetic.weight_codes(site)
            split = jnp.reshape(weight, (heads_in, x.shape[2] // heads_in, heads_out, -1))
            right = jnp.reshape(
                jnp.swapaxes(split, 1, 2), (1, heads_in * heads_out, split.shape[1], split.shape[3])
            )
            left = jnp.swapaxes(jnp.reshape(x, (*x.shape[:2], heads_in, -1)), 1, 2)
            counts += hooks.on_product(context, left, right, site)

    x = entering(arithmetic.read(residual, "qkv"), "qkv")
    plan, added = hooks.plan(context, x, arithmetic, carry)
    counts += added
    if plan.tokens is not None:
        context = context.replace(  # type: ignore[attr-defined]
            valid=context.valid * plan.tokens,
            pairs=context.pairs * plan.tokens[:, None, None, :],
        )
    multiplied(x, "qkv", heads_out=3 * structure.num_heads)
    operands = arithmetic.heads(arithmetic.linear(x, "qkv"))
    operands = operands.replace(  # type: ignore[attr-defined]
        query=entering(operands.query, "query"),
        key=entering(operands.key, "key"),
        value=entering(operands.value, "value"),
    )

    def attend(context: Context, operands: Operands, plan: Plan) -> Attention:
        selection, counts = hooks.filter(context, operands, plan, carry)
        scores = arithmetic.scores(operands) if selection.scores is None else selection.scores
        scores, added = hooks.on_activation(context, scores, plan, "scores")
        counts += added
        probabilities = arithmetic.probabilities(scores, operands, selection.weights)
        probabilities, value_weights, added = hooks.on_probabilities(
            context, probabilities, selection
        )
        counts += added + hooks.execution(context, operands, selection, plan, value_weights)
        key = jnp.swapaxes(operands.key, 2, 3)
        counts += hooks.on_product(context, operands.query, key, "qk")
        counts += hooks.on_product(context, probabilities, operands.value, "pv")
        attended = arithmetic.attend(probabilities, operands)
        pairs = {"raw_scores": scores, "probabilities": probabilities}
        if hooks.on_probabilities is not keep_probabilities:
            pairs["used"] = value_weights > 0.5
        return Attention(attended, counts, selection.keys, selection.trace, pairs)

    if may_split(context, plan, hooks):
        attention = in_chunks(attend, context, operands, plan, hooks)
    else:
        attention = attend(context, operands, plan)
        tensors |= attention.pairs
    counts += attention.counts
    attended = leaving(attention.attended, "attention")
    if attention.pairs:
        carry = hooks.carry(context, carry, plan, attention.pairs["probabilities"], attended)
    attended = entering(attended, "out")
    multiplied(attended, "out", heads_in=structure.num_heads)
    branch = leaving(arithmetic.linear(attended, "out"), "attention_branch")
    residual = tensors["attended"] = arithmetic.add(residual, branch, "out")
    x = entering(arithmetic.read(residual, "up"), "up")
    multiplied(x, "up")
    hidden = arithmetic.activate(entering(arithmetic.linear(x, "up"), "gelu"))
    hidden = entering(hidden, "down")
    multiplied(hidden, "down")
    branch = leaving(arithmetic.linear(hidden, "down"), "ffn_branch")
    residual = tensors["residual"] = arithmetic.add(residual, branch, "down")
    stored = arithmetic.weight_densities()
    counts += Counts(densities={name: jnp.reshape(value, (1,)) for name, value in stored.items()})
    for key in counts.operations:
        check_key(key)
    assert counts.densities.keys() - stored.keys() <= set(SITES)
    workload = Workload(
        operations=counts.operations,
        rows=counts.rows,
        streams=counts.streams,
        block_gemms=block_gemms(hooks, context, plan, attention.keys, structure),
        end_gemms={},
        head_dim=structure.head_dim,
        densities=counts.densities,
        tiles=counts.tiles,
    )
    trace = attention.trace | tensors if context.tracing else {}
    output = BlockOutput(workload=workload, trace=trace, observed=counts.observed)
    return residual, context.valid, carry, output


def block_gemms(
    hooks: Hooks,
    context: Context,
    plan: Plan,
    keys: jax.Array | None,
    structure: ModelStructure,
) -> dict[str, Gemm]:
    """Returns the dense products of one layer: rows that are skipped do not count, nor heads that are dropped.

    Rows are effective ones: rows times inner times outer size is what is multiplied.
    """
    tokens = jnp.sum(context.valid, axis=-1)
    shapes = {
        "qkv": (structure.width, 3 * structure.attention_width),
        "out": (structure.attention_width, structure.width),
        "up": (structure.width, structure.hidden),
        "down": (structure.hidden, structure.width),
    }
    rows = dict.fromkeys(shapes, tokens)
    bits = {site: context.widths[f"{site}.activation_bits"] for site in shapes}
    generated = plan.keys if keys is None else keys
    parts = [plan.queries, generated, generated]
    if hooks.generates_keys:
        shapes["qkv"] = (structure.width, structure.attention_width)
        rows["qkv"] = _mean_rows(parts[:1], context.valid)
    elif any(part is not None for part in parts):
        rows["qkv"] = _mean_rows(parts, context.valid) / 3.0
    if plan.heads is not None:
        rows["out"] = tokens * jnp.mean(plan.heads, axis=-1)
    if plan.ffn_source is not None:
        computed = own_weights(plan.ffn_source) * context.valid
        rows["up"] = rows["down"] = jnp.sum(computed, axis=-1)
    else:
        computed = context.valid
    if plan.ffn_full is not None:
        for site in ("up", "down"):
            narrow = jnp.minimum(NARROW_BITS / bits[site], 1.0)
            share = plan.ffn_full + (1.0 - plan.ffn_full) * narrow
            rows[site] = jnp.sum(computed * share, axis=-1)
    return {
        site: gemm(rows[site], inner, outer, bits[site], context.widths[f"{site}.weight_bits"])
        for site, (inner, outer) in shapes.items()
    }


def _mean_rows(parts: list[jax.Array | None], valid: jax.Array) -> jax.Array:
    """Returns the rows computed in all parts together, `[B]`: each `[B, H, T]`, mean over heads, or None for all."""
    exists = valid[:, None, :]
    return sum(
        (
            jnp.mean(jnp.sum(exists if part is None else exists * part, axis=-1), axis=-1)
            for part in parts
        ),
        start=jnp.zeros((), valid.dtype),
    )


def run_layers(
    layer_fn: Callable[..., tuple[jax.Array, jax.Array, Carry, BlockOutput]],
    stacked: Any,
    residual: jax.Array,
    valid: jax.Array,
    carry: Carry,
) -> tuple[jax.Array, jax.Array, BlockOutput]:
    """Scans `layer_fn` over the leading axis of `stacked`; compile time does not grow with depth.

    Args:
      layer_fn: One layer: (its slice of `stacked`, residual, valid, carry) to (residual, valid, carry, output).
      stacked: Pytree of per-layer arrays, `[L, ...]`.
      residual: Residual stream entering the first layer, `[B, T, D]`.
      valid: Tokens that exist, `[B, T]`.
      carry: The mechanism's carry entering the first layer.

    Returns:
      The last residual stream, the tokens left, and the outputs of all layers with the workload as `[B, L, ...]`.
    """

    def step(
        state: tuple[jax.Array, jax.Array, Carry], layer: Any
    ) -> tuple[tuple[jax.Array, jax.Array, Carry], BlockOutput]:
        residual, valid, carry, output = layer_fn(layer, *state)
        return (residual, valid, carry), output

    (residual, valid, _), outputs = jax.lax.scan(
        keeping_marked(step), (residual, valid, carry), stacked
    )
    workload = layers_second(outputs.workload)
    return residual, valid, BlockOutput(workload, outputs.trace, outputs.observed)
