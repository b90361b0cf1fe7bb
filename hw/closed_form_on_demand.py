"""Workloads in closed form on machines that decide before queries, keys and values exist, and make these on demand."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from codesign.fake_quantize import RESIDUAL_BITS
from codesign.hw.closed_form import (
    ModelShape,
    Setting,
    moved_vectors,
    row_lengths,
    scalar,
    workload_from_fractions,
)
from codesign.mechanisms.esact import CODE_BITS as HYBRID_CODE_BITS, SCORE_BITS as TOP_BITS, WINDOW
from codesign.mechanisms.fact import CODE_BITS as LEADING_ONE_BITS
from codesign.mechanisms.lapa import CODE_BITS, QUERY_CODE_BITS as SHORT_QUERY_CODE_BITS
from codesign.mechanisms.on_demand import WEIGHT_CODE_BITS
from codesign.mechanisms.sofa import QUERY_CODE_BITS, SCORE_BITS
from codesign.segments import SORTER_INPUTS, SORTER_OUTPUTS
from codesign.units import BITS_PER_BYTE
from codesign.workload import Gemm, Operation, RowStatistics, Stream, Workload, grid_levels

NARROW_ROW = 0.5
"""What a feed-forward row of four bits counts (two of its products take the place of one)."""


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
    queries, pairs = float(tokens * heads), float(heads * np.sum(row_lengths(shape)))
    made_bits = setting.generation_bits
    token_bits = setting.activation_bits if made_bits is None else made_bits
    weight_bits = setting.weight_bits if made_bits is None else made_bits
    blocks = np.ceil(tokens / 2.0 ** np.arange(grid_levels(tokens))) * heads * head_dim

    def operation(count: float, bits_a: float, bits_b: float) -> Operation:
        return Operation(
            count=scalar(count, shape),
            bits_a=scalar(bits_a, shape),
            bits_b=scalar(bits_b, shape),
        )

    def stream(vectors: Sequence[float] | np.ndarray, bits: float, width: int) -> Stream:
        moved = moved_vectors(vectors, bits, "", 0.0, shape)
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

    return _by_head(dense, operations, streams, gemms, heads)


def _segments(kept: float, setting: Setting, shape: ModelShape) -> np.ndarray:
    """Returns cycles of the sorting network and segments that hold a key, of all rows of a head, `[2]`."""
    length = 2.0**setting.tile_bits
    totals = np.zeros(2)
    for row in row_lengths(shape):
        sizes = np.minimum(row - np.arange(0.0, row, length), length)
        passes = np.ceil(np.ceil(kept * sizes) / SORTER_OUTPUTS)
        totals += [np.sum(np.ceil(sizes / SORTER_INPUTS) * passes), len(sizes)]
    return totals


def _by_head(
    dense: Workload,
    operations: dict[str, Operation],
    streams: dict[str, Stream],
    gemms: dict[str, Gemm],
    heads: int,
) -> Workload:
    """Returns a workload head by head from sums over heads; rows are those of `dense`."""

    def apart(total: jax.Array) -> jax.Array:
        return jnp.repeat(total / heads, heads, axis=2)

    rows = dense.rows["attention"]
    return dataclasses.replace(
        dense,
        operations={
            name: Operation(apart(one.count), one.bits_a, one.bits_b)
            for name, one in operations.items()
        },
        rows={
            "attention": RowStatistics(
                segments=apart(rows.segments),
                queries=apart(rows.queries),
                maximum=jnp.repeat(rows.maximum, heads, axis=2),
                portions=apart(rows.portions),
            )
        },
        streams={
            name: dataclasses.replace(one, vectors=apart(one.vectors))
            for name, one in streams.items()
        },
        block_gemms=gemms,
    )


def similar_rows_workload(shape: ModelShape, setting: Setting) -> Workload:
    """Returns one example's workload `[1, L, H]` on a machine that predicts attention and copies similar rows (ESACT).

    Args:
      shape: The model.
      setting: `kept` are the share of keys that a row keeps, the rows that are computed, and the tokens whose feed-forward
        branch is; `union` the tokens that some computed row of a head wants. Without `kept` nothing is predicted.

    References:
      Counts of ESACT's specification, arXiv 2512.02403. Criticals before a row grow evenly from the one that a window has.
    """
    share, critical, computed = setting.kept or (1.0, 1.0, 1.0)
    dense = workload_from_fractions(
        shape,
        dataclasses.replace(setting, kept=(share,), key_bits=(8.0,)) if setting.kept else setting,
    )
    tokens, depth, heads, width = shape.num_tokens, shape.head_dim, shape.num_heads, shape.width
    pairs, rows = float(heads * np.sum(row_lengths(shape))), float(tokens * heads)
    union = 1.0 if setting.union is None else max(setting.union, share)
    wanted = rows * (union if setting.kept else 1.0)
    in_window = 1.0 - (1.0 - share) ** (WINDOW * critical)
    fetched = rows / WINDOW * tokens * min(in_window, union)
    before = (WINDOW - 1) * (1.0 + (WINDOW * critical - 1.0) / 2.0)
    qk_bits, v_bits = setting.qk_bits, setting.v_bits
    pair_bytes = depth * (qk_bits + v_bits) / BITS_PER_BYTE

    def operation(count: float, bits_a: float, bits_b: float) -> Operation:
        return Operation(scalar(count, shape), scalar(bits_a, shape), scalar(bits_b, shape))

    def stream(vectors: float, bits: float) -> Stream:
        return dataclasses.replace(moved_vectors([vectors], bits, "", 0.0, shape), width=width)

    kept = share * critical * pairs
    operations = {
        "generate.mac": operation(
            2.0 * wanted * width * depth, setting.activation_bits, setting.weight_bits
        ),
        "generate.bytes": operation(wanted * pair_bytes, BITS_PER_BYTE, BITS_PER_BYTE),
        "fetch.bytes": operation(fetched * pair_bytes, BITS_PER_BYTE, BITS_PER_BYTE),
        "qk.mac": operation(kept * depth, qk_bits, qk_bits),
        "softmax.exp": operation(kept, qk_bits, qk_bits),
        "pv.mac": operation(kept * depth, qk_bits, v_bits),
        "output.divide": operation(critical * rows * depth, qk_bits, v_bits),
    }
    streams = {
        "tokens": stream(float(tokens), setting.activation_bits),
        "ffn_output": stream(float(tokens), setting.activation_bits),
        "generate_weights": stream(2.0 * heads * depth, setting.weight_bits),
    }
    if setting.kept:
        copied = (1.0 - critical) * rows * depth * setting.activation_bits / BITS_PER_BYTE
        branches = (1.0 - computed) * tokens * width * RESIDUAL_BITS / BITS_PER_BYTE
        entries = rows / WINDOW * before * 2.0 * share * tokens
        operations |= {
            "encode.encode": operation(
                tokens * width + 2.0 * rows * depth, setting.activation_bits, HYBRID_CODE_BITS
            ),
            "predict.shift_add": operation(
                2.0 * rows * width * depth, HYBRID_CODE_BITS, HYBRID_CODE_BITS
            ),
            "filter0.shift_add": operation(pairs * depth, HYBRID_CODE_BITS, HYBRID_CODE_BITS),
            "select.compare": operation(pairs, TOP_BITS, TOP_BITS),
            "similarity.add": operation(entries, TOP_BITS, TOP_BITS),
            "copy.bytes": operation(copied, BITS_PER_BYTE, BITS_PER_BYTE),
            "ffn.bytes": operation(branches, BITS_PER_BYTE, BITS_PER_BYTE),
        }
        streams["weight_codes"] = stream(2.0 * heads * depth, HYBRID_CODE_BITS)
    gemms = dict(dense.block_gemms)
    for site, part in (("qkv", critical), ("up", computed), ("down", computed)):
        gemms[site] = dataclasses.replace(gemms[site], rows=gemms[site].rows * part)
    gemms["qkv"] = dataclasses.replace(gemms["qkv"], outer=heads * depth)
    return _by_head(dense, operations, streams, gemms, heads)


def eager_workload(shape: ModelShape, setting: Setting) -> Workload:
    """Returns one example's workload `[1, L, H]` on a machine that predicts attention by leading ones (FACT).

    Args:
      shape: The model.
      setting: `kept` are the share of keys that a row keeps, the rows that are computed, and feed-forward rows, of which
        those of four bits count as half: the least is half; `union` the tokens that some row of a head wants. Without
        `kept` nothing is predicted.
    """
    if setting.kept:
        *others, full = setting.kept
        setting = dataclasses.replace(setting, kept=(*others, max(full, NARROW_ROW)))
    whole = similar_rows_workload(shape, setting)
    dropped = ("similarity.add", "copy.bytes", "ffn.bytes", "generate.bytes", "fetch.bytes")
    operations = {name: one for name, one in whole.operations.items() if name not in dropped}
    streams = dict(whole.streams)
    if setting.kept:
        code = scalar(LEADING_ONE_BITS, shape)
        for name in ("predict.shift_add", "filter0.shift_add"):
            operations[name] = dataclasses.replace(operations[name], bits_a=code, bits_b=code)
        operations["encode.encode"] = dataclasses.replace(operations["encode.encode"], bits_b=code)
        streams["weight_codes"] = dataclasses.replace(streams["weight_codes"], bits=code)
        compared = jnp.full_like(
            operations["select.compare"].count, shape.num_tokens * (1.0 + 1.0 / shape.num_heads)
        )
        operations["threshold.compare"] = dataclasses.replace(
            operations["select.compare"], count=compared
        )
    return dataclasses.replace(whole, operations=operations, streams=streams)
