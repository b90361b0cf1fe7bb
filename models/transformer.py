"""One transformer block, written once over an arithmetic and a mechanism's hooks, and the scan over layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from codesign.mechanisms.protocol import Carry, Context, Counts, Hooks, Plan
from codesign.models.arithmetic import Arithmetic
from codesign.structure import ModelStructure
from codesign.workload import Gemm, Workload, gemm, layers_second


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
      logits: `[B, classes]`; on the hard path integers times the number of tokens, see docs/integer_path.md.
      workload: Counts per example.
      trace: Decisions and tensors of all layers, `[L, ...]`; empty unless traced.
      observed: Absolute maxima for calibration, `layers` `[L]` and `ends`; empty on the hard path.
    """

    logits: jax.Array
    workload: Workload
    trace: dict[str, jax.Array]
    observed: dict[str, dict[str, jax.Array]]


def block(
    arithmetic: Arithmetic,
    hooks: Hooks,
    context: Context,
    structure: ModelStructure,
    residual: jax.Array,
    carry: Carry,
) -> tuple[jax.Array, Carry, Workload, dict[str, jax.Array]]:
    """Runs one pre-norm transformer block.

    Args:
      arithmetic: Float or integer arithmetic of this layer.
      hooks: The mechanism's hooks for the same path.
      context: This layer's knobs, masks and relaxation.
      structure: Sizes of the model.
      residual: Residual stream, `[B, T, D]`.
      carry: What the mechanism passes from layer to layer.

    Returns:
      The residual stream, the carry, this layer's workload, and the mechanism's decisions.
    """
    counts = Counts()

    def entering(x: jax.Array, site: str) -> jax.Array:
        nonlocal counts
        x, added = hooks.on_activation(context, x, site)
        counts += added
        return x

    def leaving(y: jax.Array, plan: Plan, branch: str) -> jax.Array:
        nonlocal counts
        y, added = hooks.on_output(context, y, plan, branch)
        counts += added
        return y

    x = entering(arithmetic.norm(residual, "qkv"), "qkv")
    plan, added = hooks.plan(context, x, {"qkv": arithmetic.weight("qkv")}, carry)
    counts += added
    operands = arithmetic.heads(arithmetic.linear(x, "qkv"))
    selection, added = hooks.filter(context, operands, plan, carry)
    counts += added
    probabilities = arithmetic.probabilities(operands, selection.weights)
    probabilities, value_weights, added = hooks.on_probabilities(context, probabilities, selection)
    counts += added
    counts += hooks.execution(context, operands, selection, plan, value_weights)
    attended = arithmetic.attend(probabilities, operands)
    carry = hooks.carry(context, carry, probabilities, attended)
    branch = leaving(arithmetic.linear(entering(attended, "out"), "out"), plan, "attention")
    residual = arithmetic.add(residual, branch, "out")
    x = entering(arithmetic.norm(residual, "up"), "up")
    hidden = entering(arithmetic.activate(arithmetic.linear(x, "up")), "down")
    branch = leaving(arithmetic.linear(hidden, "down"), plan, "ffn")
    residual = arithmetic.add(residual, branch, "down")
    workload = Workload(
        operations=counts.operations,
        rows=counts.rows,
        streams=counts.streams,
        block_gemms=block_gemms(context, plan, structure),
        end_gemms={},
        head_dim=structure.head_dim,
    )
    return residual, carry, workload, selection.trace


def block_gemms(context: Context, plan: Plan, structure: ModelStructure) -> dict[str, Gemm]:
    """Returns the dense products of one layer; rows that a plan skips are not counted."""
    tokens = jnp.sum(context.valid, axis=-1)
    shapes = {
        "qkv": (structure.width, 3 * structure.attention_width),
        "out": (structure.attention_width, structure.width),
        "up": (structure.width, structure.hidden),
        "down": (structure.hidden, structure.width),
    }
    rows = dict.fromkeys(shapes, tokens)
    if plan.queries is not None or plan.keys is not None:
        queries = tokens if plan.queries is None else jnp.mean(jnp.sum(plan.queries, -1), -1)
        keys = tokens if plan.keys is None else jnp.mean(jnp.sum(plan.keys, -1), -1)
        rows["qkv"] = (queries + 2.0 * keys) / 3.0
    if plan.ffn_source is not None:
        computed = jnp.sum(jnp.diagonal(plan.ffn_source, axis1=1, axis2=2), axis=-1)
        rows["up"] = rows["down"] = computed
    return {
        site: gemm(
            rows[site],
            inner,
            outer,
            context.widths[f"{site}.activation_bits"],
            context.widths[f"{site}.weight_bits"],
        )
        for site, (inner, outer) in shapes.items()
    }


def run_layers(
    layer_fn: Callable[[Any, jax.Array, Carry], tuple[jax.Array, Carry, BlockOutput]],
    stacked: Any,
    residual: jax.Array,
    carry: Carry,
) -> tuple[jax.Array, BlockOutput]:
    """Scans `layer_fn` over the leading axis of `stacked`; compile time does not grow with depth.

    Args:
      layer_fn: One layer: (its slice of `stacked`, residual, carry) to (residual, carry, output).
      stacked: Pytree of per-layer arrays, `[L, ...]`.
      residual: Residual stream entering the first layer, `[B, T, D]`.
      carry: The mechanism's carry entering the first layer.

    Returns:
      The last residual stream, and the outputs of all layers with the workload as `[B, L, ...]`.
    """

    def step(
        state: tuple[jax.Array, Carry], layer: Any
    ) -> tuple[tuple[jax.Array, Carry], BlockOutput]:
        residual, carry, output = layer_fn(layer, *state)
        return (residual, carry), output

    (residual, _), outputs = jax.lax.scan(step, (residual, carry), stacked)
    return residual, outputs.replace(workload=layers_second(outputs.workload))
