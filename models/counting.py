"""What dense attention would execute, from masks alone: no parameters, no arithmetic."""

import jax
import jax.numpy as jnp

from codesign.gates import Relaxation
from codesign.mechanisms.protocol import (
    Context,
    Hooks,
    Operands,
    Plan,
)
from codesign.models.model import existing_pairs, with_ends
from codesign.models.transformer import block_gemms
from codesign.policy import dense_knobs
from codesign.structure import ModelStructure
from codesign.workload import Workload

DENSE_HOOKS = Hooks()
"""Exact attention beside a host: every hook its default."""


def dense_workload(
    valid: jax.Array,
    structure: ModelStructure,
    *,
    linear_bits: float,
    attention_bits: float,
    densities: dict[str, float] | None = None,
    hooks: Hooks = DENSE_HOOKS,
) -> Workload:
    """Returns the workload of dense attention on examples of given lengths, all layers alike.

    It equals what the hard path counts with mechanism `dense` at these widths.

    Args:
      valid: 1 for tokens that exist, `[B, T]`.
      structure: Sizes of the model.
      linear_bits: Bits of weights and activations of linear layers.
      attention_bits: Bits of Q, K, probabilities and V.
      densities: Fractions of elements that are not zero by site, for machines that skip zeros.
      hooks: How the machine runs attention without its mechanism (`Mechanism.bypass`).

    Returns:
      Leaves `[B, L, ...]`.
    """
    knobs = dense_knobs(
        1, linear_bits=linear_bits, attention_bits=attention_bits, end_sites=structure.end_sites
    )
    one = jnp.ones((), valid.dtype)
    codes = jnp.broadcast_to(
        one, (valid.shape[0], structure.num_heads, valid.shape[1], structure.head_dim)
    )
    context = Context(
        knobs={},
        widths={name: value[0].astype(valid.dtype) for name, value in knobs.layers.items()},
        ranges={},
        relaxation=Relaxation(temperature=one, smoothness=one),
        valid=valid,
        pairs=existing_pairs(valid, structure),
        is_uniform=not structure.is_causal,
        width=structure.width,
    )
    operands = Operands(query=codes, key=codes, value=codes, logit_scale=one, value_scale=one)
    plan = Plan()
    selection, counts = hooks.filter(context, operands, plan, ())
    counts += hooks.execution(context, operands, selection, plan, selection.weights)
    layer = Workload(
        operations=counts.operations,
        rows=counts.rows,
        streams=counts.streams,
        block_gemms=block_gemms(hooks, context, plan, selection.keys, structure),
        end_gemms={},
        head_dim=structure.head_dim,
        densities={
            name: jnp.reshape(one * value, (1,)) for name, value in (densities or {}).items()
        },
    )

    def all_layers(leaf: jax.Array) -> jax.Array:
        return jnp.repeat(leaf[:, None], structure.num_layers, axis=1)

    widths = {name: value.astype(valid.dtype) for name, value in knobs.ends.items()}
    return with_ends(jax.tree.map(all_layers, layer), structure, valid, widths)
