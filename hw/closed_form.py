"""Workloads in closed form, from fractions that all rows share: exact attention, with or without a filter in rounds."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from codesign.errors import UnknownNameError
from codesign.references.bitserial import CODE_BITS
from codesign.references.sanger import LOW_BITS, PIECE, PROBABILITY_SHIFT
from codesign.references.spatten import LOW_BITS as LOW_BITS_ON_DEMAND
from codesign.vocabulary import SITES
from codesign.workload import (
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


def _block(values: Sequence[float] | np.ndarray, shape: ModelShape) -> jax.Array:
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
    rows = {"attention": _rows(kept[-1], shape)}
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
        rows[f"filter{index}"] = _rows(kept[index], shape)
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


def scored_workload(shape: ModelShape, setting: Setting) -> Workload:
    """Returns one example's workload `[1, L, 1]` on a machine that scores all pairs and keeps the largest of each row.

    `kept` is what is left of a row; without it nothing is selected.
    """
    dense = workload_from_fractions(shape, dataclasses.replace(setting, kept=()))
    rows = {"all": dense.rows["attention"]}
    if not setting.kept:
        every: Workload = dense.replace(rows=dense.rows | rows)  # type: ignore[attr-defined]
        return every
    # A round that sees keys in full leaves what the selection leaves.
    sparse = workload_from_fractions(
        shape, dataclasses.replace(setting, kept=setting.kept[-1:], key_bits=(setting.qk_bits,))
    )
    pairs = dense.operations["softmax.exp"].count
    passes = 2.0 * setting.qk_bits + (shape.head_dim - 1).bit_length() + 1.0
    own = {
        "qk.mac": dense.operations["qk.mac"],
        "select.compare": Operation(
            count=pairs * passes, bits_a=scalar(passes, shape), bits_b=scalar(1.0, shape)
        ),
    }
    kept = {
        name: value
        for name, value in sparse.operations.items()
        if name.partition(".")[0] in ("softmax", "pv", "output")
    }
    result: Workload = sparse.replace(  # type: ignore[attr-defined]
        operations=own | kept, rows=rows | {"attention": sparse.rows["attention"]}
    )
    return result


def serial_workload(shape: ModelShape, setting: Setting) -> Workload:
    """Returns one example's workload `[1, L, 1]` on a machine that takes keys bit by bit and drops them on the way.

    `kept` is what each plane leaves of a row, `key_bits` being 1, 2, ...; without it all planes see all keys. Bits beyond
    those that the machine takes are left out.
    """
    width = int(min(setting.qk_bits, CODE_BITS))
    kept = (setting.kept or (1.0,) * width)[:width]
    planes = dataclasses.replace(
        setting,
        kept=kept,
        query_bits=float(width),
        key_bits=tuple(float(index + 1) for index in range(len(kept))),
    )
    whole = workload_from_fractions(shape, planes)
    dropped = ("qk.mac", "index.bits")
    operations = {
        name: value
        for name, value in whole.operations.items()
        if name not in dropped and not name.endswith(".statistic")
    }
    result: Workload = whole.replace(  # type: ignore[attr-defined]
        operations=operations,
        streams={name: value for name, value in whole.streams.items() if name != "key_rest"},
    )
    return result


def searched_workload(shape: ModelShape, setting: Setting) -> Workload:
    """Returns one example's workload `[1, L, 1]` on a machine that searches candidates and reads all keys and values.

    `kept` are the fractions of candidates and of keys that stay; without it there is no search.
    """
    whole = workload_from_fractions(shape, dataclasses.replace(setting, kept=()))
    rows = {name: whole.rows["attention"] for name in ("all", "scored")}
    if not setting.kept:
        every: Workload = whole.replace(rows=whole.rows | rows)  # type: ignore[attr-defined]
        return every
    queries = float(shape.num_tokens * shape.num_heads)
    steps = 2.0**setting.search_bits
    pairs = whole.operations["softmax.exp"].count
    scored, kept = setting.kept[0], setting.kept[-1]

    def operation(count: jax.Array | float, bits_a: float, bits_b: float) -> Operation:
        return Operation(
            count=jnp.broadcast_to(jnp.asarray(count, float), pairs.shape),
            bits_a=scalar(bits_a, shape),
            bits_b=scalar(bits_b, shape),
        )

    levels = float((shape.head_dim - 1).bit_length())
    qk, wide = setting.qk_bits, 2.0 * setting.qk_bits
    operations = whole.operations | {
        "predict.multiply": operation(2.0 * steps * queries, qk, qk),
        "predict.compare": operation(2.0 * steps * queries * levels, wide, 1.0),
        "threshold.compare": operation(scored * pairs, wide, 1.0),
        "qk.mac": operation(scored * pairs * shape.head_dim, qk, qk),
        "softmax.exp": operation(kept * pairs, qk, qk),
        "pv.mac": operation(kept * pairs * shape.head_dim, qk, setting.v_bits),
    }
    sizes = 2.0 ** np.arange(9)
    searched = RowStatistics(
        segments=_block(queries * np.maximum(steps / sizes, 1.0), shape),
        queries=scalar(queries, shape),
        maximum=scalar(steps, shape),
    )
    rows |= {"scored": _rows(scored, shape), "attention": _rows(kept, shape), "searched": searched}
    result: Workload = whole.replace(operations=operations, rows=rows)  # type: ignore[attr-defined]
    return result


def cascade_workload(shape: ModelShape, setting: Setting) -> Workload:
    """Returns one example's workload `[1, L, 1]` on a machine that prunes tokens and reads low bits on demand.

    `kept` are the fraction of tokens, alike in all layers, of rows that read all bits, and of values that are used; all
    heads stay. Without it nothing is pruned.
    """
    if not setting.kept:
        whole = workload_from_fractions(shape, setting)
        rows = dict.fromkeys(("all", "qk", "used"), whole.rows["attention"])
        every: Workload = whole.replace(rows=whole.rows | rows)  # type: ignore[attr-defined]
        return every
    tokens, low, used = setting.kept
    left = dataclasses.replace(shape, num_tokens=max(1, round(tokens * shape.num_tokens)))
    dense = dataclasses.replace(setting, kept=())
    whole = workload_from_fractions(left, dense)
    high_bits = setting.qk_bits - LOW_BITS_ON_DEMAND
    pairs, queries = (whole.operations[key].count for key in ("softmax.exp", "softmax.reciprocal"))

    def operation(count: jax.Array, bits_a: float, bits_b: float) -> Operation:
        return Operation(count=count, bits_a=scalar(bits_a, shape), bits_b=scalar(bits_b, shape))

    def keys(fraction: float, bits: float) -> Stream:
        vectors = wanted_vectors(fraction, dense, left)
        resident = float(left.num_tokens * shape.head_dim) * setting.qk_bits
        return moved_vectors(vectors, bits, "key", resident, left)

    qk, value = setting.qk_bits, setting.v_bits
    products = pairs * shape.head_dim
    compared = float(left.num_tokens + shape.num_heads)
    operations = {
        "filter0.mac": operation(products, high_bits, high_bits),
        "threshold.compare": operation(queries, 16.0, 1.0),
        "qk.mac": operation(low * products, qk, qk),
        "softmax.exp": operation((1.0 + low) * pairs, qk, qk),
        "softmax.reciprocal": operation((1.0 + low) * queries, qk, qk),
        "select.compare": operation(pairs + compared, qk, 1.0),
        "pv.mac": operation(used * products, qk, value),
        "output.multiply": whole.operations["output.multiply"],
    }
    rows = whole.rows | {
        "all": _rows(1.0, shape),
        "filter0": _rows(1.0, left),
        "qk": _rows(low, left),
        "used": _rows(used, left),
    }
    vectors = wanted_vectors(used, dataclasses.replace(dense, union=setting.union), left)
    resident = float(left.num_tokens * shape.head_dim) * value
    streams = {
        "query": whole.streams["query"],
        "output": whole.streams["output"],
        "key0": keys(1.0, high_bits),
        "key1": keys(low, float(LOW_BITS_ON_DEMAND)),
        "value": moved_vectors(vectors, value, "value", resident, left),
    }
    result: Workload = whole.replace(  # type: ignore[attr-defined]
        operations=operations, rows=rows, streams=streams
    )
    return result


def packed_workload(shape: ModelShape, setting: Setting) -> Workload:
    """Returns one example's workload `[1, L, 1]` on a machine that packs the pairs of a 4-bit mask.

    `kept` is what is left of a row, alike in all its pieces of 64 keys; without it nothing is predicted.
    """
    kept = setting.kept[-1] if setting.kept else 1.0
    low = float(LOW_BITS)
    rounds = dataclasses.replace(
        setting, kept=setting.kept[-1:], query_bits=low, key_bits=(low,) * len(setting.kept[-1:])
    )
    whole = workload_from_fractions(shape, rounds)
    rows = whole.rows | {"packed": _pieces(kept, shape)}
    if not setting.kept:
        every: Workload = whole.replace(rows=rows)  # type: ignore[attr-defined]
        return every
    pairs = whole.operations["filter0.compare"].count

    def operation(bits_a: float, bits_b: float) -> Operation:
        return Operation(count=pairs, bits_a=scalar(bits_a, shape), bits_b=scalar(bits_b, shape))

    dropped = ("filter0.compare", "filter0.statistic", "threshold.evaluate", "index.bits")
    operations = {key: value for key, value in whole.operations.items() if key not in dropped}
    operations |= {
        "filter0.exp": operation(low, low),
        "threshold.compare": operation(float(PROBABILITY_SHIFT), 1.0),
    }
    rest = whole.streams["key_rest"].replace(bits=scalar(setting.qk_bits, shape))  # type: ignore[attr-defined]
    result: Workload = whole.replace(  # type: ignore[attr-defined]
        operations=operations, rows=rows, streams=whole.streams | {"key_rest": rest}
    )
    return result


def _pieces(kept: float, shape: ModelShape) -> RowStatistics:
    """Returns the statistics of pieces of 64 keys, of which every row keeps the same fraction."""
    starts = np.arange(0, shape.num_tokens, PIECE)
    keys = kept * np.clip(row_lengths(shape)[:, None] - starts[None, :], 0, PIECE)
    sizes = 2.0 ** np.arange(grid_levels(PIECE))
    steps = [
        np.sum(np.where(keys > 0, np.maximum(keys / size, 1.0), 0.0) if size > 1 else keys)
        for size in sizes
    ]
    return RowStatistics(
        segments=_block(np.asarray(steps) * shape.num_heads, shape),
        queries=scalar(float(keys.size * shape.num_heads), shape),
        maximum=scalar(float(np.max(keys)), shape),
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


def _rows(kept: float, shape: ModelShape) -> RowStatistics:
    keys = kept * row_lengths(shape)
    sizes = 2.0 ** np.arange(grid_levels(shape.num_tokens))
    steps = [np.sum(np.maximum(keys / size, 1.0) if size > 1 else keys) for size in sizes]
    return RowStatistics(
        segments=_block(np.asarray(steps) * shape.num_heads, shape),
        queries=scalar(float(shape.num_tokens * shape.num_heads), shape),
        maximum=scalar(float(keys[-1]), shape),
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
        vectors=_block(vectors, shape),
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
