"""Workloads in closed form, from fractions that all rows share: exact attention, with or without a filter in rounds."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from codesign.errors import UnknownNameError
from codesign.vocabulary import SITES
from codesign.workload import (
    PORTIONS,
    Gemm,
    Operation,
    RowStatistics,
    Stream,
    Workload,
    grid_levels,
)

_BLOCK_SITES = ("qkv", "out", "up", "down")
_WEIGHT_SITES = tuple(f"{site}.weight" for site in _BLOCK_SITES)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A transformer's sizes.

    `embed` and `head` are (rows, inner, outer) of the products outside the blocks, None where the
    model has none. In a causal model a token attends to itself and to those before it.
    """

    num_layers: int
    num_tokens: int
    num_heads: int
    head_dim: int
    width: int
    hidden: int
    embed: tuple[int, int, int] | None = None
    head: tuple[int, int, int] | None = None
    is_causal: bool = False


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Kept fractions after each round (none: dense attention) and bits, alike in all layers.

    `kept` is a fraction of the keys that a query may attend to. `union` is the fraction of keys that
    some query of any block wants after each round; None estimates it from independent queries.
    `tile_bits` are those of a key's place in its segment; `search_bits` the logarithm of a search's steps;
    `generation_bits` those of tokens and weights from which keys and values are made on demand, None as in linear layers.
    Densities are fractions of elements that are not zero, of all activations and all weights alike.
    """

    kept: tuple[float, ...] = ()
    union: float | None = None
    query_bits: float = 4.0
    key_bits: tuple[float, ...] = (2.0, 4.0)
    qk_bits: float = 16.0
    v_bits: float = 16.0
    weight_bits: float = 8.0
    activation_bits: float = 8.0
    output_bits: float | None = None
    tile_bits: float = 6.0
    search_bits: float = 6.0
    generation_bits: float | None = None
    activation_density: float = 1.0
    weight_density: float = 1.0


def summed_grid(values: Sequence[float] | np.ndarray, shape: ModelShape) -> jax.Array:
    """Returns one example's leaf `[1, L, 1, G]`, heads summed."""
    row = jnp.asarray(np.asarray(values, float).reshape(1, 1, 1, -1), float)
    return jnp.tile(row, (1, shape.num_layers, 1, 1))


def scalar(value: float, shape: ModelShape) -> jax.Array:
    """Returns a number for every layer, `[1, L, 1]`."""
    return jnp.full((1, shape.num_layers, 1), value, float)


def workload_from_fractions(shape: ModelShape, setting: Setting) -> Workload:
    """Returns one example's workload `[1, L, 1]`, the heads of a layer summed.

    Every query row keeps the same number of keys, not necessarily whole: a step of several lanes
    counts at least once per row. Without `kept` the attention is dense.

    Raises:
      UnknownNameError: If there are not as many key widths as kept fractions.
    """
    kept = (1.0, *setting.kept)
    rounds = len(setting.kept)
    if rounds and len(setting.key_bits) != rounds:
        raise UnknownNameError(
            f"`key_bits` must have one width per round of `kept`, got {len(setting.key_bits)} for "
            f"{rounds}: give {rounds}"
        )
    tokens, width = shape.num_tokens, shape.head_dim
    queries = float(tokens * shape.num_heads)
    pairs = float(shape.num_heads * np.sum(row_lengths(shape)))
    planes = np.diff(setting.key_bits, prepend=0.0).tolist()

    def operation(count: float, bits_a: float, bits_b: float) -> Operation:
        return Operation(
            count=scalar(count, shape),
            bits_a=scalar(bits_a, shape),
            bits_b=scalar(bits_b, shape),
        )

    final = kept[-1] * pairs
    index_bits = float(grid_levels(tokens) - 1)
    operations = {
        "qk.mac": operation(final * width, setting.qk_bits, setting.qk_bits),
        "softmax.exp": operation(final, setting.qk_bits, setting.qk_bits),
        "pv.mac": operation(final * width, setting.qk_bits, setting.v_bits),
        "softmax.reciprocal": operation(queries, setting.qk_bits, setting.qk_bits),
        "output.multiply": operation(queries * width, setting.qk_bits, setting.v_bits),
    }
    rows = {"attention": kept_rows(kept[-1], shape)}
    output_bits = setting.activation_bits if setting.output_bits is None else setting.output_bits
    streams = {
        "query": moved_vectors([queries], setting.qk_bits, "", 0.0, shape),
        "output": moved_vectors([queries], output_bits, "", 0.0, shape),
    }
    resident = float(tokens * width)
    for index in range(rounds):
        score_bits = setting.query_bits + setting.key_bits[index]
        alive = kept[index] * pairs
        operations[f"filter{index}.mac"] = operation(
            alive * width, setting.query_bits, planes[index]
        )
        operations[f"filter{index}.statistic"] = operation(alive, score_bits, score_bits)
        operations[f"filter{index}.compare"] = operation(alive, score_bits, score_bits)
        rows[f"filter{index}"] = kept_rows(kept[index], shape)
        streams[f"key{index}"] = moved_vectors(
            wanted_vectors(kept[index], setting, shape),
            planes[index],
            "key",
            resident * setting.qk_bits,
            shape,
        )
    if rounds:
        operations["threshold.evaluate"] = operation(rounds * queries, 8.0, 8.0)
        operations["index.bits"] = operation(pairs * sum(kept[1:]) * index_bits, 1.0, 1.0)
    fetched = wanted_vectors(kept[-1], setting, shape)
    rest_bits = setting.qk_bits - (setting.key_bits[-1] if rounds else 0.0)
    streams["key_rest"] = moved_vectors(
        fetched, rest_bits, "key", resident * setting.qk_bits, shape
    )
    streams["value"] = moved_vectors(
        fetched, setting.v_bits, "value", resident * setting.v_bits, shape
    )
    block, ends = _gemms(shape, setting)
    return Workload(
        operations=operations,
        rows=rows,
        streams=streams,
        block_gemms=block,
        end_gemms=ends,
        head_dim=width,
        densities=_densities(shape, setting),
    )


def _densities(shape: ModelShape, setting: Setting) -> dict[str, jax.Array]:
    """Returns the densities that differ from 1, `[1, L]`."""
    densities: dict[str, jax.Array] = {}
    for sites, density in (
        (SITES, setting.activation_density),
        (_WEIGHT_SITES, setting.weight_density),
    ):
        if density != 1.0:
            densities |= {site: scalar(density, shape)[..., 0] for site in sites}
    return densities


def row_lengths(shape: ModelShape) -> np.ndarray:
    """Returns the keys that each query of a head may attend to, `[T]`."""
    tokens = shape.num_tokens
    return np.arange(1.0, tokens + 1.0) if shape.is_causal else np.full(tokens, float(tokens))


def kept_rows(kept: float, shape: ModelShape) -> RowStatistics:
    """Returns the statistics of rows that each keep a fraction of their keys, heads summed."""
    keys = kept * row_lengths(shape)
    sizes = 2.0 ** np.arange(grid_levels(shape.num_tokens))
    steps = np.where(sizes > 1.0, np.maximum(keys[:, None] / sizes, 1.0), keys[:, None])
    return row_statistics(steps, float(keys[-1]), shape)


def row_statistics(steps: np.ndarray, longest: float, shape: ModelShape) -> RowStatistics:
    """Returns the statistics of rows, heads summed, `[1, L, 1, ...]`.

    Args:
      steps: What each row of a head takes on lanes of 1, 2, 4, ... keys, `[N, G]`.
      longest: Keys of the longest row.
      shape: The model.
    """
    number = len(steps)
    bounds = np.linspace(0.0, number, PORTIONS + 1)
    passed = np.vstack([np.zeros_like(steps[:1]), np.cumsum(steps, axis=0)])
    by_level = [np.diff(np.interp(bounds, np.arange(number + 1), one)) for one in passed.T]
    portions = np.stack(by_level, axis=-1) * shape.num_heads
    return RowStatistics(
        segments=summed_grid(np.sum(steps, axis=0) * shape.num_heads, shape),
        queries=scalar(float(number * shape.num_heads), shape),
        maximum=scalar(longest, shape),
        portions=jnp.tile(jnp.asarray(portions, float), (1, shape.num_layers, 1, 1, 1)),
    )


def wanted_vectors(kept: float, setting: Setting, shape: ModelShape) -> np.ndarray:
    """Returns vectors fetched by all heads for blocks of 1, 2, 4, ... queries, `[G]`."""
    tokens = shape.num_tokens
    vectors = []
    for level in range(grid_levels(tokens)):
        size = 2**level
        starts = np.arange(0, tokens, size)
        # A last block that is not full is counted as if it were, where all rows are alike.
        block = np.minimum(size, tokens - starts) if shape.is_causal else np.full(len(starts), size)
        reach = starts + block if shape.is_causal else np.full(len(starts), tokens)
        if setting.union is not None and kept < 1.0:
            # A single query wants its own keys; no block wants fewer keys than one query.
            fraction = max(setting.union, kept) if size > 1 else kept
            wanted = reach * fraction
        else:
            # Keys before the block are seen by all its queries, those inside by the later ones only.
            missed = 1.0 - kept
            seen_by_all = starts if shape.is_causal else reach
            wanted = seen_by_all * (1.0 - missed**block)
            if shape.is_causal:
                inside = np.cumsum(1.0 - missed ** np.arange(1.0, size + 1.0))
                wanted = wanted + inside[block - 1]
        vectors.append(np.sum(wanted) * shape.num_heads)
    return np.asarray(vectors)


def moved_vectors(
    vectors: Sequence[float] | np.ndarray,
    bits: float,
    buffer: str,
    resident_bits: float,
    shape: ModelShape,
) -> Stream:
    """Returns the stream of a number of vectors by query block, `[G]`, heads summed, each a head wide."""
    return Stream(
        vectors=summed_grid(vectors, shape),
        bits=scalar(bits, shape),
        resident_bits=scalar(resident_bits, shape),
        width=shape.head_dim,
        buffer=buffer,
    )


def _gemms(shape: ModelShape, setting: Setting) -> tuple[dict[str, Gemm], dict[str, Gemm]]:
    def gemm(rows: int, inner: int, outer: int, layers: int) -> Gemm:
        return Gemm(
            rows=jnp.full((1, layers), rows, float),
            activation_bits=jnp.full((1, layers), setting.activation_bits, float),
            weight_bits=jnp.full((1, layers), setting.weight_bits, float),
            inner=inner,
            outer=outer,
        )

    tokens, width, hidden = shape.num_tokens, shape.width, shape.hidden
    attended = shape.num_heads * shape.head_dim
    products = {
        "qkv": (width, 3 * attended),
        "out": (attended, width),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    block = {
        site: gemm(tokens, inner, outer, shape.num_layers)
        for site, (inner, outer) in products.items()
    }
    ends = {
        site: gemm(*product, 1)
        for site, product in (("embed", shape.embed), ("head", shape.head))
        if product is not None
    }
    return block, ends
