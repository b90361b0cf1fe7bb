"""Row-by-row simulator of a filtering attention engine on the actual masks of a batch; NumPy only.

The independent check of the differentiable cost: same machine file, but every count comes from the
masks, every ceil is a ceil, and rows move through the stages one by one, a stage running ahead of
the next by at most the index queue. Heads follow one another; main memory streams alongside.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from codesign import units
from codesign.errors import PresetError
from codesign.hw import energy
from codesign.hw.simulation import (
    GemmShape,
    Simulation,
    Trace,
    check_sites,
    operation_energy,
    run_host,
    standing_pj_per_cycle,
)
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.spec_tables import EnergyTable, Host, Unit


@dataclass(frozen=True, kw_only=True)
class _Masks:
    """Facts read off the masks; axes L, B, H, T.

    `keys[r]` is the number of keys of each query row that enter round r, the last entry what
    attention runs on, `[R + 1, L, B, H, T]`; `vectors` the key vectors fetched for them,
    `[R + 1, L, B, H]`; `valid` `[B, T]`.
    """

    keys: np.ndarray
    vectors: np.ndarray
    valid: np.ndarray


def simulate_rows(
    trace: Trace,
    spec: AcceleratorSpec,
    gemm_shapes: Mapping[str, GemmShape],
    *,
    is_causal: bool = False,
) -> Simulation:
    """Runs a batch through a machine.

    Args:
      trace: Keep decisions `[L, B, H, R, T, S]` and deployed widths: `query_bits` `[L]`, `key_bits`
        `[L, R]`, `qk_bits`, `v_bits` `[L]`, `<site>.weight_bits`, `<site>.activation_bits` `[L]`
        (`[1]` for embed and head). Without `query_bits` nothing is filtered: the attention is dense
        on the last mask.
      spec: The machine; all its row-wise units must be paced by row statistics.
      gemm_shapes: Linear layers by site.
      is_causal: Whether a token attends to itself and to those before it only; it says which pairs
        exist before anything is filtered.

    Raises:
      PresetError: If the simulator has no rules for this machine.
      UnknownNameError: If a linear site does not exist.
    """
    host, table = _check_machine(spec)
    check_sites(gemm_shapes)
    bits = {name: np.asarray(value, np.int64) for name, value in trace.bits.items()}
    key_bits = bits["key_bits"] if "query_bits" in bits else None
    planes = [] if key_bits is None else list(np.diff(key_bits, axis=1, prepend=0).T)
    masks = _read_masks(trace, spec, bits, len(planes), is_causal)
    operations, widths = _count_operations(masks, bits, planes, trace.head_dim)
    stream_bytes = _count_bytes(masks, bits, planes, trace.head_dim, spec)
    moved = sum(stream_bytes.values(), start=np.zeros(masks.keys.shape[1:4]))
    row_cycles = {
        name: _row_cycles(name, spec, masks, widths, trace.head_dim) for name in spec.units
    }
    dram_cycles = moved / spec.dram_bytes_per_cycle
    attention = _run_pipeline(row_cycles, dram_cycles, masks.valid, spec)

    busy = {name: _per_example(cycles) for name, cycles in row_cycles.items()}
    counts = {key: _per_example(count) for key, count in operations.items()}
    unit_energy = operation_energy(counts, widths, spec)
    unit_energy["dram"] = _per_example(moved) * energy.dram_pj_per_byte(spec)
    tokens = masks.valid.sum(axis=1)
    return Simulation(
        operations=counts,
        stream_bytes={name: _per_example(value) for name, value in stream_bytes.items()},
        busy_cycles=busy | {"dram": _per_example(dram_cycles)},
        attention_cycles=attention.T,
        unit_energy_pj=unit_energy,
        own_busy_cycles={},
        own_cycles=np.zeros(attention.T.shape),
        own_energy_pj={},
        standing_pj_per_cycle=standing_pj_per_cycle(spec),
        host=run_host(gemm_shapes, bits, tokens, attention.shape[0], spec, host, table),
    )


def _check_machine(spec: AcceleratorSpec) -> tuple[Host, EnergyTable]:
    """Returns the host and its prices.

    Raises:
      PresetError: If the machine is not one that filters rows and leaves linear layers to a host.
    """
    pipeline, lacking = spec.pipeline, []
    if spec.host is None:
        lacking.append("`host`")
    if spec.energy_table is None:
        lacking.append("`energy_table`")
    lacking += [
        f"`pipeline.{name}`"
        for name in ("query_block", "index_queue")
        if getattr(pipeline, name) is None
    ]
    lacking += [f"`memories.{name}`" for name in ("key", "value") if name not in spec.memories]
    if lacking or spec.host is None or spec.energy_table is None or spec.processing_elements:
        reason = f"needs {', '.join(lacking)}" if lacking else "knows no `processing_elements`"
        raise PresetError(
            f"{spec.name}: the row-by-row simulator {reason}: choose a machine that filters rows "
            "beside a host, such as `energon`, or ask the cost model alone"
        )
    for name, unit in spec.units.items():
        if unit.rule != "rows":
            raise PresetError(
                f"{spec.name}: `units.{name}.rule`: the simulator moves rows, so it needs rule `rows`: "
                "change the rule"
            )
    return spec.host, spec.energy_table


def _per_example(value: np.ndarray) -> np.ndarray:
    """Sums `[L, B, ...]` over all but layers and examples and returns `[B, L]`."""
    total: np.ndarray = value.reshape(*value.shape[:2], -1).sum(axis=2).T
    return total


def _read_masks(
    trace: Trace,
    spec: AcceleratorSpec,
    bits: dict[str, np.ndarray],
    num_rounds: int,
    is_causal: bool,
) -> _Masks:
    assert spec.pipeline.query_block is not None
    valid = np.asarray(trace.valid, bool)
    head_bytes = valid.sum(axis=1) * trace.head_dim / units.BITS_PER_BYTE
    block = int(spec.pipeline.query_block.value)
    keys, vectors = [], []
    for layer in range(trace.packed.shape[0]):
        keep = trace.keep(layer)
        exists = valid[:, None, :, None] & valid[:, None, None, :]
        if is_causal:
            exists = exists & np.tril(np.ones(exists.shape[2:], bool))
        rounds = [keep[:, :, index] for index in range(num_rounds)] or [keep[:, :, -1]]
        first = [np.broadcast_to(exists, rounds[0].shape)] if num_rounds else []
        entering = [*first, *(mask & exists for mask in rounds)]
        fits = (head_bytes * bits["qk_bits"][layer] <= spec.memories["key"].capacity.base) & (
            head_bytes * bits["v_bits"][layer] <= spec.memories["value"].capacity.base
        )
        keys.append([mask.sum(axis=-1) for mask in entering])
        vectors.append(
            [
                np.where(fits[:, None], _fetched(mask, mask.shape[2]), _fetched(mask, block))
                for mask in entering
            ]
        )
    return _Masks(
        keys=np.moveaxis(np.asarray(keys, np.int64), 1, 0),
        vectors=np.moveaxis(np.asarray(vectors, np.int64), 1, 0),
        valid=valid,
    )


def _fetched(mask: np.ndarray, block: int) -> np.ndarray:
    """Returns the key vectors that blocks of `block` queries fetch, `[B, H]`, of a mask `[B,H,T,S]`."""
    starts = np.arange(0, mask.shape[2], block)
    wanted = np.logical_or.reduceat(mask, starts, axis=2)
    fetched: np.ndarray = wanted.sum(axis=(2, 3))
    return fetched


def _count_operations(
    masks: _Masks, bits: dict[str, np.ndarray], planes: list[np.ndarray], head_dim: int
) -> tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Returns counts `[L, B, H]` and the widths `[L]` of both operands, by operation."""
    alive = masks.keys.sum(axis=-1)
    final = alive[-1]
    queries = np.broadcast_to(masks.valid.sum(axis=1)[None, :, None], final.shape)
    qk, value = bits["qk_bits"], bits["v_bits"]
    operations = {
        "qk.mac": final * head_dim,
        "softmax.exp": final,
        "softmax.reciprocal": queries,
        "pv.mac": final * head_dim,
        "output.multiply": queries * head_dim,
    }
    widths = {key: (qk, qk) for key in operations}
    widths |= {"pv.mac": (qk, value), "output.multiply": (qk, value)}
    for index, plane in enumerate(planes):
        for kind, factor in (("mac", head_dim), ("statistic", 1), ("compare", 1)):
            operations[f"filter{index}.{kind}"] = alive[index] * factor
            widths[f"filter{index}.{kind}"] = (bits["query_bits"], plane)
    if planes:
        one = np.ones_like(qk)
        # Of the example's own keys, whatever it is padded to.
        longest = [max(int(number - 1).bit_length(), 1) for number in masks.valid.sum(axis=1)]
        index_bits = np.asarray(longest)[None, :, None]
        operations["threshold.evaluate"] = queries * len(planes)
        operations["index.bits"] = alive[1:].sum(axis=0) * index_bits
        widths |= {"threshold.evaluate": (one, one), "index.bits": (one, one)}
    return operations, widths


def _count_bytes(
    masks: _Masks,
    bits: dict[str, np.ndarray],
    planes: list[np.ndarray],
    head_dim: int,
    spec: AcceleratorSpec,
) -> dict[str, np.ndarray]:
    """Returns bytes moved by stream, `[L, B, H]`."""
    shape = masks.vectors.shape[1:]
    queries = np.broadcast_to(masks.valid.sum(axis=1)[None, :, None], shape)
    rest = bits["qk_bits"]
    if planes and not spec.switches.separate_storage.value:
        rest = rest - bits["key_bits"][:, -1]
    moved = {
        "query": (queries, bits["qk_bits"]),
        "output": (queries, bits["out.activation_bits"]),
        "key_rest": (masks.vectors[-1], rest),
        "value": (masks.vectors[-1], bits["v_bits"]),
    }
    for index, plane in enumerate(planes):
        moved[f"key{index}"] = (masks.vectors[index], plane)
    return {
        name: vectors * head_dim * width[:, None, None] / units.BITS_PER_BYTE
        for name, (vectors, width) in moved.items()
    }


def _row_cycles(
    name: str,
    spec: AcceleratorSpec,
    masks: _Masks,
    widths: dict[str, tuple[np.ndarray, np.ndarray]],
    head_dim: int,
) -> np.ndarray:
    """Returns the cycles of each query row in a unit, `[L, B, H, T]`."""
    unit = spec.units[name]
    num_rounds = masks.keys.shape[0] - 1
    rounds = range(num_rounds) if unit.rows == "filter*" else [num_rounds]
    per_key = 1 if unit.width is None else -(-head_dim // int(unit.width.value))
    cycles = np.zeros(masks.keys.shape[1:], np.float64)
    for index in rounds:
        steps = -(-masks.keys[index] // int(unit.lanes.value)) * per_key
        for key in unit.paces:
            cycles += steps * _passes(unit, spec, widths[key.replace("*", str(index))])
    if unit.utilisation is not None:
        cycles /= unit.utilisation.value
    if unit.overhead is not None and len(rounds):
        cycles += unit.overhead.value * masks.valid[None, :, None, :]
    return cycles


def _passes(unit: Unit, spec: AcceleratorSpec, widths: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Returns passes through sliced multipliers, `[L, 1, 1, 1]`."""
    passes = np.ones(widths[0].shape)
    for width, piece in zip(widths, (unit.slice_a, unit.slice_b), strict=True):
        if piece is not None:
            passes = passes * np.ceil(width / piece.value)
            if unit.scaling == "au_scales" and spec.switches.au_scales.value:
                passes = passes * width / piece.value
    return passes[:, None, None, None]


def _run_pipeline(
    row_cycles: dict[str, np.ndarray],
    dram_cycles: np.ndarray,
    valid: np.ndarray,
    spec: AcceleratorSpec,
) -> np.ndarray:
    """Moves rows through the stages and returns the latency, `[L, B]`.

    A row enters a stage when the stage is free, the stage before has finished the row, and the row
    `index_queue` places ahead of it has entered the next stage. A row enters the first stage only
    when main memory has delivered what all rows before it needed.
    """
    num_layers, batch, num_heads = dram_cycles.shape
    # Rows that exist come first, in the order of heads and queries.
    order = np.argsort(~np.tile(valid, (1, num_heads)), axis=1, kind="stable")

    def in_order(value: np.ndarray) -> np.ndarray:
        flat = value.reshape(num_layers, batch, -1)
        ordered = np.take_along_axis(flat, order[None], axis=2)
        return np.moveaxis(ordered, 2, 0)

    stages = [
        in_order(np.max([row_cycles[name] for name in stage], axis=0))
        for stage in spec.pipeline.stages
    ]
    rows = np.maximum(valid.sum(axis=1), 1)[None, :, None, None]
    share = in_order(dram_cycles[..., None] / rows * valid[None, :, None, :])
    arrival = np.cumsum(share, axis=0) - share
    overlaps = spec.switches.memory_overlaps.value
    assert spec.pipeline.index_queue is not None
    depth = int(spec.pipeline.index_queue.value)
    num_rows = share.shape[0]
    starts = np.zeros((len(stages), num_rows, num_layers, batch))
    free = np.zeros((len(stages), num_layers, batch))
    for row in range(num_rows):
        ready = arrival[row] if overlaps else np.zeros((num_layers, batch))
        for index, cycles in enumerate(stages):
            start = np.maximum(ready, free[index])
            if index + 1 < len(stages) and row >= depth:
                start = np.maximum(start, starts[index + 1, row - depth])
            starts[index, row] = start
            ready = free[index] = start + cycles[row]
    total = dram_cycles.sum(axis=2)
    latency: np.ndarray = np.maximum(free[-1], total) if overlaps else free[-1] + total
    if spec.switches.fill_and_drain.value:
        latency = latency + spec.pipeline.drain.value
    return latency
