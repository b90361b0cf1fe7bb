"""How long a pipeline of tiles takes beyond its slowest stage, where each lane takes a query row.

Rules: docs/cost_model.md, section 6. Heads follow one another; in a head its blocks of rows, in a block the tiles of keys
move through the stages. Arrays are `[B, L]` or, by head, `[B, L, H]`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from codesign import gates
from codesign.hw.accelerator import Accelerator
from codesign.hw.engine import head_cycles, lanes_of
from codesign.hw.gemm.counting import ceil
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
    """A stage's cycles by head: all, what goes with keys and with pairs, and the blocks of rows that it works on.

    `holds_rows`: nothing that follows can start before all tiles of a block are done.
    """

    total: jax.Array
    keys: jax.Array
    pairs: jax.Array
    blocks: jax.Array
    holds_rows: bool = struct.field(pytree_node=False)
    makes_keys: bool = struct.field(pytree_node=False)


@struct.dataclass
class _Step:
    """A stage's cycles by head: all, and for each stage before it what of that lies ahead, and what of its own behind.

    `ahead[i]` of stage i is done when this one can start; `behind[i]` of this one is left when stage i is done.
    """

    total: jax.Array
    ahead: list[jax.Array]
    behind: list[jax.Array]


def tile_fill(workload: Workload, accelerator: Accelerator) -> jax.Array:
    """Returns by how much a layer takes longer than its slowest stage or main memory, cycles, `[B, L]`.

    Stages overlap within and between heads: one starts a head when it has ended the one before, and when the stage before
    has done the first tile; it ends no earlier than its own last tile after the stage before. The fill is what that
    takes beyond the slowest.
    """
    structure = accelerator.structure
    rows = jnp.maximum(workload.rows["attention"].queries, 1.0)
    tiles = ceil(rows / structure.rows_at_once)
    found = (_stage(names, workload, accelerator, rows) for names in structure.stages)
    stages = [stage for stage in found if stage is not None]
    for index, stage in enumerate(stages):
        if stage.makes_keys:
            # As the blocks of the stage before want them, or of the one behind.
            near = stages[index - 1 if index else min(1, len(stages) - 1)]
            stages[index] = stage.replace(blocks=near.blocks)  # type: ignore[attr-defined]
    steps = [
        _Step(
            total=stage.total,
            ahead=[_ahead(before, stage, tiles) for before in stages[:index]],
            behind=[_behind(before, stage, tiles) for before in stages[:index]],
        )
        for index, stage in enumerate(stages)
    ]
    output = jnp.zeros(())
    if structure.memory_overlaps:
        moved, waited, output = _memory(workload, accelerator, _parts(stages[0], tiles))
        steps = [
            _Step(total=moved, ahead=[], behind=[]),
            *(
                _Step(
                    total=step.total,
                    ahead=[waited, *step.ahead],
                    # The first stage has its last tile left when all of a head has come, the others follow it.
                    behind=[
                        jnp.zeros_like(waited) if index else _last_tile(stages[0], tiles),
                        *step.behind,
                    ],
                )
                for index, step in enumerate(steps)
            ),
        ]
    shape = jnp.broadcast_shapes(*(step.total.shape for step in steps))
    by_head = jax.tree.map(lambda leaf: jnp.moveaxis(jnp.broadcast_to(leaf, shape), 2, 0), steps)

    def head(ends: list[jax.Array], steps: list[_Step]) -> tuple[list[jax.Array], None]:
        starts: list[jax.Array] = []
        done: list[jax.Array] = []
        for end, step in zip(ends, steps, strict=True):
            ready = [one + ahead for one, ahead in zip(starts, step.ahead, strict=True)]
            left = [one + behind for one, behind in zip(done, step.behind, strict=True)]
            starts.append(functools.reduce(jnp.maximum, ready, end))
            done.append(functools.reduce(jnp.maximum, left, starts[-1] + step.total))
        return done, None

    ends = [jnp.zeros(shape[:2], step.total.dtype) for step in steps]
    latest = jax.lax.scan(head, ends, by_head)[0][-1] + output
    totals = [jnp.sum(step.total, axis=2) for step in steps]
    if structure.memory_overlaps:
        totals[0] = totals[0] + output
    return latest - functools.reduce(jnp.maximum, totals)


def _stage(
    names: tuple[str, ...], workload: Workload, accelerator: Accelerator, rows: jax.Array
) -> _Stage | None:
    """Returns what units chained on the same tile take, the slowest at everything; None if they do nothing."""
    structure, sizes = accelerator.structure, accelerator.sizes
    parts = [
        workload.replace(  # type: ignore[attr-defined]
            operations={
                name: value
                for name, value in workload.operations.items()
                if (name.partition(".")[0] in OF_KEYS) == of_keys
            }
        )
        for of_keys in (True, False)
    ]
    none = jnp.zeros((1, 1, 1))
    units = [unit for unit in structure.units if unit.name in names]
    present = []
    for unit in units:
        cycles = [head_cycles(unit, part, sizes) for part in parts]
        if any(cycles):
            # Executing and starting operations overlap.
            present.append([functools.reduce(jnp.maximum, one.values(), none) for one in cycles])
    if not present:
        return None
    by_query = [unit for unit in units if unit.rule == "blocks"]
    keys, pairs = (functools.reduce(jnp.maximum, one) for one in zip(*present, strict=True))
    return _Stage(
        total=functools.reduce(jnp.maximum, [one + other for one, other in present]),
        keys=keys,
        pairs=pairs,
        # Of chained units the one with most lanes says when a block is done.
        blocks=functools.reduce(
            jnp.minimum, [ceil(rows / lanes_of(unit, sizes)) for unit in by_query], rows
        ),
        # A statistic of a row needs all its tiles.
        holds_rows=any(key.endswith(".statistic") for unit in units for key in unit.paces),
        makes_keys=not by_query,
    )


def _ahead(before: _Stage, stage: _Stage, tiles: jax.Array) -> jax.Array:
    """Returns what of a stage lies ahead of the start of a later one, cycles by head: the first tile of its first block.

    Where that has the rows of several blocks, these are all tiles of the blocks before the last.
    """
    blocks = jnp.maximum(before.blocks / stage.blocks, 1.0)
    share = 1.0 if before.holds_rows else 1.0 / tiles
    is_several = gates.detach((blocks > 1.0).astype(tiles.dtype))
    part = share if before.makes_keys or before.holds_rows else 1.0 / _parts(before, tiles)
    keys = before.keys * (is_several + (1.0 - is_several) * part)
    pairs = before.pairs * (blocks - 1.0 + share) / before.blocks
    return jnp.minimum(keys + pairs, before.total)


def _behind(before: _Stage, stage: _Stage, tiles: jax.Array) -> jax.Array:
    """Returns what of a stage is left when an earlier one is done, cycles by head: the last tile of its last block.

    Where the other's last block has the rows of several, these are all tiles of the blocks behind the first. Keys are
    predicted for the first block, but made for whichever wants them.
    """
    blocks = jnp.maximum(stage.blocks / before.blocks, 1.0)
    share = 1.0 if before.holds_rows else 1.0 / tiles
    work = stage.keys if stage.makes_keys else stage.pairs
    return jnp.minimum(work * (blocks - 1.0 + share) / stage.blocks, stage.total)


def _parts(stage: _Stage, tiles: jax.Array) -> jax.Array:
    """Returns in how many tiles of a head keys are predicted: lanes take tokens as they take rows."""
    return jnp.minimum(tiles, stage.blocks)


def _last_tile(stage: _Stage, tiles: jax.Array) -> jax.Array:
    """Returns what the last tile of a head takes a stage, cycles by head."""
    return stage.keys / _parts(stage, tiles) + stage.pairs / (stage.blocks * tiles)


def _memory(
    workload: Workload, accelerator: Accelerator, parts: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns cycles of main memory: by head all, and what its first tile waits for; and of the last output, `[B, L]`.

    The output of a head moves along with the next one.
    """
    heads = parts.shape[2]
    rate = accelerator.sizes["dram.bytes_per_cycle"]

    def cycles(names: set[str]) -> jax.Array:
        streams = {name: value for name, value in workload.streams.items() if name in names}
        if not streams:
            return jnp.zeros((1, 1))
        return stream_bytes(workload.replace(streams=streams), accelerator) / rate  # type: ignore[attr-defined]

    names = set(workload.streams)
    shared, before = set(SHARED_STREAMS) & names, set(BEFORE_STREAMS) & names
    place = jnp.arange(heads)[None, None, :]
    is_first = (place == 0).astype(parts.dtype)

    def by_head(names: set[str]) -> jax.Array:
        own = cycles(names - shared)[..., None] / heads
        return own + is_first * cycles(names & shared)[..., None]

    output = cycles({"output"}) / heads
    return by_head(names) - is_first * output[..., None], by_head(before) / parts, output
