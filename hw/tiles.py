"""How long a pipeline of tiles takes beyond its slowest stage, where each lane takes a query row.

Rules: docs/cost_model.md, section 6. Heads follow one another; in a head its blocks of rows, in a block the tiles of keys
move through the stages. Arrays are `[B, L]` or, by head, `[B, L, H]`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from codesign.hw.accelerator import Accelerator, UnitStructure
from codesign.hw.engine import head_cycles, lanes_of
from codesign.hw.host import ceil
from codesign.hw.traffic import stream_bytes
from codesign.workload import Workload

OF_KEYS = ("predict", "generate")
"""Stages whose operations go with a key of a head, done when its first block of rows wants it."""
SHARED_STREAMS = ("tokens", "generate_tokens")
"""Streams that come once for all heads: with the first one."""
BEFORE_STREAMS = ("tokens", "weight_codes", "query")
"""Streams that the first tile of a head waits for."""


@struct.dataclass
class _Stage:
    """A stage's cycles by head: all, those before the next stage can start, those after the stage before is done."""

    total: jax.Array
    first: jax.Array
    last: jax.Array


def tile_fill(workload: Workload, accelerator: Accelerator) -> jax.Array:
    """Returns by how much a layer takes longer than its slowest stage or main memory, cycles, `[B, L]`.

    Stages overlap within and between heads: one starts a head when it has ended the one before, and when the stage before
    has done the first tile; it ends no earlier than its own last tile after the stage before. The fill is what that
    takes beyond the slowest.
    """
    structure = accelerator.structure
    stages = [
        _slowest(present)
        for names in structure.stages
        if (present := _units_of(names, workload, accelerator))
    ]
    output = jnp.zeros(())
    if structure.memory_overlaps:
        memory, output = _memory(workload, accelerator)
        stages = [memory, *stages]
    shape = jnp.broadcast_shapes(*(stage.total.shape for stage in stages))
    by_head = jax.tree.map(lambda leaf: jnp.moveaxis(jnp.broadcast_to(leaf, shape), 2, 0), stages)

    def head(ends: list[jax.Array], stages: list[_Stage]) -> tuple[list[jax.Array], None]:
        done: list[jax.Array] = []
        ready = jnp.zeros_like(ends[0])
        for end, stage in zip(ends, stages, strict=True):
            start = jnp.maximum(end, ready)
            finish = start + stage.total
            done.append(jnp.maximum(finish, done[-1] + stage.last) if done else finish)
            ready = start + stage.first
        return done, None

    ends = [jnp.zeros(shape[:2], stage.total.dtype) for stage in stages]
    latest = jax.lax.scan(head, ends, by_head)[0][-1] + output
    totals = [jnp.sum(stage.total, axis=2) for stage in stages]
    if structure.memory_overlaps:
        totals[0] = totals[0] + output
    return latest - functools.reduce(jnp.maximum, totals)


def _units_of(names: tuple[str, ...], workload: Workload, accelerator: Accelerator) -> list[_Stage]:
    """Returns the units of a stage that work; chained ones work on the same tile."""
    units = [unit for unit in accelerator.structure.units if unit.name in names]
    # A statistic of a row needs all its tiles.
    holds_rows = any(key.endswith(".statistic") for unit in units for key in unit.paces)
    present = [_unit(unit, workload, accelerator, holds_rows) for unit in units]
    return [stage for stage in present if stage is not None]


def _unit(
    unit: UnitStructure, workload: Workload, accelerator: Accelerator, holds_rows: bool
) -> _Stage | None:
    """Returns a unit's cycles by head; None if it does nothing."""
    rows, tiles = _rows_and_tiles(workload, accelerator)
    by_key, by_pair = (
        head_cycles(
            unit,
            workload.replace(  # type: ignore[attr-defined]
                operations={
                    name: value
                    for name, value in workload.operations.items()
                    if (name.partition(".")[0] in OF_KEYS) == of_keys
                }
            ),
            accelerator.sizes,
        )
        for of_keys in (True, False)
    )
    if not by_key and not by_pair:
        return None
    none = jnp.zeros((1, 1, 1))
    keys, pairs = (
        functools.reduce(jnp.maximum, parts.values(), none) for parts in (by_key, by_pair)
    )
    by_query = [one for one in accelerator.structure.units if one.rule == "blocks"]
    paced = [unit] if unit.rule == "blocks" else by_query
    blocks = functools.reduce(
        jnp.maximum, [ceil(rows / lanes_of(one, accelerator.sizes)) for one in paced]
    )
    first = keys + pairs / blocks
    return _Stage(
        total=keys + pairs,
        first=first if holds_rows else first / tiles,
        last=(pairs + (keys if unit.rule == "flat" else 0.0)) / (blocks * tiles),
    )


def _rows_and_tiles(workload: Workload, accelerator: Accelerator) -> tuple[jax.Array, jax.Array]:
    """Returns the rows of a head, at least 1, and the tiles of keys that they make, `[B, L, H]`."""
    rows = jnp.maximum(workload.rows["attention"].queries, 1.0)
    return rows, ceil(rows / accelerator.structure.rows_at_once)


def _slowest(units: list[_Stage]) -> _Stage:
    slowest: _Stage = jax.tree.map(lambda *parts: functools.reduce(jnp.maximum, parts), *units)
    return slowest


def _memory(workload: Workload, accelerator: Accelerator) -> tuple[_Stage, jax.Array]:
    """Returns main memory as the first stage, and the cycles of what is written at the very end, `[B, L]`."""
    rows, tiles = _rows_and_tiles(workload, accelerator)
    heads = rows.shape[2]
    rate = accelerator.sizes["dram.bytes_per_cycle"]

    def cycles(names: set[str]) -> jax.Array:
        streams = {name: value for name, value in workload.streams.items() if name in names}
        if not streams:
            return jnp.zeros((1, 1))
        return stream_bytes(workload.replace(streams=streams), accelerator) / rate  # type: ignore[attr-defined]

    names = set(workload.streams)
    shared, before = set(SHARED_STREAMS) & names, set(BEFORE_STREAMS) & names
    is_first = (jnp.arange(heads) == 0).astype(rows.dtype)[None, None, :]

    def by_head(names: set[str]) -> jax.Array:
        own = cycles(names - shared)[..., None] / heads
        return own + is_first * cycles(names & shared)[..., None]

    output = cycles({"output"}) / heads
    is_last = (jnp.arange(heads) == heads - 1).astype(rows.dtype)[None, None, :]
    total = by_head(names) - is_last * output[..., None]
    first = by_head(before) / tiles
    return _Stage(total=total, first=first, last=jnp.zeros_like(first)), output
