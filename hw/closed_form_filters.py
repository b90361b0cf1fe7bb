"""Workloads in closed form of machines that find their pairs in other ways than by rounds of a filter.

`codesign.hw.closed_form_on_demand` has those that make keys and values on demand.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from codesign.hw.closed_form import (
    ModelShape,
    Setting,
    kept_rows,
    moved_vectors,
    row_lengths,
    row_statistics,
    scalar,
    wanted_vectors,
    workload_from_fractions,
)
from codesign.references.bitserial import CODE_BITS
from codesign.references.sanger import LOW_BITS, PIECE, PROBABILITY_SHIFT
from codesign.references.spatten import LOW_BITS as LOW_BITS_ON_DEMAND
from codesign.workload import Operation, RowStatistics, Stream, Workload, grid_levels


def masked_workload(shape: ModelShape, setting: Setting) -> Workload:
    """Returns one example's workload `[1, L, 1]` on a machine that runs exact attention on pairs found at no cost.

    `kept` is what is left of a row; without it the attention is dense.
    """
    whole = workload_from_fractions(shape, dataclasses.replace(setting, kept=()))
    kept = setting.kept[-1] if setting.kept else 1.0
    fewer = {
        key: whole.operations[key].replace(count=kept * whole.operations[key].count)  # type: ignore[attr-defined]
        for key in ("qk.mac", "softmax.exp", "pv.mac")
    }
    resident = float(shape.num_tokens * shape.head_dim)
    vectors = wanted_vectors(kept, setting, shape)
    streams = {
        name: moved_vectors(vectors, bits, buffer, resident * bits, shape)
        for name, bits, buffer in (
            ("key_rest", setting.qk_bits, "key"),
            ("value", setting.v_bits, "value"),
        )
    }
    result: Workload = whole.replace(  # type: ignore[attr-defined]
        operations=whole.operations | fewer,
        rows={"all": whole.rows["attention"], "attention": kept_rows(kept, shape)},
        streams=whole.streams | streams,
    )
    return result


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
    each = np.broadcast_to(np.maximum(steps / sizes, 1.0), (shape.num_tokens, len(sizes)))
    searched = row_statistics(each, steps, shape)
    rows |= {
        "scored": kept_rows(scored, shape),
        "attention": kept_rows(kept, shape),
        "searched": searched,
    }
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
        "all": kept_rows(1.0, shape),
        "filter0": kept_rows(1.0, left),
        "qk": kept_rows(low, left),
        "used": kept_rows(used, left),
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
    keys = kept * np.clip(row_lengths(shape)[:, None] - starts[None, :], 0, PIECE).reshape(-1, 1)
    sizes = 2.0 ** np.arange(grid_levels(PIECE))
    steps = np.where(sizes > 1.0, np.where(keys > 0, np.maximum(keys / sizes, 1.0), 0.0), keys)
    return row_statistics(steps, float(np.max(keys)), shape)
