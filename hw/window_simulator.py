"""Window-by-window simulator of machines whose groups of lanes take windows of rows, on actual masks; NumPy only.

Windows of `rows_at_once` rows, with all their heads, move through two stages. The first predicts: a window's queries and
scores, its largest scores, its similar rows. A window's scores need the predicted keys of all tokens that it may attend
to: of a causal model its own and those before it, else of all tokens, which are then predicted first. In the second
every head of a window is one task on one group, which makes the keys and values that no window before has wanted of that
head, then the queries, and runs attention; when all heads are done, the window's other linear layers run, evenly on all
groups. A group takes work of the earliest window that has any.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from codesign import units
from codesign.errors import PresetError, UnknownNameError
from codesign.hw import energy
from codesign.hw.simulation import (
    END_SITES,
    GemmShape,
    Simulation,
    Trace,
    by_example,
    check_sites,
    collected,
    no_host,
    standing_pj_per_cycle,
)
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.spec_tables import Storage, Unit
from codesign.hw.timeline import DRAM, Span, Watched, spans
from codesign.hw.window_counts import (
    LINEAR,
    LINEAR_STREAMS,
    PREDICTED_KEYS,
    Decisions,
    WindowCounts,
    count_windows,
)
from codesign.hw.window_schedule import GroupWork, chained, run_groups
from codesign.references.fact import NARROW_BITS
from codesign.vocabulary import BLOCK_SITES, LINEAR_MAC, matches


def simulate_windows(
    trace: Trace,
    spec: AcceleratorSpec,
    gemm_shapes: Mapping[str, GemmShape],
    *,
    is_causal: bool = False,
    watched: Watched | None = None,
) -> Simulation:
    """Runs a batch through a machine; arguments as of `codesign.hw.simulator.simulate`.

    Without `source` in the trace nothing is predicted, and every key of the last mask is made.

    Raises:
      PresetError: If the simulator has no rules for this machine.
      UnknownNameError: If a linear site does not exist, or one of a block is missing.
    """
    storage, execution = _check_machine(spec)
    check_sites(gemm_shapes)
    lacking = [site for site in BLOCK_SITES if site not in gemm_shapes]
    if lacking:
        raise UnknownNameError(
            f"`gemm_shapes` lacks {', '.join(f'`{site}`' for site in lacking)}: add every linear layer of a block"
        )
    layers = [
        [
            _layer(trace, index, example, spec, gemm_shapes, is_causal)
            for example in range(len(trace.valid))
        ]
        for index in range(trace.packed.shape[0])
    ]

    work = collected([[one.counts for one in examples] for examples in layers])
    energies, busy = [], []
    for is_linear, part in enumerate(work.split(LINEAR, LINEAR_STREAMS)):
        energies.append(part.energy_pj(spec))
        moved = part.moved_bytes
        if is_linear:
            products = by_example([[one.linear.product_pj for one in some] for some in layers])
            energies[-1][execution] = energies[-1].get(execution, 0.0) + products
            for buffer in layers[0][0].linear.reads_pj:
                read = by_example(
                    [[one.linear.reads_pj[buffer] for one in some] for some in layers]
                )
                energies[-1][buffer] = energies[-1].get(buffer, 0.0) + read
            own = by_example([[one.linear.weight_bytes for one in some] for some in layers])
            moved = moved + own
            written = own + work.stream_bytes["generate_weights"]
            written_pj = written * _write_pj(spec, storage)
            energies[-1][storage.weights] = energies[-1].get(storage.weights, 0.0) + written_pj
        energies[-1]["dram"] = moved * energy.dram_pj_per_byte(spec)
        runs = [[one.whole if is_linear else one.alone for one in some] for some in layers]
        busy.append(
            {
                key: by_example([[one.busy_cycles[key] for one in some] for some in runs])
                for key in runs[0][0].busy_cycles
            }
        )
        busy[-1]["dram"] = moved / spec.dram_bytes_per_cycle
    for key in busy[0]:
        if key != "dram":
            busy[1][key] = busy[1][key] - busy[0][key]
    attention, whole = (
        by_example([[getattr(one, name).latency_cycles for one in some] for some in layers])
        for name in ("alone", "whole")
    )
    ends = _ends(trace, spec, gemm_shapes, storage, execution)
    return Simulation(
        operations=work.operations,
        stream_bytes=work.stream_bytes,
        busy_cycles=busy[0],
        attention_cycles=attention,
        unit_energy_pj=energies[0],
        own_busy_cycles=busy[1],
        own_cycles=whole - attention,
        own_energy_pj=energies[1],
        standing_pj_per_cycle=standing_pj_per_cycle(spec),
        host=no_host(len(trace.valid), len(layers)),
        own_end_cycles=ends.cycles,
        own_end_energy_pj=ends.energy_pj,
        timeline=[] if watched is None else layers[watched.layer][watched.example].whole.timeline,
    )


def _check_machine(spec: AcceleratorSpec) -> tuple[Storage, str]:
    """Returns the storage and the name of the array.

    Raises:
      PresetError: If the machine is not one of windows that runs its linear layers itself.
    """
    lacking = [] if spec.storage is not None else ["`storage`"]
    lacking += [] if spec.energy_table is not None else ["`energy_table`"]
    lacking += [] if spec.pipeline.rows_at_once is not None else ["`pipeline.rows_at_once`"]
    arrays = [name for name, unit in spec.units.items() if unit.rule == "groups"]
    if len(arrays) != 1 or not matches(LINEAR_MAC, spec.units[arrays[0]].paces):
        lacking.append("one unit of rule `groups` that is paced by `linear.mac` too")
    elif [name for stage in spec.pipeline.stages[1:] for name in stage][:1] != arrays:
        lacking.append(f"two `pipeline.stages`, the second led by `{arrays[0]}`")
    if lacking or spec.storage is None or len(spec.pipeline.stages) != 2:
        reason = ", ".join(lacking) or "two `pipeline.stages`"
        raise PresetError(
            f"{spec.name}: the window-by-window simulator needs {reason}: choose a machine of windows such as `esact`, "
            "or ask the cost model alone"
        )
    beyond = [name for name in ("host", "processing_elements") if getattr(spec, name) is not None]
    if spec.storage.activations is not None:
        beyond.append("storage.activations")
    if beyond:
        raise PresetError(
            f"{spec.name}: the window-by-window simulator knows no `{beyond[0]}`: remove it, or ask the cost model alone"
        )
    for name, unit in spec.units.items():
        if name not in arrays and (unit.rule != "flat" or unit.width is not None):
            raise PresetError(
                f"{spec.name}: `units.{name}.rule`: the simulator knows one unit of rule `groups`, and `flat` without "
                "`width` for the others: change the rule"
            )
    return spec.storage, arrays[0]


def _write_pj(spec: AcceleratorSpec, storage: Storage) -> float:
    return energy.buffer_pj_per_byte(spec, storage.weights)


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """Dense products of one layer: cycles of the whole array, queries by head `[H, W]`, others `[W]`; pJ; bytes.

    `reads_pj` are those of their operands, by memory.
    """

    query: np.ndarray
    others: np.ndarray
    product_pj: float
    reads_pj: dict[str, float]
    weight_bytes: float


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What one layer of one example takes: latency, working time by unit, cycles, and what its parts do meanwhile."""

    latency_cycles: float
    busy_cycles: dict[str, float]
    timeline: list[Span]


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer of one example: its counts, dense products, and its run without and with the linear layers."""

    counts: WindowCounts
    linear: _Linear
    alone: _Run
    whole: _Run


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """Linear layers outside the blocks, `[B, E]`."""

    cycles: np.ndarray
    energy_pj: dict[str, np.ndarray]


def _layer(
    trace: Trace,
    index: int,
    example: int,
    spec: AcceleratorSpec,
    gemm_shapes: Mapping[str, GemmShape],
    is_causal: bool,
) -> _Layer:
    """Returns what one layer of one example takes."""
    bits = {
        name: int(np.asarray(value)[index])
        for name, value in trace.bits.items()
        if np.ndim(value) == 1 and name.partition(".")[0] not in END_SITES
    }

    def decided(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else np.asarray(values[index, example])

    assert spec.pipeline.rows_at_once is not None
    compares = None if trace.compares is None else np.asarray(trace.compares[index])
    counts = count_windows(
        Decisions(
            keep=trace.keep(index)[example, :, -1],
            source=decided(trace.source),
            ffn_source=decided(trace.ffn_source),
            compares=compares,
            one_hot=decided(trace.one_hot),
            ffn_full=decided(trace.ffn_full),
        ),
        np.asarray(trace.valid[example], bool),
        bits,
        width=gemm_shapes["qkv"].inner,
        head_dim=trace.head_dim,
        window=int(spec.pipeline.rows_at_once.value),
        is_causal=is_causal,
        has_port=any(matches("fetch.bytes", unit.serves) for unit in spec.units.values()),
    )
    linear = _linear(counts, bits, trace.head_dim, spec, gemm_shapes)
    alone, whole = (_run(counts, linear, spec, has_linear=one) for one in (False, True))
    return _Layer(counts=counts, linear=linear, alone=alone, whole=whole)


def _linear(
    counts: WindowCounts,
    bits: Mapping[str, int],
    head_dim: int,
    spec: AcceleratorSpec,
    gemm_shapes: Mapping[str, GemmShape],
) -> _Linear:
    storage, name = _check_machine(spec)
    heads = counts.by_window["qk.mac"].shape[0]
    constant, product = energy.operation_pj(spec, name, "mac")
    reads = energy.reads_pj_per_bit(spec, name, LINEAR_MAC)
    cycles, spent, read_bits, weights = {}, 0.0, 0.0, 0.0
    rows = {"out": counts.tokens.astype(float)}
    for site in ("up", "down"):
        narrow = min(NARROW_BITS / bits[f"{site}.activation_bits"], 1.0)
        rows[site] = counts.ffn_tokens + narrow * counts.narrow_tokens
    for site in BLOCK_SITES:
        shape = gemm_shapes[site]
        pair = bits[f"{site}.activation_bits"], bits[f"{site}.weight_bits"]
        if site == "qkv":  # Queries alone: rows are those of each head.
            macs, size = (
                counts.query_rows * (shape.inner * head_dim),
                shape.inner * heads * head_dim,
            )
        else:
            macs, size = rows[site] * (shape.inner * shape.outer), shape.inner * shape.outer
        cycles[site] = macs / _slots(spec.units[name]) * _passes(spec.units[name], spec, pair)
        spent += float(macs.sum()) * (constant + product * pair[0] * pair[1])
        read_bits += float(macs.sum()) * pair[1]
        weights += size * pair[1] / units.BITS_PER_BYTE / storage.batch.value
    return _Linear(
        query=cycles["qkv"],
        others=cycles["out"] + cycles["up"] + cycles["down"],
        product_pj=spent,
        reads_pj={buffer: read_bits * price for buffer, price in reads.items()},
        weight_bytes=weights,
    )


def _slots(unit: Unit) -> float:
    """Returns operations per cycle of a unit."""
    slots = unit.lanes.value
    for factor in (unit.utilisation, unit.per_lane):
        slots *= 1.0 if factor is None else factor.value
    return slots


def _passes(unit: Unit, spec: AcceleratorSpec, widths: tuple[int, int]) -> float:
    """Returns passes through sliced operands."""
    passes = 1.0
    for width, piece in zip(widths, (unit.slice_a, unit.slice_b), strict=True):
        if piece is not None:
            passes *= np.ceil(width / piece.value)
            if unit.scaling == "au_scales" and spec.switches.au_scales.value:
                passes *= width / piece.value
    return passes


def _run(counts: WindowCounts, linear: _Linear, spec: AcceleratorSpec, *, has_linear: bool) -> _Run:
    """Moves the windows of one layer of one example through the machine."""
    busy: dict[str, float] = {}
    timeline: list[Span] = []
    rate = spec.dram_bytes_per_cycle
    overlaps = spec.switches.memory_overlaps.value
    moved = sum(
        value
        for key, value in counts.stream_bytes.items()
        if has_linear or key not in LINEAR_STREAMS
    )
    moved += linear.weight_bytes if has_linear else 0.0
    ready = np.zeros(len(counts.tokens))
    if overlaps:
        arrived = (
            counts.stream_bytes["tokens"] * np.cumsum(counts.tokens) / counts.tokens.sum() / rate
        )
        ready = arrived if counts.is_causal else np.full_like(arrived, arrived[-1])
    ready = _predict(counts, spec, ready, busy, timeline)
    ends = _execute(counts, linear, spec, ready, busy, timeline, has_linear=has_linear)
    computed = float(ends.max())
    last = counts.stream_bytes["ffn_output"] * counts.tokens[-1] / counts.tokens.sum()
    tokens = counts.stream_bytes["tokens"] / rate
    last = last / rate if has_linear and overlaps else 0.0
    others = moved / rate - tokens - last
    begin = 0.0 if overlaps else computed
    latency = max(computed + last, moved / rate) if overlaps else computed + moved / rate
    timeline += spans(
        DRAM,
        ["tokens", "weights, results", "last result"],
        np.asarray([begin, begin + tokens, max(computed, begin + tokens + others)]),
        np.asarray([tokens, others, last]),
    )
    if spec.switches.fill_and_drain.value:
        latency += spec.pipeline.drain.value
    return _Run(latency_cycles=latency, busy_cycles=busy, timeline=timeline)


def _predict(
    counts: WindowCounts,
    spec: AcceleratorSpec,
    ready: np.ndarray,
    busy: dict[str, float],
    timeline: list[Span],
) -> np.ndarray:
    """Returns when each window is predicted, `[W]`, in units chained on a window; adds what they do."""
    names = [f"window {window}" for window in range(len(ready))]
    starts, ends = ready, np.zeros(len(ready))
    for name in spec.pipeline.stages[0]:
        unit = spec.units[name]
        keys = [key for key in counts.operations if matches(key, unit.paces)]
        if not keys:
            continue
        by_key = {key: _flat(counts.by_window[key], unit, spec, counts.widths[key]) for key in keys}
        free = 0.0
        if "predict.shift_add" in by_key and not counts.is_causal:
            # Keys of all tokens come before the first scores.
            made = counts.by_window[PREDICTED_KEYS]
            own = counts.by_window["predict.shift_add"] - made
            first, by_key["predict.shift_add"] = (
                _flat(one, unit, spec, counts.widths["predict.shift_add"]) for one in (made, own)
            )
            free = float(ready[-1] + first.sum())
            busy[name] = float(first.sum())
            timeline += spans(name, ["all keys"], ready[-1:], first.sum(keepdims=True))
        cycles: np.ndarray = np.sum(list(by_key.values()), axis=0)
        busy[name] = busy.get(name, 0.0) + float(cycles.sum())
        starts, ends = chained(starts, ends, cycles, free)
        timeline += spans(name, names, starts, cycles)
    done: np.ndarray = np.maximum(ready, ends)
    return done


def _flat(
    count: np.ndarray, unit: Unit, spec: AcceleratorSpec, widths: tuple[int, int]
) -> np.ndarray:
    """Returns the cycles of a unit on windows, heads together, `[W]`."""
    cycles: np.ndarray = np.ceil(count.sum(axis=0) / _slots(unit)) * _passes(unit, spec, widths)
    return cycles


def _execute(
    counts: WindowCounts,
    linear: _Linear,
    spec: AcceleratorSpec,
    ready: np.ndarray,
    busy: dict[str, float],
    timeline: list[Span],
    *,
    has_linear: bool,
) -> np.ndarray:
    """Returns when each window has left the array and the units chained to it, `[W]`; adds what they do."""
    name, *others = spec.pipeline.stages[1]
    unit = spec.units[name]
    assert unit.groups is not None and unit.shares_heads is not None
    heads, windows = counts.by_window["qk.mac"].shape
    groups, shares = int(unit.groups.value), bool(unit.shares_heads.value)
    if not shares:
        groups = min(groups, heads)  # Groups left over join others, so that every head has one.
    slots = _slots(unit) / groups
    nothing = np.zeros((heads, windows))

    def taken(keys: tuple[str, ...]) -> np.ndarray:
        present = [key for key in keys if key in counts.operations and matches(key, unit.paces)]
        total = nothing
        for key in present:
            passes = _passes(unit, spec, counts.widths[key])
            total = total + np.ceil(counts.by_window[key] / slots) * passes
        return total

    is_linear = float(has_linear)
    work = GroupWork(
        make=taken(("generate.mac",)) * is_linear,
        query=np.ceil(linear.query * groups) * is_linear,
        attend=taken(("qk.mac", "pv.mac")),
        linear=np.ceil(linear.others) * is_linear,
        beside=[],
        groups=groups,
        shares_heads=shares,
    )
    by_head = work.make + work.query + work.attend
    busy[name] = float(by_head.sum() / groups + work.linear.sum())
    chained_units = []
    for other in others:
        keys = [
            key
            for key in counts.operations
            if matches(key, spec.units[other].paces) and (has_linear or key not in LINEAR)
        ]
        if keys:
            parts = [
                _flat(counts.by_window[key], spec.units[other], spec, counts.widths[key])
                for key in keys
            ]
            cycles: np.ndarray = np.sum(parts, axis=0)
            work.beside.append(cycles)
            chained_units.append(other)
            busy[other] = float(np.sum(cycles))
    passage = run_groups(work, ready)
    timeline += passage.spans([name, *chained_units])
    return passage.done


def _ends(
    trace: Trace,
    spec: AcceleratorSpec,
    gemm_shapes: Mapping[str, GemmShape],
    storage: Storage,
    name: str,
) -> _Ends:
    """Returns what linear layers outside the blocks take, one after the other on the whole array."""
    unit = spec.units[name]
    constant, product = energy.operation_pj(spec, name, "mac")
    tokens = np.asarray(trace.valid, bool).sum(axis=1)
    cycles = [np.zeros((len(tokens), 0))]
    reads = energy.reads_pj_per_bit(spec, name, LINEAR_MAC)
    parts = dict.fromkeys((name, storage.weights, "dram", *reads))
    spent: dict[str, list[np.ndarray]] = {part: [cycles[0]] for part in parts}
    for site in END_SITES:
        if site not in gemm_shapes:
            continue
        shape = gemm_shapes[site]
        pair = tuple(int(trace.bits[f"{site}.{side}_bits"][0]) for side in ("activation", "weight"))
        rows = tokens if shape.rows is None else np.full_like(tokens, shape.rows)
        macs = (rows * shape.inner * shape.outer)[:, None]
        weights = shape.inner * shape.outer * pair[1] / units.BITS_PER_BYTE / storage.batch.value
        own = np.full(macs.shape, float(weights))
        computed = np.ceil(macs / _slots(unit)) * _passes(unit, spec, (pair[0], pair[1]))
        cycles.append(np.maximum(computed, own / spec.dram_bytes_per_cycle))
        spent[name].append(macs * (constant + product * pair[0] * pair[1]))
        of_memory = {buffer: macs * (pair[1] * price) for buffer, price in reads.items()}
        written = own * _write_pj(spec, storage)
        of_memory[storage.weights] = of_memory.get(storage.weights, 0.0) + written
        for buffer, pj in of_memory.items():
            spent[buffer].append(pj)
        spent["dram"].append(own * energy.dram_pj_per_byte(spec))
    return _Ends(
        cycles=np.concatenate(cycles, axis=1),
        energy_pj={part: np.concatenate(values, axis=1) for part, values in spent.items()},
    )
