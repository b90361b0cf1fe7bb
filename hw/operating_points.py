"""Workloads in closed form: points of a machine before anything is trained on it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from codesign.errors import UnknownNameError
from codesign.hw.quantities import Quantity
from codesign.hw.spec import AcceleratorSpec
from codesign.mechanisms.lapa import CODE_BITS, QUERY_CODE_BITS as SHORT_QUERY_CODE_BITS
from codesign.mechanisms.on_demand import WEIGHT_CODE_BITS
from codesign.mechanisms.sofa import QUERY_CODE_BITS, SCORE_BITS
from codesign.segments import SORTER_INPUTS, SORTER_OUTPUTS
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
    `tile_bits` are those of a key's place in its segment; `generation_bits` those of tokens and weights from
    which keys and values are made on demand, None as in linear layers.
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
    generation_bits: float | None = None
    activation_density: float = 1.0
    weight_density: float = 1.0


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
    pairs = float(shape.num_heads * np.sum(_row_lengths(shape)))
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
    rows = {"attention": _rows(kept[-1], shape)}
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
        rows[f"filter{index}"] = _rows(kept[index], shape)
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
        densities=_densities(shape, setting),
    )


def on_demand_workload(shape: ModelShape, setting: Setting, *, sorts: bool) -> Workload:
    """Returns one example's workload `[1, L, H]` on a machine that predicts keys and makes them on demand.

    Args:
      shape: The model.
      setting: `kept` are the fractions after the segments and after the radius, of a segment as of a row, or after each
        round; `union` the tokens that some query of a head, and of any head, wants. Without `kept` nothing is predicted,
        and all keys are made.
      sorts: Whether segments are sorted (SOFA); else rounds see ever more planes of the keys (LAPA).
    """
    dense = workload_from_fractions(
        shape,
        dataclasses.replace(setting, kept=setting.kept[-1:], key_bits=(8.0,) * bool(setting.kept)),
    )
    tokens, head_dim, heads = shape.num_tokens, shape.head_dim, shape.num_heads
    kept = setting.kept[-1] if setting.kept else 1.0
    union = 1.0 if setting.union is None else max(setting.union, kept)
    wanted = tokens * (union if setting.kept else 1.0)
    queries, pairs = float(tokens * heads), float(heads * np.sum(_row_lengths(shape)))
    made_bits = setting.generation_bits
    token_bits = setting.activation_bits if made_bits is None else made_bits
    weight_bits = setting.weight_bits if made_bits is None else made_bits
    blocks = np.ceil(tokens / 2.0 ** np.arange(grid_levels(tokens))) * heads * head_dim

    def operation(count: float, bits_a: float, bits_b: float) -> Operation:
        return Operation(
            count=_scalar(count, shape),
            bits_a=_scalar(bits_a, shape),
            bits_b=_scalar(bits_b, shape),
        )

    def stream(vectors: Sequence[float] | np.ndarray, bits: float, width: int) -> Stream:
        moved = _stream(vectors, bits, "", 0.0, shape)
        return Stream(moved.vectors, moved.bits, moved.resident_bits, width)

    cycles, joins = (
        _segments(kept, setting, shape) * heads if sorts and setting.kept else (0.0, 0.0)
    )
    qk_bits, v_bits = setting.qk_bits, setting.v_bits
    made = 2.0 * wanted * heads * shape.width * head_dim
    operations = {
        "generate.mac": operation(made, token_bits, weight_bits),
        "qk.mac": dense.operations["qk.mac"],
        "softmax.exp": operation(kept * pairs + joins, qk_bits, qk_bits),
        "pv.mac": dense.operations["pv.mac"],
        "output.divide": operation(queries * head_dim, qk_bits, v_bits),
    }
    streams = {
        "generate_tokens": stream([wanted], token_bits, shape.width),
        "generate_weights": stream(2.0 * blocks, weight_bits, shape.width),
        "query": dense.streams["query"],
        "output": dense.streams["output"],
    }
    query_bits = QUERY_CODE_BITS if sorts else SHORT_QUERY_CODE_BITS
    sorted_bits = SCORE_BITS + 1.0
    if setting.kept:
        predicted = float(queries * shape.width * head_dim)
        operations |= {
            "predict.shift_add": operation(predicted, setting.activation_bits, WEIGHT_CODE_BITS),
            "encode.encode": operation(queries * head_dim, qk_bits, query_bits),
        }
        streams["tokens"] = stream([float(tokens)], setting.activation_bits, shape.width)
        streams["weight_codes"] = stream(blocks, WEIGHT_CODE_BITS, shape.width)
    if setting.kept and sorts:
        operations |= {
            "filter0.shift_add": operation(pairs * head_dim, qk_bits, query_bits),
            "select.compare": operation(cycles, sorted_bits, sorted_bits),
            "threshold.compare": operation(setting.kept[0] * pairs, sorted_bits, sorted_bits),
            "softmax.add": operation(kept * pairs + joins * (head_dim + 1), qk_bits, qk_bits),
            "softmax.compare": operation(joins, qk_bits, qk_bits),
            "softmax.multiply": operation(joins * (head_dim + 1), qk_bits, qk_bits),
        }
    elif setting.kept:
        # The sign is in no plane.
        planes = np.diff(setting.key_bits, prepend=1.0).tolist()
        for index, (alive, plane) in enumerate(zip((1.0, *setting.kept), planes, strict=False)):
            scores = alive * pairs
            operations |= {
                f"filter{index}.shift_add": operation(scores * head_dim, plane, query_bits),
                f"filter{index}.statistic": operation(scores, CODE_BITS, CODE_BITS),
                f"filter{index}.compare": operation(scores, CODE_BITS, CODE_BITS),
            }
    gemms = dict(dense.block_gemms)
    gemms["qkv"] = dataclasses.replace(gemms["qkv"], outer=heads * head_dim)

    def apart(total: jax.Array) -> jax.Array:
        return jnp.repeat(total / heads, heads, axis=2)

    # Head by head, because a head's rows fill up the last block of lanes.
    rows = dense.rows["attention"]
    return dataclasses.replace(
        dense,
        operations={
            name: Operation(apart(one.count), one.bits_a, one.bits_b)
            for name, one in operations.items()
        },
        rows={
            "attention": RowStatistics(
                apart(rows.segments), apart(rows.queries), jnp.repeat(rows.maximum, heads, axis=2)
            )
        },
        streams={
            name: dataclasses.replace(one, vectors=apart(one.vectors))
            for name, one in streams.items()
        },
        block_gemms=gemms,
    )


def _segments(kept: float, setting: Setting, shape: ModelShape) -> np.ndarray:
    """Returns cycles of the sorting network and segments that hold a key, of all rows of a head, `[2]`."""
    length = 2.0**setting.tile_bits
    totals = np.zeros(2)
    for row in _row_lengths(shape):
        sizes = np.minimum(row - np.arange(0.0, row, length), length)
        passes = np.ceil(np.ceil(kept * sizes) / SORTER_OUTPUTS)
        totals += [np.sum(np.ceil(sizes / SORTER_INPUTS) * passes), len(sizes)]
    return totals


def _densities(shape: ModelShape, setting: Setting) -> dict[str, jax.Array]:
    """Returns the densities that differ from 1, `[1, L]`."""
    densities: dict[str, jax.Array] = {}
    for sites, density in (
        (SITES, setting.activation_density),
        (_WEIGHT_SITES, setting.weight_density),
    ):
        if density != 1.0:
            densities |= {site: _scalar(density, shape)[..., 0] for site in sites}
    return densities


def _row_lengths(shape: ModelShape) -> np.ndarray:
    """Returns the keys that each query of a head may attend to, `[T]`."""
    tokens = shape.num_tokens
    return np.arange(1.0, tokens + 1.0) if shape.is_causal else np.full(tokens, float(tokens))


def _rows(kept: float, shape: ModelShape) -> RowStatistics:
    keys = kept * _row_lengths(shape)
    sizes = 2.0 ** np.arange(grid_levels(shape.num_tokens))
    steps = [np.sum(np.maximum(keys / size, 1.0) if size > 1 else keys) for size in sizes]
    return RowStatistics(
        segments=_block(np.asarray(steps) * shape.num_heads, shape),
        queries=_scalar(float(shape.num_tokens * shape.num_heads), shape),
        maximum=_scalar(float(keys[-1]), shape),
    )


def _union(kept: float, setting: Setting, shape: ModelShape) -> np.ndarray:
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
    """Returns kept fractions, bits and densities of the machine's published operating point."""
    point, default = spec.operating_point, Setting()

    def given(quantity: Quantity | None, otherwise: float) -> float:
        return otherwise if quantity is None else quantity.value

    return Setting(
        kept=tuple(fraction.value for fraction in point.kept),
        union=None if point.union is None else point.union.value,
        query_bits=given(point.query_bits, default.query_bits),
        key_bits=tuple(bits.value for bits in point.key_bits),
        qk_bits=point.qk_bits.value,
        v_bits=point.v_bits.value,
        weight_bits=given(point.linear_bits, default.weight_bits),
        activation_bits=given(point.linear_bits, default.activation_bits),
        output_bits=None if point.generation_bits is None else point.generation_bits.value,
        tile_bits=given(point.tile_bits, default.tile_bits),
        generation_bits=None if point.generation_bits is None else point.generation_bits.value,
        activation_density=given(point.activation_density, 1.0),
        weight_density=given(point.weight_density, 1.0),
    )


def cheapest_setting(shape: ModelShape, *, num_rounds: int, skips_zeros: bool = False) -> Setting:
    """Returns the cheapest legal setting: one key kept by all queries alike, narrowest operands.

    On a machine that skips zeros, everything is zero.
    """
    density = 0.0 if skips_zeros else 1.0
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
        activation_density=density,
        weight_density=density,
    )


def skips_zeros(spec: AcceleratorSpec) -> bool:
    """Whether some unit of the machine skips products with a zero operand."""
    return any(
        unit.skips_zeros is not None and unit.skips_zeros.value for unit in spec.units.values()
    )


def generates_keys(spec: AcceleratorSpec) -> bool:
    """Whether a unit of the machine makes keys and values on demand."""
    return any("generate.mac" in unit.serves for unit in spec.units.values())


def closed_form_workload(spec: AcceleratorSpec, shape: ModelShape, setting: Setting) -> Workload:
    """Returns one example's workload on a machine of this kind, heads summed or one by one."""
    if not generates_keys(spec):
        return workload_from_fractions(shape, setting)
    sorts = any("select.compare" in unit.serves for unit in spec.units.values())
    return on_demand_workload(shape, setting, sorts=sorts)


def operating_points(spec: AcceleratorSpec, shape: ModelShape) -> list[OperatingPoint]:
    """Returns dense, the cheapest legal and the published operating point of a machine on a model."""
    published = published_setting(spec)
    settings = {
        "dense": Setting(),
        "cheapest legal": cheapest_setting(
            shape, num_rounds=len(published.kept), skips_zeros=skips_zeros(spec)
        ),
        "published": published,
    }
    return [
        OperatingPoint(name=name, workload=closed_form_workload(spec, shape, setting))
        for name, setting in settings.items()
    ]
