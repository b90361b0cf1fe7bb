"""The integer path of every mechanism in NumPy, by name: one file each, one line here. Imports no JAX."""

from codesign.errors import UnknownNameError
from codesign.references.a3 import a3
from codesign.references.acceltran import acceltran
from codesign.references.bitserial import bitserial
from codesign.references.dense import dense
from codesign.references.energon import energon
from codesign.references.esact import esact
from codesign.references.fact import fact
from codesign.references.lapa import lapa
from codesign.references.protocol import Reference, Shapes
from codesign.references.sanger import sanger
from codesign.references.sofa import sofa
from codesign.references.spatten import spatten
from codesign.references.topk import topk
from codesign.structure import ModelStructure

REFERENCES = {
    reference.name: reference
    for reference in (
        dense,
        energon,
        acceltran,
        sofa,
        lapa,
        esact,
        topk,
        bitserial,
        sanger,
        a3,
        spatten,
        fact,
    )
}

LAYER_TENSORS = (
    *(
        "predicted_query",
        "predicted_key",
        "tokens",
        "heads",
        "query",
        "key",
        "value",
        "scores",
        "keep",
        "one_hot",
        "ffn_full",
        "source",
        "ffn_source",
        "raw_scores",
        "probabilities",
        "used",
        "context",
    ),
    *("attention_branch", "attended", "gelu", "hidden", "ffn_branch", "residual"),
)
"""Tensors of one layer of any mechanism, in order of computation; stored with the layer axis first."""

BOOLEANS = ("keep", "tokens", "heads", "one_hot", "ffn_full", "used")
"""Tensors of decisions alone."""

TENSORS = ("embedded", *LAYER_TENSORS, "logits")
"""Every tensor of any mechanism, in order of computation."""

__all__ = [
    "BOOLEANS",
    "LAYER_TENSORS",
    "REFERENCES",
    "TENSORS",
    "Reference",
    "layer_shapes",
    "reference_by_name",
    "tensor_names",
    "tensor_shapes",
]


def reference_by_name(name: str) -> Reference:
    """Returns a mechanism's integer path.

    Raises:
      UnknownNameError: If there is none of that name.
    """
    if name not in REFERENCES:
        raise UnknownNameError(
            f"mechanism `{name}` has no integer path: choose one of {', '.join(sorted(REFERENCES))}"
        )
    return REFERENCES[name]


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shape of every array of the group `layers`, the layer axis first."""
    return structure.layer_shapes() | reference_by_name(structure.mechanism).layer_shapes(structure)


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shape of every tensor on which two implementations must agree, in order of computation."""
    own = reference_by_name(structure.mechanism).tensor_shapes(structure, batch_size, num_tokens)
    shapes = structure.tensor_shapes(batch_size, num_tokens) | own
    return {name: shapes[name] for name in sorted(shapes, key=TENSORS.index)}


def tensor_names(structure: ModelStructure) -> tuple[str, ...]:
    """Returns the names of `tensor_shapes`."""
    return tuple(tensor_shapes(structure, 1, 1))
