"""Operation-by-operation simulator of machines whose lanes take tiles and skip zeros, on actual tensors; NumPy only.

Every matrix product of a layer, linear or of attention, is cut into tiles that lanes of all processing elements take as
they are free; a tile takes as long as it has products without a zero. Softmax, norms and non-linearities are tiles of
elements on their own units. Operations wait for those that they need, heads run side by side, and weights come while
earlier operations run.

References:
  AccelTran (arXiv 2302.14705): tiles, lanes, units, zero-free storage with masks. What waits for what, the dealing of tiles
  and the spilling are reconstructions, docs/cost_model.md section 8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from codesign.errors import PresetError, UnknownNameError
from codesign.hw import energy
from codesign.hw.lane_counts import (
    Bytes,
    LayerTensors,
    Operation,
    attention_alone,
    dense_tensors,
    end_operation,
    layer_operations,
)
from codesign.hw.lane_schedule import LaneMachine, Lanes, LayerRun, run_layers
from codesign.hw.simulation import (
    END_SITES,
    GemmShape,
    Simulation,
    Trace,
    check_sites,
    no_host,
    operation_energy,
    standing_pj_per_cycle,
)
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.spec_tables import Storage
from codesign.hw.timeline import Span, Watched, shifted
from codesign.vocabulary import BLOCK_SITES, LINEAR_OPERATIONS

_HEADS = ("query", "key", "value", "scores", "probabilities")


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """A machine that the simulator has rules for."""

    spec: AcceleratorSpec
    storage: Storage
    activations: str
    elements: float
    tile: int
    lanes: LaneMachine


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What a part of a layer takes, per example: working time and energy by unit and memory."""

    busy: dict[str, float]
    energy_pj: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Example:
    """One example: parts and latencies by layer, and of the linear layers outside, cycles per example.

    `timelines` are by layer, in cycles of the batch.
    """

    attention: list[_Part]
    linear: list[_Part]
    ends: list[_Part]
    attention_cycles: list[float]
    own_cycles: list[float]
    end_cycles: list[float]
    timelines: list[list[Span]]


def simulate_lanes(
    trace: Trace,
    spec: AcceleratorSpec,
    gemm_shapes: Mapping[str, GemmShape],
    *,
    is_causal: bool = False,
    watched: Watched | None = None,
) -> Simulation:
    """Runs a batch through a machine; arguments as of `codesign.hw.simulator.simulate`.

    Every example stands for a batch of examples like it, that share a load of weights, and pays its part of the time. A
    trace without `nonzero` elements has no zeros.

    Raises:
      PresetError: If the simulator has no rules for this machine.
      UnknownNameError: If a linear site does not exist, or one of a block is missing.
    """
    machine = _check_machine(spec)
    check_sites(gemm_shapes)
    lacking = [site for site in BLOCK_SITES if site not in gemm_shapes]
    if lacking:
        raise UnknownNameError(
            f"`gemm_shapes` lacks {', '.join(f'`{site}`' for site in lacking)}: add every linear layer of a block"
        )
    examples = [
        _example(trace, index, machine, gemm_shapes, is_causal) for index in range(len(trace.valid))
    ]

    def parts(name: str, kind: str) -> dict[str, np.ndarray]:
        tables: list[list[dict[str, float]]] = [
            [getattr(part, kind) for part in getattr(one, name)] for one in examples
        ]
        return {
            key: np.asarray([[one[key] for one in layers] for layers in tables], np.float64)
            for key in (tables[0][0] if tables[0] else {})
        }

    def cycles(name: str) -> np.ndarray:
        return np.asarray([getattr(one, name) for one in examples], np.float64)

    attention_cycles = cycles("attention_cycles")
    counts, energies = _counts(trace, is_causal), parts("attention", "energy_pj")
    qk, v = (np.asarray(trace.bits[name], np.int64) for name in ("qk_bits", "v_bits"))
    # What rides along takes no time, but energy where a file prices it.
    riding = {"softmax.reciprocal": (qk, qk), "output.multiply": (qk, v)}
    own = {key: counts[key] for key in riding}
    for unit, spent in operation_energy(own, riding, spec).items():
        energies[unit] = energies[unit] + spent
    return Simulation(
        operations=counts,
        stream_bytes={},
        busy_cycles=parts("attention", "busy"),
        attention_cycles=attention_cycles,
        unit_energy_pj=energies,
        own_busy_cycles=parts("linear", "busy"),
        own_cycles=cycles("own_cycles"),
        own_energy_pj=parts("linear", "energy_pj"),
        standing_pj_per_cycle=standing_pj_per_cycle(spec),
        host=no_host(*attention_cycles.shape),
        own_end_cycles=cycles("end_cycles"),
        own_end_energy_pj=parts("ends", "energy_pj"),
        timeline=[] if watched is None else examples[watched.example].timelines[watched.layer],
    )


def _check_machine(spec: AcceleratorSpec) -> _Checked:
    """Returns the machine as the simulator reads it.

    Raises:
      PresetError: If it is not one of processing elements that runs its linear layers from a memory of activations.
    """
    elements, storage = spec.processing_elements, spec.storage
    lacking = [] if storage is not None else ["`storage`"]
    if storage is not None and storage.activations is None:
        lacking.append("`storage.activations`")
    if elements is None:
        lacking.append("`processing_elements`")
    elif elements.tile is None:
        lacking.append("`processing_elements.tile`")
    if (
        lacking
        or storage is None
        or storage.activations is None
        or elements is None
        or elements.tile is None
    ):
        raise PresetError(
            f"{spec.name}: the simulator of lanes that take tiles needs {', '.join(lacking)}: choose a machine such as "
            "`acceltran-edge`, or ask the cost model alone"
        )
    for name, unit in spec.units.items():
        unknown = [
            field for field in ("width", "slice_a", "slice_b") if getattr(unit, field) is not None
        ]
        if unit.rule != "flat" or unknown:
            field = unknown[0] if unit.rule == "flat" else "rule"
            raise PresetError(
                f"{spec.name}: `units.{name}.{field}`: the simulator of lanes that take tiles knows rule `flat` without "
                "widths and slices: change it, or ask the cost model alone"
            )

    def rate(name: str | None) -> float:
        memory = None if name is None else spec.memories[name]
        bandwidth = None if memory is None else memory.bandwidth
        return np.inf if bandwidth is None else bandwidth.base / spec.clock_hz

    paced = (*LINEAR_OPERATIONS, "qk.mac", "pv.mac", "softmax.exp")
    lanes = LaneMachine(
        units={name: _lanes(spec, name, elements.count.value) for name in spec.units},
        unit_of={key: spec.unit_of(key) for key in paced},
        dram_rate=spec.dram_bytes_per_cycle,
        weight_rate=rate(storage.weights),
        activation_rate=rate(storage.activations),
        mask_rate=rate(storage.masks),
        activation_bytes=spec.memories[storage.activations].capacity.base,
        weight_bytes=spec.memories[storage.weights].capacity.base,
        batch=int(storage.batch.value),
        overlaps=spec.switches.memory_overlaps.value,
    )
    return _Checked(
        spec=spec,
        storage=storage,
        activations=storage.activations,
        elements=elements.count.value,
        tile=int(elements.tile.value),
        lanes=lanes,
    )


def _lanes(spec: AcceleratorSpec, name: str, elements: float) -> Lanes:
    unit = spec.units[name]
    number = max(1, round(unit.lanes.value * elements))
    per_lane = 1.0 if unit.per_lane is None else unit.per_lane.value
    per_lane *= 1.0 if unit.utilisation is None else unit.utilisation.value
    started = np.inf if unit.issue_rate is None else number * per_lane * unit.issue_rate.value
    return Lanes(number=number, per_lane=per_lane, started_per_cycle=started)


def _counts(trace: Trace, is_causal: bool) -> dict[str, np.ndarray]:
    """Returns the operations of exact attention, zeros included, heads summed, `[B, L]`."""
    tokens = np.asarray(trace.valid, bool).sum(axis=1).astype(np.float64)
    num_layers, heads = trace.packed.shape[0], trace.packed.shape[2]
    pairs = tokens * (tokens + 1) / 2 if is_causal else tokens**2
    by_example = {
        "qk.mac": pairs * trace.head_dim,
        "softmax.exp": pairs,
        "softmax.reciprocal": tokens,
        "pv.mac": pairs * trace.head_dim,
        "output.multiply": tokens * trace.head_dim,
    }
    return {
        key: np.repeat(heads * count[:, None], num_layers, axis=1)
        for key, count in by_example.items()
    }


def _tensors(
    trace: Trace,
    layer: int,
    example: int,
    gemm_shapes: Mapping[str, GemmShape],
    is_causal: bool,
) -> LayerTensors:
    """Returns which elements of a layer of an example are not zero, of tokens that exist."""
    valid = np.asarray(trace.valid[example], bool)
    exists = np.ones((valid.sum(),) * 2, bool)
    exists = np.tril(exists) if is_causal else exists
    if not trace.nonzero:
        shapes = {site: (gemm_shapes[site].inner, gemm_shapes[site].outer) for site in BLOCK_SITES}
        return dense_tensors(len(exists), trace.packed.shape[2], trace.head_dim, shapes, exists)
    found = {site: trace.nonzero[site].layer(layer) for site in (*_HEADS, *BLOCK_SITES)}
    heads = {site: found[site][example][:, valid] for site in _HEADS}
    for site in ("scores", "probabilities"):
        heads[site] = heads[site][:, :, valid]
    return LayerTensors(
        entering={site: found[site][example][valid] for site in BLOCK_SITES},
        heads=heads,
        weights={site: trace.nonzero[f"{site}.weight"].layer(layer) for site in BLOCK_SITES},
        exists=exists,
    )


def _example(
    trace: Trace,
    example: int,
    machine: _Checked,
    gemm_shapes: Mapping[str, GemmShape],
    is_causal: bool,
) -> _Example:
    """Runs one example, or rather a batch of such, through the machine."""
    has_masks = machine.storage.masks is not None
    layers = []
    for layer in range(trace.packed.shape[0]):
        bits = {
            name: int(np.asarray(value)[layer])
            for name, value in trace.bits.items()
            if name.partition(".")[0] not in END_SITES and np.ndim(value) == 1
        }
        layers.append(
            layer_operations(
                _tensors(trace, layer, example, gemm_shapes, is_causal),
                bits,
                tile=machine.tile,
                has_masks=has_masks,
                stores_scores=machine.storage.stores_scores.value,
            )
        )
    ends = {}
    for site in END_SITES:
        if site in gemm_shapes:
            shape = gemm_shapes[site]
            rows = int(np.sum(trace.valid[example])) if shape.rows is None else shape.rows
            pair = tuple(
                int(trace.bits[f"{site}.{side}_bits"][0]) for side in ("activation", "weight")
            )
            ends[site] = end_operation(
                site,
                rows,
                shape.inner,
                shape.outer,
                (pair[0], pair[1]),
                tile=machine.tile,
                has_masks=has_masks,
            )
    # The embedding comes first, everything else last; each is a layer of its own.
    first = [[ends["embed"]]] if "embed" in ends else []
    last = [[one] for site, one in ends.items() if site != "embed"]
    runs = run_layers([*first, *layers, *last], machine.lanes)
    batch = machine.lanes.batch
    cycles = np.diff([0.0, *(run.end for run in runs)]) / batch
    inside = slice(len(first), len(first) + len(layers))
    drain = machine.spec.pipeline.drain.value if machine.spec.switches.fill_and_drain.value else 0.0
    attention, linear, attention_cycles = [], [], []
    for operations, run in zip(layers, runs[inside], strict=True):
        alone = attention_alone(operations)
        (alone_run,) = run_layers([alone], machine.lanes)
        whole = _priced(operations, run, machine)
        attention.append(_priced(alone, alone_run, machine))
        linear.append(_difference(whole, attention[-1], machine))
        attention_cycles.append(alone_run.end / batch + drain)
    end_runs = [*runs[: len(first)], *runs[inside.stop :]]
    return _Example(
        attention=attention,
        linear=linear,
        ends=[
            _priced(part, run, machine) for part, run in zip([*first, *last], end_runs, strict=True)
        ],
        attention_cycles=attention_cycles,
        own_cycles=list(cycles[inside] + drain - np.asarray(attention_cycles)),
        end_cycles=[*cycles[: len(first)], *cycles[inside.stop :]],
        timelines=[shifted(run.spans, -run.begin) for run in runs[inside]],
    )


def _difference(whole: _Part, attention: _Part, machine: _Checked) -> _Part:
    """Returns what attention leaves of the whole, on units that linear layers use and in memories."""
    used = {machine.lanes.unit_of[key] for key in LINEAR_OPERATIONS}
    idle = machine.lanes.units.keys() - used

    def left(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
        return {key: value - other.get(key, 0.0) for key, value in one.items() if key not in idle}

    return _Part(
        busy=left(whole.busy, attention.busy),
        energy_pj=left(whole.energy_pj, attention.energy_pj),
    )


def _priced(operations: Sequence[Operation], run: LayerRun, machine: _Checked) -> _Part:
    """Returns working time and energy of operations, per example."""
    spec, storage, batch = machine.spec, machine.storage, machine.lanes.batch
    memories = {"weight": storage.weights, "activation": machine.activations, "mask": storage.masks}
    busy: dict[str, float] = {}
    for name, cycles in run.busy.items():
        name = memories.get(name, name) or ""
        if name:
            busy[name] = busy.get(name, 0.0) + cycles / batch
    spent: dict[str, float] = {}

    def add(name: str, pj: float) -> None:
        spent[name] = spent.get(name, 0.0) + pj

    for one in operations:
        name = machine.lanes.unit_of[one.key]
        constant, product = energy.operation_pj(spec, name, one.key.partition(".")[2])
        count = float(one.effectual.sum())
        if len(one.effectual):
            add(name, count * (constant + product * one.bits[0] * one.bits[1]))
            for buffer, price in energy.reads_pj_per_bit(spec, name, one.key).items():
                add(buffer, count * one.bits[1] * price)
    loads, writes = (
        Bytes(data=sum(part.data for part in some), masks=sum(part.masks for part in some))
        for some in ([one.loads for one in operations], [one.writes for one in operations])
    )
    add("dram", (loads.total + run.spilled) / batch * energy.dram_pj_per_byte(spec))
    add(machine.activations, writes.data * energy.stored_pj_per_byte(spec, machine.activations))
    if loads.total:
        add(storage.weights, loads.data / batch * energy.stored_pj_per_byte(spec, storage.weights))
    if storage.masks is not None:
        masks = loads.masks / batch + writes.masks
        add(storage.masks, masks * energy.stored_pj_per_byte(spec, storage.masks))
    elements = spec.processing_elements
    assert elements is not None
    if elements.driven_by in busy:
        drawn = machine.elements * energy.modules_dynamic_pj(spec, elements.modules)
        add("processing_elements", busy[elements.driven_by] * drawn)
    return _Part(busy=busy, energy_pj=spent)
