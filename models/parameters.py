"""Parameters of the models, made with Flax NNX modules and handled as plain pytrees.

The blocks are made with `nnx.vmap`, so every leaf of `blocks` has a leading layer axis; `nnx.split` happens once, here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from codesign.structure import ModelStructure


class Block(nnx.Module):
    """Parameters of one pre-norm transformer block."""

    def __init__(self, structure: ModelStructure, *, rngs: nnx.Rngs):
        width, attention = structure.width, structure.attention_width
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * attention, rngs=rngs)
        self.out = nnx.Linear(attention, width, rngs=rngs)
        self.ffn_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, structure.hidden, rngs=rngs)
        self.down = nnx.Linear(structure.hidden, width, rngs=rngs)


class VisionTransformer(nnx.Module):
    """Parameters of a vision transformer: patch embedding, positions, blocks, last norm, head."""

    def __init__(self, structure: ModelStructure, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=structure.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make_blocks(block_rngs: nnx.Rngs) -> Block:
            return Block(structure, rngs=block_rngs)

        self.embed = nnx.Linear(structure.patch_values, structure.width, rngs=rngs)
        shape = (structure.num_tokens, structure.width)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.blocks = make_blocks(rngs)
        self.norm = nnx.LayerNorm(structure.width, rngs=rngs)
        self.head = nnx.Linear(structure.width, structure.num_classes, rngs=rngs)


def init_params(structure: ModelStructure, *, key: jax.Array) -> dict[str, Any]:
    """Returns freshly initialised parameters as nested dictionaries of arrays.

    Args:
      structure: Sizes of the model.
      key: Random key.

    Returns:
      `embed`, `position`, `blocks` (leaves `[L, ...]`), `norm`, `head`.
    """
    _, state = nnx.split(VisionTransformer(structure, rngs=nnx.Rngs(key)))
    params: dict[str, Any] = jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))
    return params
