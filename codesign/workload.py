"""What the hardware would execute: counts with the bits of both operands, differentiable in the policy.

A `Workload` holds five kinds of facts, all per example, so that padding and the make-up of a batch do not matter:

- `operations`: scalar operations of the attention engine, keyed `stage.kind`;
- `gemms`: dense matrix products, keyed by linear site;
- `rows`: how many keys each query row sends into a stage (what lock-step lanes need);
- `streams`: vectors moved from and to main memory, as a function of the query block;
- `densities`: fraction of elements of a tensor that are not zero, keyed by site, for machines that skip zeros; and how the
  products without a zero lie in `tiles`, keyed by product.

Query block and lanes are sizes of the machine, yet the union of fetched keys and the number of lane segments need the
masks: both are carried on a grid of powers of two, and the cost model interpolates on it.

Every leaf has the batch axis first (length B, or 1 where all examples agree). A block returns its own layer's workload;
`jax.lax.scan` puts the layer axis in front and `layers_second` turns `[L, B, ...]` into `[B, L, ...]`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from codesign import gates
from codesign.backward import kept
from codesign.tile_statistics import TileStatistics
from codesign.vocabulary import KINDS, LINEAR_SITES, STAGES, check_key

SERIAL_BITS = 12.0
"""Planes of a key that make a product, where it arrives bit by bit (BitStopper, arXiv 2512.06457)."""

PORTIONS = 8
"""Equal portions of a head's rows, in order, whose keys are counted apart: late rows may be longer than early ones."""

__all__ = [
    "KINDS",
    "LINEAR_SITES",
    "PORTIONS",
    "STAGES",
    "Gemm",
    "NonZero",
    "Operation",
    "RowStatistics",
    "Stream",
    "Trace",
    "Workload",
    "binary_fetched_vectors",
    "check_key",
    "fetched_vectors",
    "gemm",
    "grid_levels",
    "layers_second",
    "nonzero",
    "operation",
    "piece_statistics",
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
    2**g keys at once need. `queries` is the number of query rows `[B, L, H]`; `maximum` the longest row `[B, L, H]`;
    `portions` are the segments of equal portions of the query rows, in order, `[B, L, H, P, G]`.
    """

    segments: jax.Array
    queries: jax.Array
    maximum: jax.Array
    portions: jax.Array


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
    `densities` are `[B, L]`, 1 where a site is missing; where a product is missing in `tiles`, zeros of its operands are
    taken as independent and even.
    """

    operations: dict[str, Operation]
    rows: dict[str, RowStatistics]
    streams: dict[str, Stream]
    block_gemms: dict[str, Gemm]
    end_gemms: dict[str, Gemm]
    head_dim: int = struct.field(pytree_node=False)
    densities: dict[str, jax.Array] = struct.field(default_factory=dict)
    tiles: dict[str, TileStatistics] = struct.field(default_factory=dict)


def attention_macs(workload: Workload) -> jax.Array:
    """Returns the multiplications of exact attention per example, `[B]`; those of predictions are not among them.

    Where nothing is left to read of a key (no stream `key_rest`), products with parts of it are no prediction but the
    score: those with one bit count as a twelfth, as many as make a product (BitStopper).
    """
    operations, total = workload.operations, jnp.zeros(())
    for key, value in operations.items():
        stage, _, kind = key.partition(".")
        if key in ("qk.mac", "pv.mac"):
            total = total + jnp.sum(value.count, axis=(1, 2))
        elif stage.startswith("filter") and kind == "mac" and "key_rest" not in workload.streams:
            share = jnp.where(value.bits_b == 1.0, 1.0 / SERIAL_BITS, 1.0)
            total = total + jnp.sum(value.count * share, axis=(1, 2))
    return total


def all_macs(workload: Workload) -> jax.Array:
    """Returns the multiplications of attention and dense products, inside the blocks and outside, per example, `[B]`."""
    total = attention_macs(workload)
    if "generate.mac" in workload.operations:
        total = total + jnp.sum(workload.operations["generate.mac"].count, axis=(1, 2))
    for product in (*workload.block_gemms.values(), *workload.end_gemms.values()):
        total = total + jnp.sum(product.rows, axis=1) * float(product.inner * product.outer)
    return total


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
    bits: jax.Array | float,
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
    steps = jnp.ceil(gates.detach(keys)[..., None] / sizes[None, None, None, :])
    # The sum before the division: on the way back every row of a head gets the same.
    segments = gates.straight_through(
        jnp.sum(steps, axis=2), jnp.sum(keys, axis=2)[..., None] / sizes[None, None, :]
    )
    shares = _portion_shares(gates.detach(valid_rows), keys)
    in_portions = jnp.einsum("bht,bhtp->bhp", keys, shares)
    portions = gates.straight_through(
        jnp.einsum("bhtg,bhtp->bhpg", steps, shares),
        in_portions[..., None] / sizes[None, None, None, :],
    )
    queries = jnp.broadcast_to(jnp.sum(valid_rows, axis=-1), keys.shape[:2])
    return RowStatistics(
        segments=segments,
        queries=queries,
        maximum=jnp.max(keys, axis=-1),
        portions=portions,
    )


def _portion_shares(valid_rows: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns the share of each row in equal portions of the existing ones, `[B, H, T, P]`; one between two is of both."""
    rows = jnp.broadcast_to(valid_rows, keys.shape).astype(keys.dtype)
    after = jnp.cumsum(rows, axis=-1)
    to_portions = PORTIONS / jnp.maximum(after[..., -1:], 1.0)
    end, length = ((one * to_portions)[..., None] for one in (after, rows))
    bounds = jnp.arange(PORTIONS + 1, dtype=keys.dtype)[None, None, None]
    covered = jnp.minimum(end, bounds[..., 1:]) - jnp.maximum(end - length, bounds[..., :-1])
    return jnp.maximum(covered, 0.0) / jnp.where(length > 0.0, length, 1.0)


def piece_statistics(weights: jax.Array, size: int) -> RowStatistics:
    """Returns one layer's statistics of rows cut into pieces of `size` keys, each a row of its own.

    Args:
      weights: Keep decisions, `[B, H, T, S]`; 0 for keys and queries that do not exist.
      size: Keys of a piece, a power of two; a last one may be shorter.
    """
    missing = -weights.shape[-1] % size
    padded = jnp.pad(weights, ((0, 0), (0, 0), (0, 0), (0, missing)))
    pieces = jnp.sum(jnp.reshape(padded, (*weights.shape[:3], -1, size)), axis=-1)
    keys = jnp.reshape(pieces, (*weights.shape[:2], -1))
    return row_statistics(keys, jnp.ones((1, 1, keys.shape[-1]), keys.dtype), size)


def fetched_vectors(
    weights: jax.Array, rows: jax.Array | None = None, *, is_binary: bool = False
) -> jax.Array:
    """Returns how many key vectors are fetched, by the number of queries that share a fetch.

    For blocks of 2**g queries: the sum over blocks and keys of 1 - prod over the block's queries of (1 - w); exact for
    hard masks, differentiable for soft ones (Energon's union of a query block).

    Args:
      weights: Keep decisions in [0, 1], `[B, H, T, S]`; 0 for padded keys.
      rows: 1 for queries that exist, `[B, 1, T]` or `[B, H, T]`; None: all.
      is_binary: Whether all are 0 or 1: the same values and derivatives from packed bits, at a fraction of the time.

    Returns:
      Vectors `[B, H, G]`, G = grid_levels(T).
    """
    if rows is None:
        rows = jnp.ones((1, 1, weights.shape[2]), weights.dtype)
    if is_binary:
        return binary_fetched_vectors(weights, rows)[1]
    weights = weights * rows[..., None]
    levels = grid_levels(weights.shape[2])
    padding = 2 ** (levels - 1) - weights.shape[2]
    unwanted = jnp.pad(1.0 - weights, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=1.0)
    fetched = [jnp.sum(1.0 - unwanted, axis=(2, 3))]
    for _ in range(levels - 1):
        unwanted = unwanted[:, :, 0::2] * unwanted[:, :, 1::2]
        fetched.append(jnp.sum(1.0 - unwanted, axis=(2, 3)))
    return jnp.stack(fetched, axis=-1)


WORD_LEVELS = 4
"""Queries packed into a word: 2**4, so that float32 holds a word exactly."""


def _packed(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns decisions of consecutive queries as bits of words, uint32 `[B, H, W, S]`, the first query lowest.

    A product with powers of two does it: faster than shifts and sums over part of an axis.
    """
    queries = weights.shape[2]
    levels = grid_levels(queries) - 1
    length = 2 ** min(levels, WORD_LEVELS)
    powers = np.zeros((2**levels // length, queries))
    powers[np.arange(queries) // length, np.arange(queries)] = 2.0 ** (np.arange(queries) % length)
    shape = (*weights.shape[:2], *powers.shape)
    words = jnp.matmul(
        jnp.broadcast_to(jnp.asarray(powers, weights.dtype)[None, None] * rows[:, :, None], shape),
        weights,
        precision=jax.lax.Precision.HIGHEST,
    )
    return words.astype(jnp.uint32)


def _block_masks(words: jax.Array, levels: int) -> list[tuple[jax.Array, jax.Array]]:
    """Returns for blocks of 2**g queries where one or more, and where two or more, want a key: all bits of the block.

    Every mask is `[B, H, W, S]` like the words.
    """
    number = words.shape[2]
    some, several = words, jnp.zeros_like(words)
    masks = [(some, several)]
    for level in range(min(levels - 1, WORD_LEVELS)):
        shift = jnp.uint32(2**level)
        lowest = jnp.uint32(sum(1 << bit for bit in range(0, 2**WORD_LEVELS, 2 ** (level + 1))))
        other, others = some >> shift, several >> shift
        some, several = (some | other) & lowest, (several | others | (some & other)) & lowest
        fill = jnp.uint32(2 ** (2 ** (level + 1)) - 1)
        masks.append((some * fill, several * fill))
    if number > 1:
        # Longer blocks: how many want a key, capped at two by word, added up over the block's words by one product.
        lengths = [2 ** (level - WORD_LEVELS) for level in range(WORD_LEVELS + 1, levels)]
        word = np.arange(number)
        same = np.concatenate([word[:, None] // n == word[None, :] // n for n in lengths])
        capped = jnp.minimum(jax.lax.population_count(words), 2).astype(jnp.float32)
        shape = (*words.shape[:2], *same.shape)
        wanted = jnp.matmul(
            jnp.broadcast_to(jnp.asarray(same, jnp.float32)[None, None], shape), capped
        )
        full = jnp.uint32(2 ** (2**WORD_LEVELS) - 1)
        for index in range(len(lengths)):
            own = wanted[:, :, index * number : (index + 1) * number]
            masks.append(tuple((own > least).astype(jnp.uint32) * full for least in (0.5, 1.5)))
    return masks


@jax.custom_vjp
def binary_fetched_vectors(weights: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns decisions as they are, and `fetched_vectors` of them.

    Whatever else uses the decisions should take them from here: on the way back its slope and that of the counts are
    added up in one pass.

    Args:
      weights: Keep decisions, 0 or 1, `[B, H, T, S]`; 0 for padded keys.
      rows: 1 for queries that exist, `[B, 1, T]` or `[B, H, T]`; a constant for differentiation.
    """
    return _binary_forward(weights, rows)[0]


def _binary_forward(
    weights: jax.Array, rows: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    words = kept(_packed(weights, rows))
    masks = _block_masks(words, grid_levels(weights.shape[2]))
    bits = [jnp.sum(jax.lax.population_count(some), axis=(2, 3)) for some, _ in masks]
    sizes = jnp.asarray(2.0 ** np.arange(len(masks)), weights.dtype)
    vectors = jnp.stack(bits, axis=-1).astype(weights.dtype) / sizes[None, None, :]
    return (weights, vectors), (words, rows)


# The true derivative of the product form: 1 to a decision if no other query of its block wants the key, else 0.
def _binary_backward(
    stored: tuple[jax.Array, jax.Array], slopes: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    words, rows = stored
    to_weights, to_vectors = slopes
    queries = rows.shape[2]
    length = 2 ** min(grid_levels(queries) - 1, WORD_LEVELS)
    bit = jnp.asarray(1 << (np.arange(queries) % length), jnp.uint32)[None, None, :, None]
    alone = [
        (words & ~several) | ~(words | some)
        for some, several in _block_masks(words, to_vectors.shape[-1])
    ]

    def added(
        to_weights: jax.Array, to_vectors: jax.Array, alone: list[jax.Array], rows: jax.Array
    ) -> jax.Array:
        to_vectors = to_vectors[:, :, None, :] * rows[..., None]
        for level, flags in enumerate(alone):
            is_alone = (jnp.repeat(flags, length, axis=2)[:, :, :queries] & bit) != 0
            to_weights = to_weights + jnp.where(is_alone, to_vectors[..., level, None], 0.0)
        return to_weights

    def as_it_is(to_weights: jax.Array, *others: Any) -> jax.Array:
        del others
        return to_weights

    # A branch skips what nobody pays for; it also keeps compilers from repeating the above wherever the sum is read.
    has_price = jnp.any(to_vectors != 0.0)
    total = jax.lax.cond(has_price, added, as_it_is, to_weights, to_vectors, alone, rows)
    return total, jnp.zeros_like(rows)


binary_fetched_vectors.defvjp(_binary_forward, _binary_backward)


@struct.dataclass
class NonZero:
    """Which elements of a tensor of every layer are not zero: `numpy.packbits` along its last axis, of `size` elements."""

    packed: np.ndarray
    size: int = struct.field(pytree_node=False)

    def layer(self, index: int) -> np.ndarray:
        """Returns one layer's, bool, the axes of the tensor without that of the layers."""
        return np.unpackbits(self.packed[index], axis=-1, count=self.size).astype(bool)


def nonzero(tensor: np.ndarray) -> NonZero:
    """Returns which elements of a tensor `[L, ...]` are not zero."""
    return NonZero(packed=np.packbits(tensor != 0, axis=-1), size=tensor.shape[-1])


@struct.dataclass
class Trace:
    """The keep decisions of a batch for the simulator, not differentiable.

    `packed` holds `numpy.packbits` of the masks along keys, uint8 `[L, B, H, R, T, ceil(S / 8)]`: after each round, the
    last one being what attention runs on. `valid` bool `[B, S]`. `bits` maps a knob or site to its deployed width `[L]`
    or `[L, R]`. Mechanisms that copy rows add the row whose attention each row takes, `source` `[L, B, H, T]`, the token
    whose feed-forward branch each token takes, `ffn_source` `[L, B, T]`. Where a head may be switched off, `compares` bool
    `[L, H]` says whether it predicts at all. Rows that copy a value are `one_hot` bool `[L, B, H, T]`, tokens whose
    feed-forward branch has all its bits `ffn_full` bool `[L, B, T]`. Mechanisms that skip zeros add what is not zero,
    `nonzero`: what enters a linear layer of a block by site, `[L, B, T, K]`; `query`, `key`, `value` `[L, B, H, T, d]`,
    `scores`, `probabilities` `[L, B, H, T, S]`; kernels, `<site>.weight` `[L, K, N]`. `mechanism` names what decided, which
    says what the rounds are.
    """

    packed: np.ndarray
    valid: np.ndarray
    num_keys: int
    head_dim: int
    bits: dict[str, np.ndarray]
    source: np.ndarray | None = None
    ffn_source: np.ndarray | None = None
    compares: np.ndarray | None = None
    one_hot: np.ndarray | None = None
    ffn_full: np.ndarray | None = None
    nonzero: dict[str, NonZero] = struct.field(default_factory=dict)
    mechanism: str = ""

    def keep(self, layer: int) -> np.ndarray:
        """Returns one layer's masks, bool `[B, H, R, T, S]`."""
        return np.unpackbits(self.packed[layer], axis=-1, count=self.num_keys).astype(bool)
