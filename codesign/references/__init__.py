"""The integer path of every mechanism in NumPy, by name: one file each, named as the mechanism. Imports no JAX."""

from importlib import import_module

from codesign.errors import UnknownNameError
from codesign.references.protocol import Reference, Shapes
from codesign.structure import ModelStructure
from codesign.vocabulary import MECHANISM_OPERATIONS

REFERENCES: dict[str, Reference] = {
    name: getattr(import_module(f"{__name__}.{name}"), name) for name in MECHANISM_OPERATIONS
}
"""The object `x` of the file `x.py` for each mechanism `x` of the registry."""

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
