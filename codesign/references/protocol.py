"""What a NumPy reader of a deployment needs to know of a mechanism; each default is that of `dense`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from codesign.errors import ExportError
from codesign.references.integers import Booleans, Integers
from codesign.structure import ModelStructure

Shapes: TypeAlias = dict[str, tuple[int, ...]]
Layer: TypeAlias = Mapping[str, Integers]
"""Arrays of one layer by name, without the layer axis."""
LayerTensors: TypeAlias = dict[str, npt.NDArray[Any]]


def no_layers(structure: ModelStructure) -> Shapes:
    """Returns no arrays: nothing is stored beyond what every deployment holds."""
    del structure
    return {}


def no_tensors(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns no tensors: nothing is computed beyond what every model computes."""
    del structure, batch_size, num_tokens
    return {}


def check_no_rounds(structure: ModelStructure, layers: Mapping[str, npt.NDArray[Any]]) -> None:
    """Checks that a mechanism without a filter has no rounds; raises `ExportError`."""
    del layers
    if structure.num_rounds:
        raise ExportError(
            f"`num_rounds` must be 0 for `{structure.mechanism}`, which has no rounds, "
            f"got {structure.num_rounds}"
        )


def check_rising_rounds(structure: ModelStructure, layers: Mapping[str, npt.NDArray[Any]]) -> None:
    """Checks that there is a round and that keys gain bits from round to round; raises `ExportError`."""
    if structure.num_rounds < 1:
        raise ExportError(f"`num_rounds` must be at least 1 for `{structure.mechanism}`, got 0")
    if np.any(np.diff(np.asarray(layers["key_bits"], np.int64), axis=-1) < 1):
        raise ExportError("array `layers/key_bits` must rise from round to round")


def no_carry(structure: ModelStructure, batch_size: int, num_tokens: int) -> LayerTensors:
    """Remembers nothing from layer to layer."""
    del structure, batch_size, num_tokens
    return {}


def plan_nothing(
    structure: ModelStructure, layer: Layer, inputs: Integers, exists: Booleans, carry: LayerTensors
) -> LayerTensors:
    """Predicts nothing."""
    del structure, layer, inputs, exists, carry
    return {}


def keep_existing(
    layer: Layer, query: Integers, key: Integers, exists: Booleans, planned: LayerTensors
) -> tuple[Booleans, LayerTensors]:
    """Keeps every pair that exists."""
    del layer, planned
    return np.broadcast_to(exists, (*query.shape[:-1], key.shape[-2])), {}


def keep_values(layer: Layer, x: Integers, site: str, planned: LayerTensors) -> Integers:
    """Leaves a tensor as it is."""
    del layer, site, planned
    return x


def keep_probabilities(
    layer: Layer, probabilities: Integers, kept: Booleans, planned: LayerTensors
) -> tuple[Integers, LayerTensors]:
    """Leaves probabilities as they are."""
    del layer, kept, planned
    return probabilities, {}


def keep_carry(
    layer: Layer, carry: LayerTensors, tensors: LayerTensors, exists: Booleans
) -> LayerTensors:
    """Leaves the carry as it is."""
    del layer, tensors, exists
    return carry


def keep_outputs(layer: Layer, y: Integers, site: str, planned: LayerTensors) -> Integers:
    """Leaves a tensor as it is."""
    del layer, site, planned
    return y


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The integer path of a mechanism.

    Attributes:
      name: The registry's name.
      layer_shapes: Shapes of the mechanism's own arrays of the group `layers`, the layer axis first.
      tensor_shapes: Shapes of its own tensors, given the structure, examples B and tokens T.
      decision_tensors: Tensors of which each element is a decision to keep or to drop.
      ranges: Lowest and highest legal value of its own arrays.
      check: Raises `ExportError` if its arrays or the structure break another rule.
      start: From the structure, examples and tokens to what is carried from layer to layer.
      plan: From the structure, one layer's arrays, what enters `qkv`, `[B, T, D]`, the pairs that exist, and the carry, to
        tensors of its own; `tokens` `[B, T]` among them are those that live on.
      filter: From one layer's arrays, query `[B, H, T, d]`, key `[B, H, S, d]`, the pairs that exist, `[B, 1, T, S]`,
        and the planned tensors, to the kept pairs `[B, H, T, S]` and more tensors without the layer axis; `raw_scores`
        among them are what the softmax takes instead of query times key.
      on_probabilities: From one layer's arrays, probabilities `[B, H, T, S]`, the kept pairs and the planned tensors to
        what becomes of the probabilities, and more tensors.
      carry: From one layer's arrays, the carry, all its tensors and the pairs that exist to the next layer's carry.
      on_activation: What becomes of a tensor that enters `site`, given one layer's arrays and the planned tensors.
      on_output: What becomes of what leaves `attention` (heads side by side, `[B, T, H*d]`) or a branch
        (`attention_branch`, `ffn_branch`), given one layer's arrays and the planned tensors.
    """

    name: str
    layer_shapes: Callable[[ModelStructure], Shapes] = no_layers
    tensor_shapes: Callable[[ModelStructure, int, int], Shapes] = no_tensors
    decision_tensors: tuple[str, ...] = ()
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    check: Callable[[ModelStructure, Mapping[str, npt.NDArray[Any]]], None] = check_no_rounds
    start: Callable[[ModelStructure, int, int], LayerTensors] = no_carry
    plan: Callable[[ModelStructure, Layer, Integers, Booleans, LayerTensors], LayerTensors] = (
        plan_nothing
    )
    filter: Callable[
        [Layer, Integers, Integers, Booleans, LayerTensors], tuple[Booleans, LayerTensors]
    ] = keep_existing
    on_probabilities: Callable[
        [Layer, Integers, Booleans, LayerTensors], tuple[Integers, LayerTensors]
    ] = keep_probabilities
    carry: Callable[[Layer, LayerTensors, LayerTensors, Booleans], LayerTensors] = keep_carry
    on_activation: Callable[[Layer, Integers, str, LayerTensors], Integers] = keep_values
    on_output: Callable[[Layer, Integers, str, LayerTensors], Integers] = keep_outputs
