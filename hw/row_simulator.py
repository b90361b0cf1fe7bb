"""Row-by-row simulator of a filtering attention engine on the actual masks of a batch; NumPy only.

The independent check of the differentiable cost: same machine file, but every count comes from the
masks, every ceil is a ceil, and rows move through the stages one by one, a stage running ahead of
the next by at most the index queue. Heads follow one another; main memory streams alongside.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from codesign.errors import PresetError
from codesign.hw import energy
from codesign.hw.row_counts import RowCounts, row_counts
from codesign.hw.simulation import (
    GemmShape,
    Simulation,
    Trace,
    check_sites,
    host_span,
    operation_energy,
    run_host,
    standing_pj_per_cycle,
)
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.spec_tables import EnergyTable, Host, Unit
from codesign.hw.timeline import DRAM, Span, Watched, spans
from codesign.vocabulary import matches


def simulate_rows(
    trace: Trace,
    spec: AcceleratorSpec,
    gemm_shapes: Mapping[str, GemmShape],
    *,
    is_causal: bool = False,
    watched: Watched | None = None,
) -> Simulation:
    """Runs a batch through a machine.

    Args:
      trace: Keep decisions `[L, B, H, R, T, S]` and deployed widths: `query_bits` `[L]`, `key_bits`
        `[L, R]`, `qk_bits`, `v_bits` `[L]`, `<site>.weight_bits`, `<site>.activation_bits` `[L]`
        (`[1]` for embed and head). What they say was filtered: see `row_counts`.
      spec: The machine; all its row-wise units must be paced by row statistics.
      gemm_shapes: Linear layers by site.
      is_causal: Whether a token attends to itself and to those before it only; it says which pairs
        exist before anything is filtered.
      watched: Whose timeline to keep.

    Raises:
      PresetError: If the simulator has no rules for this machine.
      UnknownNameError: If a linear site does not exist.
    """
    host, table = _check_machine(spec)
    check_sites(gemm_shapes)
    bits = {name: np.asarray(value, np.int64) for name, value in trace.bits.items()}
    valid = np.asarray(trace.valid, bool)
    work = row_counts(trace, spec, bits, is_causal)
    stream_bytes = work.stream_bytes(trace.head_dim)
    moved = sum(stream_bytes.values(), start=np.zeros(work.keys["attention"].shape[:3]))
    row_cycles = {name: _row_cycles(name, spec, work, trace.head_dim) for name in spec.units}
    dram_cycles = moved / spec.dram_bytes_per_cycle
    attention, passage = _run_pipeline(row_cycles, dram_cycles, valid, spec)

    busy = {name: _per_example(cycles) for name, cycles in row_cycles.items()}
    counts = {key: _per_example(count) for key, count in work.operations.items()}
    unit_energy = operation_energy(counts, work.widths, spec)
    unit_energy["dram"] = _per_example(moved) * energy.dram_pj_per_byte(spec)
    tokens = valid.sum(axis=1)
    host_run = run_host(
        gemm_shapes,
        bits,
        tokens,
        attention.shape[0],
        spec,
        host,
        table,
        rows={site: count.T for site, count in work.linear_rows.items()},
    )
    timeline = []
    if watched is not None:
        timeline = _timeline(passage, row_cycles, watched, spec)
        done = float(attention[watched.layer, watched.example])
        timeline += host_span(host_run, watched, done)
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
        host=host_run,
        timeline=timeline,
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


def _row_cycles(name: str, spec: AcceleratorSpec, work: RowCounts, head_dim: int) -> np.ndarray:
    """Returns the cycles of each query row in a unit, `[L, B, H, T]`."""
    unit = spec.units[name]
    paced = [key for key in work.operations if matches(key, unit.paces)]
    per_key = 1 if unit.width is None else -(-head_dim // int(unit.width.value))
    cycles = np.zeros(work.keys["attention"].shape, np.float64)
    has_any = np.zeros(cycles.shape, np.bool_)
    for key in paced:
        rows = work.keys[key.partition(".")[0] if unit.rows == "filter*" else str(unit.rows)]
        has_any |= (rows.sum(axis=-1) if unit.rows == "packed" else rows) > 0
        steps = -(-rows // int(unit.lanes.value)) * per_key
        if unit.rows == "packed":
            steps = steps.sum(axis=-1)
        cycles += steps * _passes(unit, spec, work.widths[key])
    if unit.utilisation is not None:
        cycles /= unit.utilisation.value
    if unit.overhead is not None and paced:
        # Rows that a plan leaves out bring no key and take no time.
        cycles += unit.overhead.value * has_any
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


@dataclass(frozen=True, kw_only=True)
class _Passage:
    """When rows enter stages, `[stages, N, L, B]`, N rows in the order `[B, N]` of `H T`; main memory's part `[N, L, B]`.

    `arrival` is when what a row needs begins to come, `share` how long it takes.
    """

    starts: np.ndarray
    order: np.ndarray
    arrival: np.ndarray
    share: np.ndarray


def _run_pipeline(
    row_cycles: dict[str, np.ndarray],
    dram_cycles: np.ndarray,
    valid: np.ndarray,
    spec: AcceleratorSpec,
) -> tuple[np.ndarray, _Passage]:
    """Moves rows through the stages and returns the latency, `[L, B]`, and when they passed.

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
    # Without overlap main memory moves everything once the last row has left.
    begin = arrival if overlaps else arrival + free[-1]
    return latency, _Passage(starts=starts, order=order, arrival=begin, share=share)


def _timeline(
    passage: _Passage, row_cycles: dict[str, np.ndarray], watched: Watched, spec: AcceleratorSpec
) -> list[Span]:
    """Returns what units and main memory do in a layer, heads apart."""
    layer, example = watched.layer, watched.example
    order = passage.order[example]
    num_rows = next(iter(row_cycles.values())).shape[3]
    names = [f"head {head}" for head in order // num_rows]
    arrival, share = (one[:, layer, example] for one in (passage.arrival, passage.share))
    found = spans(DRAM, names, arrival, share)
    for stage, units in enumerate(spec.pipeline.stages):
        starts = passage.starts[stage, :, layer, example]
        for unit in units:
            found += spans(unit, names, starts, row_cycles[unit][layer, example].ravel()[order])
    return found
