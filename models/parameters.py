"""Parameters of the models, made with Flax NNX modules and handled as plain pytrees.

The blocks are made with `nnx.vmap`, so every leaf of `blocks` has a leading layer axis; `nnx.split` happens once, here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from codesign.structure import ModelStructure, PatchInput


class Block(nnx.Module):
    """Parameters of one transformer block."""

    def __init__(self, structure: ModelStructure, *, rngs: nnx.Rngs):
        width, attention = structure.width, structure.attention_width
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * attention, rngs=rngs)
        self.out = nnx.Linear(attention, width, rngs=rngs)
        self.ffn_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, structure.hidden, rngs=rngs)
        self.down = nnx.Linear(structure.hidden, width, rngs=rngs)


class Table(nnx.Module):
    """An embedding table `[rows, width]`, normal with standard deviation 0.02 (BERT, GPT-2, ViT)."""

    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, width)))


class Transformer(nnx.Module):
    """Parameters of a transformer: embedding, positions, blocks, last norm or that of the embedding, pooler, head."""

    def __init__(self, structure: ModelStructure, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=structure.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make_blocks(block_rngs: nnx.Rngs) -> Block:
            return Block(structure, rngs=block_rngs)

        width = structure.width
        if isinstance(structure.input, PatchInput):
            self.embed: nnx.Linear | Table = nnx.Linear(
                structure.input.patch_values, width, rngs=rngs
            )
        else:
            self.embed = Table(structure.input.vocabulary_size, width, rngs=rngs)
        shape = (structure.max_tokens, width)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.blocks = make_blocks(rngs)
        if structure.norm == "pre":
            self.norm = nnx.LayerNorm(width, rngs=rngs)
        else:
            self.embed_norm = nnx.LayerNorm(width, rngs=rngs)
        if structure.pooler != "none":
            self.pool = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, structure.num_outputs, rngs=rngs)


def init_params(structure: ModelStructure, *, key: jax.Array) -> dict[str, Any]:
    """Returns freshly initialised parameters as nested dictionaries of arrays.

    Args:
      structure: Sizes of the model.
      key: Random key.

    Returns:
      `embed` (`kernel` and `bias` of patches, or the `table` of tokens), `position` (its first rows hold the prefix tokens
      too), `blocks` (leaves `[L, ...]`; post-norm, the two norms follow the sums), `norm` (pre-norm) or `embed_norm`
      (post-norm), `pool` (with a pooler), `head`.
    """
    _, state = nnx.split(Transformer(structure, rngs=nnx.Rngs(key)))
    params: dict[str, Any] = jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))
    return params
