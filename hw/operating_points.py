"""Workloads in closed form: points of a machine before anything is trained on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from codesign.errors import UnknownNameError
from codesign.hw.spec import AcceleratorSpec
from codesign.workload import (
    Gemm,
    Operation,
    RowStatistics,
    Stream,
    Workload,
    grid_levels,
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A transformer's sizes.

    `embed` and `head` are (rows, inner, outer) of the products outside the blocks, None where the
    model has none.
    """

    num_layers: int
    num_tokens: int
    num_heads: int
    head_dim: int
    width: int
    hidden: int
    embed: tuple[int, int, int] | None = None
    head: tuple[int, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Kept fractions after each round (none: dense attention) and bits, alike in all layers.

    `union` is the fraction of keys that some query of any block wants after each round; None
    estimates it from independent queries.
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


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A named workload."""

    name: str
    workload: Workload


def _block(values: Sequence[float] | np.ndarray, shape: ModelShape) -> jax.Array:
    """Returns one example's leaf `[1, L, 1, G]`, heads summed."""
    row = jnp.asarray(np.asarray(values, float).reshape(1, 1, 1, -1), float)
    return jnp.tile(row, (1, shape.num_layers, 1, 1))


def _scalar(value: float, shape: ModelShape) -> jax.Array:
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
    pairs = queries * tokens
    planes = np.diff(setting.key_bits, prepend=0.0).tolist()

    def operation(count: float, bits_a: float, bits_b: float) -> Operation:
        return Operation(
            count=_scalar(count, shape),
            bits_a=_scalar(bits_a, shape),
            bits_b=_scalar(bits_b, shape),
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
    rows = {"attention": _rows(kept[-1] * tokens, shape)}
    output_bits = setting.activation_bits if setting.output_bits is None else setting.output_bits
    streams = {
        "query": _stream([queries], setting.qk_bits, "", 0.0, shape),
        "output": _stream([queries], output_bits, "", 0.0, shape),
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
        rows[f"filter{index}"] = _rows(kept[index] * tokens, shape)
        streams[f"key{index}"] = _stream(
            _union(kept[index], setting, shape),
            planes[index],
            "key",
            resident * setting.qk_bits,
            shape,
        )
    if rounds:
        operations["threshold.evaluate"] = operation(rounds * queries, 8.0, 8.0)
        operations["index.bits"] = operation(pairs * sum(kept[1:]) * index_bits, 1.0, 1.0)
    fetched = _union(kept[-1], setting, shape)
    rest_bits = setting.qk_bits - (setting.key_bits[-1] if rounds else 0.0)
    streams["key_rest"] = _stream(fetched, rest_bits, "key", resident * setting.qk_bits, shape)
    streams["value"] = _stream(fetched, setting.v_bits, "value", resident * setting.v_bits, shape)
    block, ends = _gemms(shape, setting)
    return Workload(
        operations=operations,
        rows=rows,
        streams=streams,
        block_gemms=block,
        end_gemms=ends,
        head_dim=width,
    )


def _rows(keys: float, shape: ModelShape) -> RowStatistics:
    queries = float(shape.num_tokens * shape.num_heads)
    sizes = 2.0 ** np.arange(grid_levels(shape.num_tokens))
    return RowStatistics(
        segments=_block(queries * np.where(sizes > 1, np.maximum(keys / sizes, 1.0), keys), shape),
        queries=_scalar(queries, shape),
        maximum=_scalar(keys, shape),
    )


def _union(kept: float, setting: Setting, shape: ModelShape) -> np.ndarray:
    """Returns vectors fetched by all heads for blocks of 1, 2, 4, ... queries, `[G]`."""
    sizes = 2.0 ** np.arange(grid_levels(shape.num_tokens))
    independent = 1.0 - (1.0 - kept) ** sizes
    if setting.union is not None and kept < 1.0:
        # A single query wants its own keys; no block wants fewer keys than one query.
        independent = np.where(sizes > 1, max(setting.union, kept), kept)
    blocks: np.ndarray = np.ceil(shape.num_tokens / sizes)
    vectors: np.ndarray = blocks * (shape.num_tokens * shape.num_heads) * independent
    return vectors


def _stream(
    vectors: Sequence[float] | np.ndarray,
    bits: float,
    buffer: str,
    resident_bits: float,
    shape: ModelShape,
) -> Stream:
    return Stream(
        vectors=_block(vectors, shape),
        bits=_scalar(bits, shape),
        resident_bits=_scalar(resident_bits, shape),
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


def published_setting(spec: AcceleratorSpec) -> Setting:
    """Returns kept fractions and bits of the machine's published operating point, linear at 8 bit."""
    point = spec.operating_point
    return Setting(
        kept=tuple(fraction.value for fraction in point.kept),
        union=point.union.value,
        query_bits=point.query_bits.value,
        key_bits=tuple(bits.value for bits in point.key_bits),
        qk_bits=point.qk_bits.value,
        v_bits=point.v_bits.value,
    )


def cheapest_setting(shape: ModelShape, *, num_rounds: int) -> Setting:
    """Returns the cheapest legal setting: one key kept by all queries alike, narrowest operands."""
    one = 1.0 / shape.num_tokens
    return Setting(
        kept=(one,) * num_rounds,
        union=one,
        query_bits=2.0,
        key_bits=tuple(2.0 + index for index in range(num_rounds)),
        qk_bits=8.0,
        v_bits=8.0,
        weight_bits=2.0,
        activation_bits=2.0,
    )


def operating_points(spec: AcceleratorSpec, shape: ModelShape) -> list[OperatingPoint]:
    """Returns dense, the cheapest legal and the published operating point of a machine on a model."""
    published = published_setting(spec)
    settings = {
        "dense": Setting(),
        "cheapest legal": cheapest_setting(shape, num_rounds=len(published.kept)),
        "published": published,
    }
    return [
        OperatingPoint(name=name, workload=workload_from_fractions(shape, setting))
        for name, setting in settings.items()
    ]
