"""Keys predicted before they exist, in integers: what SOFA and LAPA share.

References:
  Wang et al., "SOFA", MICRO 2024, arXiv 2407.10416. Requantisation by column is ours.
"""

import numpy as np

from codesign.references.integers import (
    Booleans,
    Integers,
    estimated_operand,
    exact_matmul,
    leading_one,
)
from codesign.references.protocol import Layer, LayerTensors
from codesign.structure import ModelStructure


def predict_keys(
    structure: ModelStructure, layer: Layer, inputs: Integers, exists: Booleans, carry: LayerTensors
) -> LayerTensors:
    """Returns the predicted keys, `[B, H, S, d]`, from what enters the product `qkv`, `[B, T, D]`."""
    del exists, carry
    columns = np.split(layer["qkv_weight"], 3, axis=-1)[1]
    sums = exact_matmul(inputs, leading_one(columns))
    return {"predicted_key": estimated_operand(layer, sums, 1, structure.num_heads)}
