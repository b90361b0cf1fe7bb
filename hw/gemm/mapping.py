"""Mappings of layers onto a dense machine: factors of every loop by level, in time and in space, and the order of loops."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import NDArray

from codesign.errors import UnknownNameError
from codesign.hw.file_faults import near
from codesign.hw.gemm.layer import Layer
from codesign.hw.gemm.machine import MachineStructure
from codesign.hw.gemm.names import INPUTS, OUTPUTS, WEIGHTS, addresses

DATAFLOWS = {"weight_stationary": WEIGHTS, "input_stationary": INPUTS, "output_stationary": OUTPUTS}
"""Dataflows, and the tensor that each leaves in place for as long as it can."""


@struct.dataclass
class Mapping:
    """Mappings of a batch of layers, levels from the innermost outwards.

    Attributes:
      temporal: Iterations of each loop at each level, `[..., L, D]`, at least 1. Those of the outermost level times all
        others are the layer's extents (`complete`).
      spatial: Iterations that run side by side below an instance of the level, `[..., L, D]`, at least 1.
      order: At each level the dimensions from the innermost loop outwards, by place in `dims`, `[..., L, D]`.
      dims: Names of the loop dimensions.
    """

    temporal: jax.Array
    spatial: jax.Array
    order: jax.Array
    dims: tuple[str, ...] = struct.field(pytree_node=False)


def complete(temporal: jax.Array, spatial: jax.Array, order: jax.Array, layer: Layer) -> Mapping:
    """Returns the mapping whose outermost loops do what the inner factors leave of a layer.

    Args:
      temporal: Iterations at all levels but the outermost, `[..., L - 1, D]`.
      spatial: Iterations side by side, `[..., L, D]`.
      order: Loops from the innermost outwards, `[..., L, D]`.
      layer: The layers; its extents `[..., D]`.
    """
    inner = jnp.prod(temporal, axis=-2) * jnp.prod(spatial, axis=-2)
    outermost = (layer.extents / inner)[..., None, :]
    return Mapping(
        temporal=jnp.concatenate([temporal, outermost], axis=-2),
        spatial=spatial,
        order=order,
        dims=layer.dims,
    )


def dataflow_order(name: str, dims: tuple[str, ...]) -> NDArray[np.int32]:
    """Returns the loops of a dataflow from the innermost outwards, `[D]`: first those that leave its tensor in place.

    Raises:
      UnknownNameError: If there is no such dataflow.
    """
    if name not in DATAFLOWS:
        raise UnknownNameError(f"unknown dataflow `{name}`: {near(name, DATAFLOWS)}")
    moves = np.asarray(addresses(DATAFLOWS[name], dims))
    return np.argsort(moves, kind="stable").astype(np.int32)


def dataflow_orders(dims: tuple[str, ...]) -> NDArray[np.int32]:
    """Returns the orders of all dataflows, `[3, D]`, in the order of `DATAFLOWS`."""
    return np.stack([dataflow_order(name, dims) for name in DATAFLOWS])


def spread_allowed(structure: MachineStructure, dims: tuple[str, ...]) -> NDArray[np.bool_]:
    """Returns whether a loop may run side by side below a level, `[L, D]`."""
    return np.asarray([[dim in level.spreads for dim in dims] for level in structure.levels])


def tile_allowed(structure: MachineStructure, dims: tuple[str, ...]) -> NDArray[np.bool_]:
    """Returns whether a loop may have iterations at a level, `[L, D]`."""
    return np.asarray(
        [[level.tiles is None or dim in level.tiles for dim in dims] for level in structure.levels]
    )
