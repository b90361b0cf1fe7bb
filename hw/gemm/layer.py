"""Dense layers as nests of loops: sizes, strides and widths as arrays, one layer or a batch.

`out[n, k, p, q] += w[k, c, r, s] * in[n, c, p * stride + r, q * stride + s]`. A matrix product has P (rows), C (reduction)
and K (columns) alone.
"""

import jax
import jax.numpy as jnp
from flax import struct

from codesign.hw.gemm.names import INPUTS, MATMUL, OUTPUTS, PARTIAL, STRIDED, WEIGHTS, addresses


@struct.dataclass
class Layer:
    """Dense layers.

    Attributes:
      extents: Iterations of each loop dimension, `[..., D]` in the order of `dims`.
      stride: Steps of the input's rows and columns per step of P and Q, `[..., 2]`.
      bits: Widths in bit of `weights`, `inputs`, `outputs` and `partial` (sums), `[...]` or scalars.
      dims: Names of the loop dimensions.
    """

    extents: jax.Array
    stride: jax.Array
    bits: dict[str, jax.Array]
    dims: tuple[str, ...] = struct.field(pytree_node=False)

    def extent(self, dim: str) -> jax.Array:
        """Returns the iterations of a dimension, `[...]`."""
        return self.extents[..., self.dims.index(dim)]

    def step(self, tensor: str, dim: str) -> jax.Array | float:
        """Returns the elements of a tensor by which an iteration of a dimension moves along its axis, `[...]`."""
        is_strided = tensor == INPUTS and dim in STRIDED
        return self.stride[..., STRIDED.index(dim)] if is_strided else 1.0

    @property
    def macs(self) -> jax.Array:
        """Multiplications, `[...]`."""
        return jnp.prod(self.extents, axis=-1)

    @property
    def num_outputs(self) -> jax.Array:
        """Elements of the output, `[...]`."""
        addressing = jnp.asarray(addresses(OUTPUTS, self.dims))
        return jnp.prod(jnp.where(addressing, self.extents, 1.0), axis=-1)


def widths(
    *, weights: float = 8.0, inputs: float = 8.0, outputs: float = 8.0, partial: float = 32.0
) -> dict[str, jax.Array]:
    """Returns widths of operands, results and partial sums, bit, as scalars."""
    values = {WEIGHTS: weights, INPUTS: inputs, OUTPUTS: outputs, PARTIAL: partial}
    return {name: jnp.asarray(value, float) for name, value in values.items()}


def matmul(
    rows: jax.Array | float,
    inner: jax.Array | float,
    outer: jax.Array | float,
    bits: dict[str, jax.Array] | None = None,
) -> Layer:
    """Returns the product `out[rows, outer] = in[rows, inner] w[inner, outer]`, sizes `[...]`.

    Widths are 8 bit, and 32 bit of partial sums, unless `bits` says otherwise.
    """
    parts = [jnp.asarray(part, float) for part in (rows, inner, outer)]
    extents = jnp.stack(jnp.broadcast_arrays(*parts), axis=-1)
    return Layer(
        extents=extents,
        stride=jnp.ones((*extents.shape[:-1], len(STRIDED))),
        bits=widths() if bits is None else bits,
        dims=MATMUL,
    )
