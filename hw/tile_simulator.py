"""Tile-by-tile simulator of machines that make keys on demand, on the actual masks of a batch; NumPy only.

A task is a head, a block of query rows and a tile of keys. Heads follow one another, in each its blocks, in each its
tiles. A unit takes the rows of a head `lanes` at a time and works on one task at a time, in order; it starts when the
unit before has finished what the task needs, and when main memory has delivered what it reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from codesign import units
from codesign.errors import PresetError, UnknownNameError
from codesign.hw import energy
from codesign.hw.simulation import (
    GemmShape,
    Simulation,
    Trace,
    by_example,
    check_sites,
    collected,
    host_span,
    run_host,
    standing_pj_per_cycle,
)
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.spec_tables import EnergyTable, Host, Unit
from codesign.hw.tile_counts import MADE, MADE_STREAMS, TileCounts, count_tiles, layer_widths
from codesign.hw.timeline import DRAM, Span, Watched, spans
from codesign.vocabulary import matches


@dataclass(frozen=True, kw_only=True)
class _Tasks:
    """The tasks of a unit, in order; axes H heads, G blocks of rows, J tiles.

    Attributes:
      name: The unit.
      stage: Its stage.
      lanes: Rows of a block.
      last_row: Last row of each block, `[G]`.
      exists: Whether a task has a pair, bool `[G, J]`.
      cycles: Time of each, `[H, G, J]`.
      load_bytes: What main memory brings for each, `[H, G, J]`.
      needs_rows: Whether nothing that follows can start before all tiles of a row are done.
    """

    name: str
    stage: int
    lanes: int
    last_row: np.ndarray
    exists: np.ndarray
    cycles: np.ndarray
    load_bytes: np.ndarray
    needs_rows: bool


def simulate_tiles(
    trace: Trace,
    spec: AcceleratorSpec,
    gemm_shapes: Mapping[str, GemmShape],
    *,
    is_causal: bool = False,
    watched: Watched | None = None,
) -> Simulation:
    """Runs a batch through a machine; arguments as of `codesign.hw.simulator.simulate`.

    `tile_bits` `[L]` in the trace's bits makes rounds those of SOFA (the largest of each segment, then those within the
    radius), `key_bits` `[L, R]` those of LAPA. Without either nothing is predicted, and every key of the last mask made.

    Raises:
      PresetError: If the simulator has no rules for this machine.
      UnknownNameError: If a linear site does not exist, or `qkv` is missing.
    """
    host, table = _check_machine(spec)
    check_sites(gemm_shapes)
    if "qkv" not in gemm_shapes:
        raise UnknownNameError(
            "`gemm_shapes` lacks `qkv`, the width of which keys are made from: add it"
        )
    bits = {name: np.asarray(value, np.int64) for name, value in trace.bits.items()}
    valid = np.asarray(trace.valid, bool)
    num_layers, num_heads = trace.packed.shape[0], trace.packed.shape[2]
    assert spec.pipeline.rows_at_once is not None and spec.pipeline.query_block is not None
    counts: list[list[TileCounts]] = []
    for layer in range(num_layers):
        keep = trace.keep(layer)
        counts.append(
            [
                count_tiles(
                    keep[example],
                    valid[example],
                    layer_widths(bits, layer),
                    width=gemm_shapes["qkv"].inner,
                    head_dim=trace.head_dim,
                    tile_keys=int(spec.pipeline.rows_at_once.value),
                    query_block=int(spec.pipeline.query_block.value),
                    is_causal=is_causal,
                )
                for example in range(len(valid))
            ]
        )
    alone, whole = (
        [[_run(one, spec, makes_keys=makes_keys) for one in examples] for examples in counts]
        for makes_keys in (False, True)
    )
    work = collected(counts)
    unit_cycles = {
        key: by_example([[one.busy_cycles[key] for one in examples] for examples in whole])
        for key in whole[0][0].busy_cycles
    }
    making = {spec.unit_of(key) for key in MADE}
    energies, busy = [], []
    for is_made, part in enumerate(work.split(MADE, MADE_STREAMS)):
        dram_pj = part.moved_bytes * energy.dram_pj_per_byte(spec)
        energies.append(part.energy_pj(spec) | {"dram": dram_pj})
        busy.append(
            {key: value for key, value in unit_cycles.items() if (key in making) == is_made}
        )
        busy[-1]["dram"] = part.moved_bytes / spec.dram_bytes_per_cycle
    attention_cycles, whole_cycles = (
        by_example([[one.latency_cycles for one in examples] for examples in runs])
        for runs in (alone, whole)
    )
    # Keys and values are made by the machine itself: its host makes the queries.
    shapes = dict(gemm_shapes)
    shapes["qkv"] = GemmShape(
        inner=shapes["qkv"].inner, outer=num_heads * trace.head_dim, rows=shapes["qkv"].rows
    )
    host_run = run_host(shapes, bits, valid.sum(axis=1), num_layers, spec, host, table)
    timeline: list[Span] = []
    if watched is not None:
        run = whole[watched.layer][watched.example]
        timeline = _timeline(run, spec) + host_span(host_run, watched, run.latency_cycles)
    return Simulation(
        operations=work.operations,
        stream_bytes=work.stream_bytes,
        busy_cycles=busy[0],
        attention_cycles=attention_cycles,
        unit_energy_pj=energies[0],
        own_busy_cycles=busy[1],
        own_cycles=whole_cycles - attention_cycles,
        own_energy_pj=energies[1],
        standing_pj_per_cycle=standing_pj_per_cycle(spec),
        host=host_run,
        timeline=timeline,
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What one layer of one example takes, cycles.

    Attributes:
      latency_cycles: Its latency.
      busy_cycles: Working time by unit.
      starts: When each task of a unit starts, and how long it takes, `[H, G, J]`.
      moved: Heads of what main memory moves in turn, when each begins, and how long it takes, `[N]`.
    """

    latency_cycles: float
    busy_cycles: dict[str, float]
    starts: dict[str, tuple[np.ndarray, np.ndarray]]
    moved: tuple[np.ndarray, np.ndarray, np.ndarray]


def _timeline(run: _Run, spec: AcceleratorSpec) -> list[Span]:
    """Returns what units and main memory do in a layer, heads apart."""
    heads, begin, cycles = run.moved
    found = spans(DRAM, [f"head {head}" for head in heads], begin, cycles)
    for unit, (starts, each) in run.starts.items():
        names = [f"head {head}" for head in np.indices(each.shape)[0].ravel()]
        found += spans(unit, names, starts.ravel(), each.ravel())
    return found


def _check_machine(spec: AcceleratorSpec) -> tuple[Host, EnergyTable]:
    """Returns the host and its prices.

    Raises:
      PresetError: If the machine is not one that makes keys on demand beside a host.
    """
    lacking = [f"`{name}`" for name in ("host", "energy_table") if getattr(spec, name) is None]
    lacking += [
        f"`pipeline.{name}`"
        for name in ("query_block", "rows_at_once")
        if getattr(spec.pipeline, name) is None
    ]
    if not any(matches(key, unit.serves) for unit in spec.units.values() for key in MADE):
        lacking.append("a unit that serves `generate.mac`")
    if lacking or spec.host is None or spec.energy_table is None or spec.processing_elements:
        reason = f"needs {', '.join(lacking)}" if lacking else "knows no `processing_elements`"
        raise PresetError(
            f"{spec.name}: the tile-by-tile simulator {reason}: choose a machine that makes keys on demand "
            "beside a host, such as `sofa`, or ask the cost model alone"
        )
    for name, unit in spec.units.items():
        if unit.rule == "rows" or (unit.rule == "flat") != (unit.paces == MADE):
            raise PresetError(
                f"{spec.name}: `units.{name}.rule`: the simulator knows rule `blocks`, and `flat` for the unit "
                "paced by `generate.mac`: change the rule"
            )
    return spec.host, spec.energy_table


def _run(counts: TileCounts, spec: AcceleratorSpec, *, makes_keys: bool) -> _Run:
    """Moves the tiles of one layer of one example through the machine."""
    tasks = _all_tasks(counts, spec, makes_keys=makes_keys)
    overlaps = spec.switches.memory_overlaps.value
    transfers = _transfers(tasks, counts)
    begun = {}
    done: tuple[_Tasks, np.ndarray, np.ndarray] | None = None
    for index, unit in enumerate(tasks):
        ready = np.full(unit.cycles.shape, -np.inf)
        ready[:, unit.exists] = 0.0
        if overlaps:
            ready = np.maximum(ready, transfers.arrivals[index] / spec.dram_bytes_per_cycle)
        least = ready
        if done is not None:
            before, start, finish = done
            block = unit.last_row // before.lanes
            if before.stage == unit.stage:
                # Chained on one task: starts with the unit before, ends no earlier.
                first = np.append(0, unit.last_row[:-1] + 1) // before.lanes
                ready, least = np.maximum(ready, start[:, first]), finish[:, block]
            else:
                given = finish[:, block]
                given = (
                    np.broadcast_to(given[:, :, -1:], given.shape) if before.needs_rows else given
                )
                ready = np.maximum(ready, given)
        ready[:, ~unit.exists] = -np.inf
        starts, ends = _in_order(ready.ravel(), unit.cycles.ravel())
        ends = np.maximum.accumulate(
            np.maximum(ends, np.where(unit.exists, least, -np.inf).ravel())
        )
        done = unit, starts.reshape(ready.shape), ends.reshape(ready.shape)
        begun[unit.name] = done[1], unit.cycles
    assert done is not None
    computed, rate = float(done[2].max()), spec.dram_bytes_per_cycle
    moving = transfers.sizes / rate
    begin = np.cumsum(moving) - moving
    latency = computed + float(moving.sum())
    if overlaps:
        latency = max(computed + float(moving[-1]), float(moving.sum()))
        begin[-1] = max(computed, begin[-1])
    else:
        begin += computed
    if spec.switches.fill_and_drain.value:
        latency += spec.pipeline.drain.value
    return _Run(
        latency_cycles=latency,
        busy_cycles={unit.name: float(unit.cycles.sum()) for unit in tasks},
        starts=begun,
        moved=(transfers.heads, begin, moving),
    )


def _in_order(ready: np.ndarray, cycles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns starts and ends of tasks that a unit works on one by one, `[N]`; those never ready take no time."""
    before = np.cumsum(cycles) - cycles
    starts = before + np.maximum.accumulate(ready - before)
    return starts, starts + cycles


def _all_tasks(counts: TileCounts, spec: AcceleratorSpec, *, makes_keys: bool) -> list[_Tasks]:
    """Returns the tasks of the units that work, in the order of the stages."""
    working = [
        (stage, name)
        for stage, names in enumerate(spec.pipeline.stages)
        for name in names
        if any(matches(key, spec.units[name].paces) for key in counts.operations)
        and (makes_keys or spec.units[name].paces != MADE)
    ]
    by_query = [
        index for index, (_, name) in enumerate(working) if spec.units[name].rule == "blocks"
    ]
    result = []
    for index, (stage, name) in enumerate(working):
        unit = spec.units[name]
        # Keys are made as blocks of the unit before want them, or of the one after.
        near = max((one for one in by_query if one <= index), default=by_query[0])
        lanes = int(spec.units[working[near][1]].lanes.value)
        starts = np.arange(0, counts.exists.shape[0], lanes)
        exists = np.logical_or.reduceat(counts.exists, starts, axis=0)
        make = _blocks if unit.rule == "blocks" else _made
        cycles = make(counts, unit, spec, starts, exists)
        efficiency = 1.0 if unit.utilisation is None else unit.utilisation.value
        if unit.per_lane is not None:
            efficiency *= unit.per_lane.value
        result.append(
            _Tasks(
                name=name,
                stage=stage,
                lanes=lanes,
                last_row=np.append(starts[1:], counts.exists.shape[0]) - 1,
                exists=exists,
                cycles=cycles / efficiency,
                load_bytes=_loads(counts, unit, spec, starts, exists),
                needs_rows=any(key.endswith(".statistic") for key in unit.paces),
            )
        )
    return result


def _blocks(
    counts: TileCounts, unit: Unit, spec: AcceleratorSpec, starts: np.ndarray, exists: np.ndarray
) -> np.ndarray:
    """Returns the cycles of a unit whose lanes take a row each, `[H, G, J]`; what a block's rows bring is dealt evenly."""
    heads = counts.first_wanting.shape[0]
    number = counts.exists.shape[0]
    elements = 1 if unit.width is None else int(unit.width.value)
    rows = np.diff(np.append(starts, number))[:, None]
    cycles = np.zeros((heads, *exists.shape))
    for key in counts.operations:
        if not matches(key, unit.paces):
            continue
        passes = _passes(unit, spec, counts.widths[key])
        if key in counts.pairs:
            each = np.add.reduceat(counts.pairs[key], starts, axis=1)
            cycles += -(-each // (rows * elements)) * passes
        else:
            # Predicted keys: lanes take the tokens of a tile when the first block of a head wants it.
            groups = counts.tile_of_token[:: int(unit.lanes.value)]
            steps = -(-counts.width * counts.head_dim // elements)
            first = exists.argmax(axis=0)
            tiles = np.arange(exists.shape[1])
            cycles[:, first, tiles] += np.bincount(groups, minlength=len(tiles)) * steps * passes
    return cycles


def _made(
    counts: TileCounts, unit: Unit, spec: AcceleratorSpec, starts: np.ndarray, exists: np.ndarray
) -> np.ndarray:
    """Returns the cycles of making keys and values when the first block of a head wants them, `[H, G, J]`."""
    assert unit.width is not None
    wanted = np.zeros((counts.first_wanting.shape[0], *exists.shape))
    head, token = np.nonzero(counts.first_wanting < counts.exists.shape[0])
    block = np.searchsorted(starts, counts.first_wanting[head, token], side="right") - 1
    np.add.at(wanted, (head, block, counts.tile_of_token[token]), 1)
    each = 2 * counts.width * counts.head_dim
    steps = np.ceil(wanted * each / (int(unit.lanes.value) * int(unit.width.value)))
    return steps * _passes(unit, spec, counts.widths["generate.mac"])


def _passes(unit: Unit, spec: AcceleratorSpec, widths: tuple[int, int]) -> float:
    """Returns passes through sliced operands."""
    passes = 1.0
    for width, piece in zip(widths, (unit.slice_a, unit.slice_b), strict=True):
        if piece is not None:
            passes *= np.ceil(width / piece.value)
            if unit.scaling == "au_scales" and spec.switches.au_scales.value:
                passes *= width / piece.value
    return passes


def _loads(
    counts: TileCounts, unit: Unit, spec: AcceleratorSpec, starts: np.ndarray, exists: np.ndarray
) -> np.ndarray:
    """Returns what main memory brings for each task of a unit, bytes, `[H, G, J]`.

    Tokens come once, for the first head that needs them; weights for every head and block of tokens.
    """
    heads, number = counts.first_wanting.shape
    bits = np.zeros((heads, *exists.shape))
    tiles = np.arange(exists.shape[1])
    first = exists.argmax(axis=0)
    assert spec.pipeline.query_block is not None
    loads = counts.tile_of_token[:: int(spec.pipeline.query_block.value)]
    loads_of_tile = np.bincount(loads, minlength=len(tiles))
    slice_elements = counts.head_dim * counts.width

    def serves(key: str) -> bool:
        return matches(key, unit.paces)

    if serves("predict.shift_add") and counts.is_predicted:
        # Lanes take tokens together, so that all of theirs come with the first.
        lanes = int(unit.lanes.value)
        taken = counts.tile_of_token[np.arange(number) // lanes * lanes]
        size = np.bincount(taken, minlength=len(tiles))
        bits[0, first, tiles] += size * counts.width * counts.vectors["tokens"][1]
        codes = counts.vectors["weight_codes"][1]
        bits[:, first, tiles] += loads_of_tile * slice_elements * codes
    if serves("generate.mac"):
        token = np.flatnonzero((counts.first_wanting < number).any(axis=0))
        head = (counts.first_wanting[:, token] < number).argmax(axis=0)
        block = np.searchsorted(starts, counts.first_wanting[head, token], side="right") - 1
        each = counts.width * counts.vectors["generate_tokens"][1]
        np.add.at(bits, (head, block, counts.tile_of_token[token]), each)
        weight = counts.vectors["generate_weights"][1]
        bits[:, first, tiles] += 2 * loads_of_tile * slice_elements * weight
    if serves("filter0.shift_add" if counts.is_predicted else "qk.mac"):
        rows = np.diff(np.append(starts, number))
        blocks = np.arange(len(starts))
        query = rows * counts.head_dim * counts.vectors["query"][1]
        bits[:, blocks, exists.argmax(axis=1)] += query
    return bits / units.BITS_PER_BYTE


@dataclass(frozen=True, kw_only=True)
class _Transfers:
    """What main memory moves.

    Attributes:
      arrivals: Bytes up to a task's own, `[H, G, J]` by unit.
      sizes: Bytes in the order in which they move, the last output last, `[N]`.
      heads: Heads that they are for, `[N]`.
    """

    arrivals: list[np.ndarray]
    sizes: np.ndarray
    heads: np.ndarray


def _transfers(tasks: list[_Tasks], counts: TileCounts) -> _Transfers:
    """Returns what main memory moves: what tasks need in their order, ahead of time.

    The output of a block follows what the next one needs.
    """
    keys, sizes = [], []
    for index, unit in enumerate(tasks):
        heads, blocks, tiles = np.indices(unit.cycles.shape).reshape(3, -1)
        keys.append(np.stack([heads, unit.last_row[blocks], tiles, np.full(heads.shape, index)]))
        sizes.append(unit.load_bytes.ravel())
    last = tasks[-1]
    heads, blocks = np.indices(last.cycles.shape[:2]).reshape(2, -1)
    rows = np.diff(np.append(-1, last.last_row))
    output = rows * counts.head_dim * counts.vectors["output"][1] / units.BITS_PER_BYTE
    key = np.stack([heads, last.last_row[blocks]])
    behind = np.full((2, key.shape[1] - 1), len(tasks) + last.cycles.shape[2])
    keys.append(np.concatenate([key[:, 1:], behind]))
    sizes.append(output[blocks][:-1])
    every = np.concatenate(keys, axis=1)
    order = np.lexsort(every[::-1])
    in_order = np.concatenate(sizes)[order]
    moved = np.empty(len(order))
    moved[order] = np.cumsum(in_order)
    ends = np.cumsum([unit.cycles.size for unit in tasks])
    arrivals = [
        part.reshape(unit.cycles.shape)
        for part, unit in zip(np.split(moved, ends)[:-1], tasks, strict=True)
    ]
    return _Transfers(
        arrivals=arrivals,
        sizes=np.append(in_order, output[-1]),
        heads=np.append(every[0, order], heads[-1]),
    )
