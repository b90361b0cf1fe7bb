"""What the hardware would execute: counts with the bits of both operands, differentiable in the policy.

A `Workload` holds five kinds of facts, all per example, so that padding and the make-up of a batch do not matter:

- `operations`: scalar operations of the attention engine, keyed `stage.kind`;
- `gemms`: dense matrix products, keyed by linear site;
- `rows`: how many keys each query row sends into a stage (what lock-step lanes need);
- `streams`: vectors moved from and to main memory, as a function of the query block;
- `densities`: fraction of elements of a tensor that are not zero, keyed by site, for machines that skip zeros.

Query block and lanes are sizes of the machine, yet the union of fetched keys and the number of lane segments need the
masks: both are carried on a grid of powers of two, and the cost model interpolates on it.

Every leaf has the batch axis first (length B, or 1 where all examples agree). A block returns its own layer's workload;
`jax.lax.scan` puts the layer axis in front and `layers_second` turns `[L, B, ...]` into `[B, L, ...]`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from codesign import gates
from codesign.vocabulary import KINDS, LINEAR_SITES, STAGES, check_key

__all__ = [
    "KINDS",
    "LINEAR_SITES",
    "STAGES",
    "Gemm",
    "Operation",
    "RowStatistics",
    "Stream",
    "Trace",
    "Workload",
    "check_key",
    "fetched_vectors",
    "gemm",
    "grid_levels",
    "layers_second",
    "operation",
    "row_statistics",
    "stream",
]


@struct.dataclass
class Operation:
    """Scalar operations of one kind: `count` `[B, L, H]`; operand widths `bits_a`, `bits_b` `[1, L, 1]` in bit."""

    count: jax.Array
    bits_a: jax.Array
    bits_b: jax.Array


@struct.dataclass
class Gemm:
    """Dense products out[M, N] = x[M, K] w[K, N].

    `rows` (M) `[B, L]`, `inner` (K) and `outer` (N) static; `weight_bits` `[1, L]` in bit;
    `activation_bits` `[1, L]` in bit, or `[B, L]` where rows differ in width (then their mean).
    """

    rows: jax.Array
    activation_bits: jax.Array
    weight_bits: jax.Array
    inner: int = struct.field(pytree_node=False)
    outer: int = struct.field(pytree_node=False)


@struct.dataclass
class RowStatistics:
    """Keys that the query rows of a head send into a stage.

    `segments[..., g]` is the sum over query rows of ceil(keys / 2**g), `[B, L, H, G]`: the steps that lanes taking
    2**g keys at once need. `queries` is the number of query rows `[B, L, H]`; `maximum` the longest row `[B, L, H]`.
    """

    segments: jax.Array
    queries: jax.Array
    maximum: jax.Array


@struct.dataclass
class Stream:
    """Vectors moved between main memory and the chip.

    `vectors[..., g]` is the number of vectors moved when 2**g consecutive queries share a fetch, `[B, L, H, G]`; G is 1
    where the query block does not matter. `bits` `[1, L, 1]` per element, `width` elements per vector. `buffer` names
    the on-chip memory that holds the rows for re-use (empty: none), `resident_bits` `[B, L, 1]` what the whole head
    would occupy there: if all buffers hold their head, the query block is the whole head.
    """

    vectors: jax.Array
    bits: jax.Array
    resident_bits: jax.Array
    width: int = struct.field(pytree_node=False)
    buffer: str = struct.field(pytree_node=False, default="")


@struct.dataclass
class Workload:
    """All counts of a batch; see the module's text for the five fields.

    `head_dim` is the width of one head; `block_gemms` run once per layer, `end_gemms` (`[B, 1]` leaves) once per model;
    `densities` are `[B, L]`, 1 where a site is missing.
    """

    operations: dict[str, Operation]
    rows: dict[str, RowStatistics]
    streams: dict[str, Stream]
    block_gemms: dict[str, Gemm]
    end_gemms: dict[str, Gemm]
    head_dim: int = struct.field(pytree_node=False)
    densities: dict[str, jax.Array] = struct.field(default_factory=dict)


def layers_second(stacked: Workload) -> Workload:
    """Returns the workload that `lax.scan` stacked, `[L, B, ...]`, with the layer axis second, `[B, L, ...]`."""
    result: Workload = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), stacked)
    return result


def operation(count: jax.Array, bits_a: jax.Array | float, bits_b: jax.Array | float) -> Operation:
    """Returns one layer's operation: `count` `[B, H]`, scalar operand widths in bit."""
    dtype = count.dtype
    return Operation(
        count=count,
        bits_a=jnp.reshape(jnp.asarray(bits_a, dtype), (1, 1)),
        bits_b=jnp.reshape(jnp.asarray(bits_b, dtype), (1, 1)),
    )


def gemm(
    rows: jax.Array, inner: int, outer: int, activation_bits: jax.Array, weight_bits: jax.Array
) -> Gemm:
    """Returns one layer's dense product: `rows` `[B]`, scalar widths in bit (activations also `[B]`)."""
    return Gemm(
        rows=rows,
        activation_bits=jnp.reshape(jnp.asarray(activation_bits, rows.dtype), (-1,)),
        weight_bits=jnp.reshape(jnp.asarray(weight_bits, rows.dtype), (1,)),
        inner=inner,
        outer=outer,
    )


def stream(
    vectors: jax.Array,
    bits: jax.Array,
    width: int,
    *,
    buffer: str = "",
    resident_bits: jax.Array | float = 0.0,
) -> Stream:
    """Returns one layer's stream: `vectors` `[B, H, G]`, scalar `bits` per element, `resident_bits` `[B]` or scalar."""
    dtype = vectors.dtype
    resident = jnp.reshape(jnp.asarray(resident_bits, dtype), (-1, 1))
    return Stream(
        vectors=vectors,
        bits=jnp.reshape(jnp.asarray(bits, dtype), (1, 1)),
        resident_bits=resident,
        width=width,
        buffer=buffer,
    )


def grid_levels(length: int) -> int:
    """Returns the number of powers of two from 1 up to the first that is at least `length`."""
    return math.ceil(math.log2(length)) + 1


def row_statistics(keys: jax.Array, valid_rows: jax.Array, num_keys: int) -> RowStatistics:
    """Returns one layer's row statistics.

    The ceil of the segments is straight-through: exact forward, slope 1 backward.

    Args:
      keys: Keys that each query row sends into the stage, `[B, H, T]`; 0 for padded rows.
      valid_rows: 1 for query rows that exist and are computed, `[B, 1, T]` or `[B, H, T]`.
      num_keys: S, which sets the grid.
    """
    sizes = jnp.asarray([2.0**g for g in range(grid_levels(num_keys))], keys.dtype)
    ratio = keys[..., None] / sizes[None, None, None, :]
    segments = jnp.sum(gates.straight_through(jnp.ceil(ratio), ratio), axis=2)
    queries = jnp.broadcast_to(jnp.sum(valid_rows, axis=-1), keys.shape[:2])
    return RowStatistics(segments=segments, queries=queries, maximum=jnp.max(keys, axis=-1))


def fetched_vectors(weights: jax.Array) -> jax.Array:
    """Returns how many key vectors are fetched, by the number of queries that share a fetch.

    For blocks of 2**g queries: the sum over blocks and keys of 1 - prod over the block's queries of (1 - w); exact for
    hard masks, differentiable for soft ones (Energon's union of a query block).

    Args:
      weights: Keep decisions in [0, 1], `[B, H, T, S]`; 0 for padded queries and keys.

    Returns:
      Vectors `[B, H, G]`, G = grid_levels(T).
    """
    levels = grid_levels(weights.shape[2])
    padding = 2 ** (levels - 1) - weights.shape[2]
    unwanted = jnp.pad(1.0 - weights, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=1.0)
    fetched = [jnp.sum(1.0 - unwanted, axis=(2, 3))]
    for _ in range(levels - 1):
        unwanted = unwanted[:, :, 0::2] * unwanted[:, :, 1::2]
        fetched.append(jnp.sum(1.0 - unwanted, axis=(2, 3)))
    return jnp.stack(fetched, axis=-1)


@struct.dataclass
class Trace:
    """The keep decisions of a batch for the simulator, not differentiable.

    `packed` holds `numpy.packbits` of the masks along keys, uint8 `[L, B, H, R, T, ceil(S / 8)]`: after each round, the
    last one being what attention runs on. `valid` bool `[B, S]`. `bits` maps a knob or site to its deployed width `[L]`
    or `[L, R]`.
    """

    packed: np.ndarray
    valid: np.ndarray
    num_keys: int
    head_dim: int
    bits: dict[str, np.ndarray]

    def keep(self, layer: int) -> np.ndarray:
        """Returns one layer's masks, bool `[B, H, R, T, S]`."""
        return np.unpackbits(self.packed[layer], axis=-1, count=self.num_keys).astype(bool)
