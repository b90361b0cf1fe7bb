"""How long layers take on lanes that are dealt tiles: operations wait for one another, for lanes and for memories.

Rules: docs/cost_model.md, section 5. A step is one operation of every head, heads one behind the other on the same lanes;
a batch of examples like the one that is priced runs together. Arrays are `[B, L, H]`, inside a layer `[B, H]`; times are
cycles of the batch.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from codesign.hw.accelerator import Accelerator, UnitStructure
from codesign.hw.engine import lanes_of
from codesign.hw.gemm.counting import ceil
from codesign.hw.lane_steps import (
    STEPS,
    Step,
    end_step,
    layer_steps,
    nothing_moved,
    spilling,
)
from codesign.hw.lane_tiles import Tiles
from codesign.vocabulary import LINEAR_SITES
from codesign.workload import Workload

_BY_HEAD = ("scores", "softmax", "attention", "out")
"""Steps that wait for their own head alone; values are needed by `attention`."""


@struct.dataclass
class _Clock:
    """When lanes can take more and the last tile has been issued, by unit, and when memories are free, `[B]`."""

    free: dict[str, jax.Array]
    issued: dict[str, jax.Array]
    written: jax.Array
    masked: jax.Array


@struct.dataclass
class LaneLatency:
    """Cycles per example: of attention alone and of whole layers `[B, L]`, of linear layers outside them `[B, E]`."""

    attention: jax.Array
    layers: jax.Array
    ends: jax.Array


def lane_latency(workload: Workload, accelerator: Accelerator) -> LaneLatency:
    """Returns the latencies of a workload on a machine that deals tiles to lanes."""
    storage = accelerator.structure.storage
    assert storage is not None
    whole = layer_steps(workload, accelerator)
    alone = {
        name: step.replace(tiles=None, loaded=nothing_moved()) if name == "made" else step  # type: ignore[attr-defined]
        for name, step in whole.items()
        if name in ("made", "scores", "softmax", "attention")
    }
    alone = spilling(alone, accelerator)
    whole = spilling(whole, accelerator)
    batch = max(leaf.shape[0] for leaf in jax.tree.leaves(whole))
    behind = jnp.zeros((batch,))
    ends = {}
    attention, _ = _layers(alone, behind, accelerator)
    if "embed" in workload.end_gemms:
        # It comes first: nothing hides its weights.
        ends["embed"], behind = _end("embed", workload, behind, accelerator)
    layers, behind = _layers(whole, behind, accelerator)
    for site in LINEAR_SITES:
        if site in workload.end_gemms and site not in ends:
            ends[site], behind = _end(site, workload, behind, accelerator)
    drain = accelerator.structure.drain_cycles
    in_order = [ends[site] for site in LINEAR_SITES if site in ends]
    return LaneLatency(
        attention=attention / storage.batch + drain,
        layers=layers / storage.batch + drain,
        ends=jnp.stack(in_order, axis=1) / storage.batch if in_order else behind[:, None][:, :0],
    )


def _layers(
    steps: dict[str, Step], behind: jax.Array, accelerator: Accelerator
) -> tuple[jax.Array, jax.Array]:
    """Returns the times of layers `[B, L]`, and when main memory is free after the end of the last, `[B]`.

    Args:
      steps: Their steps.
      behind: When main memory is free after the start of the first; below 0 where it was before.
      accelerator: The machine.
    """
    batch = behind.shape[0]
    depth = max(leaf.shape[1] for leaf in jax.tree.leaves(steps))
    by_layer = jax.tree.map(
        lambda leaf: jnp.moveaxis(jnp.broadcast_to(leaf, (batch, depth, leaf.shape[2])), 1, 0),
        steps,
    )

    def layer(behind: jax.Array, own: dict[str, Step]) -> tuple[jax.Array, jax.Array]:
        end, behind = _layer(own, behind, accelerator)
        return behind, end

    behind, ends = jax.lax.scan(layer, behind, by_layer)
    return jnp.moveaxis(ends, 0, 1), behind


def _end(
    site: str, workload: Workload, behind: jax.Array, accelerator: Accelerator
) -> tuple[jax.Array, jax.Array]:
    """Returns the same of a linear layer outside the layers, `[B]`."""
    step = end_step(site, workload, accelerator)
    times, behind = _layers(spilling({"end": step}, accelerator), behind, accelerator)
    return times[:, 0], behind


def _layer(
    steps: dict[str, Step], behind: jax.Array, accelerator: Accelerator
) -> tuple[jax.Array, jax.Array]:
    """Returns when a layer that starts at 0 ends, and when main memory is free after that, `[B]`; leaves `[B, H]`."""
    structure, rate = accelerator.structure, accelerator.sizes["dram.bytes_per_cycle"]
    none = jnp.zeros_like(behind)
    names = [unit.name for unit in structure.units]
    clock = _Clock(
        free=dict.fromkeys(names, none),
        issued=dict.fromkeys(names, none),
        written=none,
        masked=none,
    )
    dram, total, fitted = behind, none, none
    ends: dict[str, jax.Array] = {}
    for name in (one for one in STEPS if one in steps):
        step = steps[name]
        ready = _ready(name, ends, none[:, None])
        load = _load_cycles(step, accelerator)
        moved = jnp.sum(load, axis=1)
        if structure.memory_overlaps:
            ready = jnp.maximum(
                ready, jnp.where(load > 0.0, dram[:, None] + jnp.cumsum(load, axis=1), 0.0)
            )
        begin, end, clock = _run(step, ready, clock, accelerator)
        back = step.spilled / rate
        if structure.memory_overlaps:
            # It goes before weights, in turn.
            done = _in_turn(begin, back, fitted)
            end = jnp.maximum(end, jnp.where(back > 0.0, done, 0.0))
            fitted = jnp.max(jnp.where(back > 0.0, done, fitted[:, None]), axis=1)
        gone = jnp.sum(back, axis=1)
        dram = dram + moved
        # What does not fit cannot be moved before the layer runs.
        dram = jnp.where(gone > 0.0, jnp.maximum(dram, 0.0) + gone, dram)
        total = total + moved + gone
        ends[name] = end
    last = jnp.max(jnp.stack([jnp.max(end, axis=1) for end in ends.values()]), axis=0)
    if not structure.memory_overlaps:
        last = last + total
    return last, dram - last


def _ready(name: str, ends: dict[str, jax.Array], entry: jax.Array) -> jax.Array:
    """Returns when what a step needs is there, `[B, H]`, 1 where heads wait for one another."""
    before = ends.get(STEPS[name], entry)
    if name not in _BY_HEAD:
        return jnp.max(before, axis=1, keepdims=True)
    if name == "scores" and "made" in ends:
        return jnp.maximum(before[:, 0::3], before[:, 1::3])
    if name == "attention" and "made" in ends:
        return jnp.maximum(before, ends["made"][:, 2::3])
    return before


def _load_cycles(step: Step, accelerator: Accelerator) -> jax.Array:
    """Returns when main memory has moved weights through their memories, `[B, H]`, one after the other."""
    structure = accelerator.structure
    storage, loaded = structure.storage, step.loaded
    assert storage is not None
    rates = {buffer.name: buffer.bytes_per_cycle for buffer in structure.buffers}
    cycles = (loaded.data + loaded.masks) / accelerator.sizes["dram.bytes_per_cycle"]
    cycles = jnp.maximum(cycles, loaded.data / rates[storage.weights])
    if storage.masks is not None:
        cycles = jnp.maximum(cycles, loaded.masks / rates[storage.masks])
    return cycles


def _run(
    step: Step, ready: jax.Array, clock: _Clock, accelerator: Accelerator
) -> tuple[jax.Array, jax.Array, _Clock]:
    """Returns when the operation of each head begins and ends, `[B, H]`, and the clock behind it."""
    structure = accelerator.structure
    storage = structure.storage
    assert storage is not None and storage.activations is not None
    unit = next(unit for unit in structure.units if unit.name == step.unit)
    free, issued = dict(clock.free), dict(clock.issued)
    begin = end = ready
    if step.tiles is not None:
        begin, end, free[unit.name], issued[unit.name] = _dealt(
            step.tiles, ready, clock.free[unit.name], clock.issued[unit.name], unit, accelerator
        )
    rates = {buffer.name: buffer.bytes_per_cycle for buffer in structure.buffers}
    written, masked = clock.written, clock.masked
    for name, moved in (
        (storage.activations, step.written.data),
        (storage.masks, step.written.masks),
    ):
        if name is None or math.isinf(rates[name]):
            continue
        done = _in_turn(
            begin, moved / rates[name], written if name == storage.activations else masked
        )
        end = jnp.maximum(end, jnp.where(moved > 0.0, done, 0.0))
        if name == storage.activations:
            written = done[:, -1]
        else:
            masked = done[:, -1]
    return begin, end, _Clock(free=free, issued=issued, written=written, masked=masked)


def _in_turn(ready: jax.Array, cycles: jax.Array, free: jax.Array) -> jax.Array:
    """Returns when things that take a resource one after the other are done, `[B, H]`."""
    shape = jnp.broadcast_shapes(ready.shape, cycles.shape)
    cycles = jnp.broadcast_to(cycles, shape)
    passed = jnp.cumsum(cycles, axis=1)
    start = jnp.maximum(jnp.broadcast_to(ready, shape), free[:, None]) - (passed - cycles)
    return passed + jax.lax.cummax(start, axis=1)


def _dealt(
    tiles: Tiles,
    ready: jax.Array,
    free: jax.Array,
    issued: jax.Array,
    unit: UnitStructure,
    accelerator: Accelerator,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns begin and end of the operation of each head, `[B, H]`, and when lanes can take more and all is issued, `[B]`.

    Lanes are dealt the tiles of all heads in waves; short ones fill the gaps that long ones leave, so that a wave takes as
    long as the tile in which the mean cycle lies, and the last one as long as the longest.
    """
    lanes = lanes_of(unit, accelerator.sizes)
    shape = jnp.broadcast_shapes(ready.shape, tiles.number.shape, tiles.mean.shape)
    ready = jnp.broadcast_to(ready, shape)
    number = jnp.broadcast_to(tiles.number, shape)
    start = jnp.maximum(jnp.min(ready, axis=1), free)[:, None]
    wave = tiles.mean * tiles.weighted
    passed = jnp.cumsum(number, axis=1) / lanes / tiles.weighted
    waves = jnp.maximum(ceil(passed * (1.0 - 1e-5)), 1.0)
    end = jnp.maximum(ready, start + (waves - 1.0) * wave) + tiles.largest
    before = jnp.floor(passed - number / lanes / tiles.weighted)
    begin = jnp.maximum(ready, start + jnp.maximum(before, 0.0) * wave)
    free = start[:, 0] + jnp.sum(number * tiles.mean, axis=1) / lanes
    if math.isfinite(unit.issue_rate):
        each = jnp.broadcast_to(tiles.started / (lanes * unit.per_lane * unit.issue_rate), shape)
        done = _in_turn(ready, each, issued)
        end = jnp.maximum(end, done - each / number + tiles.largest)
        issued = done[:, -1]
    return begin, end, free, issued
