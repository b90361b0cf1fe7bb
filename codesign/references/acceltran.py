"""DynaTran of AccelTran in integers: activations whose magnitude does not exceed a threshold become 0.

References:
  Tuli, Jha, "AccelTran", IEEE TCAD 42(11), 2023, arXiv 2302.14705. Thresholds as codes of each site are ours.
"""

import numpy as np

from codesign.references.integers import EXACT_LIMIT, Integers
from codesign.references.protocol import Layer, LayerTensors, Reference, Shapes
from codesign.structure import ModelStructure

PRUNED_SITES = (
    *("query", "key", "value", "scores", "probabilities", "out"),
    *("attention_branch", "gelu", "ffn_branch"),
)
"""Sites in the order of the array `threshold`."""


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shape of the thresholds, one per layer and site."""
    return {"threshold": (structure.num_layers, len(PRUNED_SITES))}


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shapes of the pruned tensors that other mechanisms leave unnamed."""
    rows = (structure.num_layers, batch_size, num_tokens)
    return {
        "raw_scores": (*rows[:2], structure.num_heads, num_tokens, num_tokens),
        "attention_branch": (*rows, structure.width),
        "gelu": (*rows, structure.hidden),
        "ffn_branch": (*rows, structure.width),
    }


def prune(layer: Layer, x: Integers, site: str) -> Integers:
    """Returns `x` with 0 for every code whose magnitude does not exceed the threshold of its site."""
    if site not in PRUNED_SITES:
        return x
    return np.where(np.abs(x) > layer["threshold"][PRUNED_SITES.index(site)], x, 0)


def prune_activation(layer: Layer, x: Integers, site: str, planned: LayerTensors) -> Integers:
    """Returns what enters `site`, pruned as `prune` does."""
    del planned
    return prune(layer, x, site)


def prune_output(layer: Layer, y: Integers, site: str, planned: LayerTensors) -> Integers:
    """Returns what leaves, pruned as `prune` does."""
    del planned
    return prune(layer, y, site)


acceltran = Reference(
    name="acceltran",
    layer_shapes=layer_shapes,
    tensor_shapes=tensor_shapes,
    decision_tensors=(
        *("query", "key", "value", "raw_scores", "probabilities", "context"),
        *("attention_branch", "gelu", "ffn_branch"),
    ),
    ranges={"threshold": (0, EXACT_LIMIT)},
    on_activation=prune_activation,
    on_output=prune_output,
)
