"""How long rows take through stages that follow one another, head after head, beside a main memory.

Rules: docs/cost_model.md, section 2. Arrays are `[B, L]`, or by head `[B, L, H]`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from codesign.hw.accelerator import Accelerator
from codesign.hw.engine import portion_cycles
from codesign.workload import Workload

_SHOWN = 2
"""Heads alike that pass one by one; the others take as long as the last of them.

Of 12 such heads on 8,000 random stages and queues all is exact with three; with two, 0.7 % at most, 7e-6 in the mean.
"""


def row_stalls(
    stages: list[list[str]], memory: jax.Array, workload: Workload, accelerator: Accelerator
) -> jax.Array:
    """Returns by how much a layer takes longer than its busiest unit or main memory, cycles, `[B, L]`.

    Portions of rows pass the stages in order, those of one head behind another's: a stage takes a portion when it has ended
    the one before, ends it no earlier than the stage before does, and is at most the index queue ahead of the stage behind.
    Main memory brings as much for every portion, as early as it can.

    Args:
      stages: Resources by stage, without empty ones.
      memory: Time of main memory; nothing waits for it where it does not overlap.
      workload: What passes.
      accelerator: A machine with an index queue.
    """
    structure = accelerator.structure
    assert structure.index_queue is not None
    cycles: dict[str, jax.Array] = {}
    for unit in structure.units:
        cycles |= portion_cycles(unit, workload, accelerator.sizes)
    times = [functools.reduce(jnp.maximum, [cycles[name] for name in one]) for one in stages]
    queries = workload.rows["attention"].queries
    # A workload may hold the sums of its heads, which are alike then.
    width = workload.head_dim * queries.shape[2]
    output = workload.block_gemms.get("out")
    alike = 1 if output is None else max(output.inner // width, 1)
    rows = jnp.maximum(queries / alike, 1.0)
    number = times[0].shape[3]
    ahead = jnp.minimum(structure.index_queue / rows, 1.0) * number
    times = [one / alike for one in times]
    if structure.memory_overlaps:
        share = memory / (alike * queries.shape[2] * number)
        times = [jnp.broadcast_to(share[..., None, None], times[0].shape), *times]
    shown = min(alike, _SHOWN)
    ends = _passage(
        [jnp.repeat(one, shown, axis=2) for one in times],
        jnp.repeat(ahead, shown, axis=2),
        has_memory=structure.memory_overlaps,
    )
    # Heads alike take turns evenly once stages are full.
    last = ends[-1]
    if alike > shown:
        last = last + (alike - shown) * queries.shape[2] * (last - ends[-2])
    busy = [jnp.sum(cycles[name], axis=(2, 3)) for stage in stages for name in stage]
    busy += [memory] if structure.memory_overlaps else []
    return last - functools.reduce(jnp.maximum, busy)


def _passage(times: list[jax.Array], ahead: jax.Array, *, has_memory: bool) -> jax.Array:
    """Returns when the last stage has ended each head, `[H, B, L]`.

    Args:
      times: Of each stage, `[B, L, H, P]`.
      ahead: Portions that a stage may be ahead of the next one, at most P, `[B, L, H]`.
      has_memory: Whether the first stage is main memory, which waits for none.
    """
    shape = jnp.broadcast_shapes(*(one.shape for one in times))
    number = shape[3]
    last = len(times) - 1
    in_order = [
        jnp.reshape(jnp.moveaxis(jnp.broadcast_to(one, shape), (2, 3), (0, 1)), (-1, *shape[:2]))
        for one in times
    ]
    lead = jnp.repeat(jnp.moveaxis(jnp.broadcast_to(ahead, shape[:3]), 2, 0), number, axis=0)
    back = jnp.maximum(lead - 1.0, 0.0)
    near = [jnp.maximum(1.0 - jnp.abs(back - place), 0.0) for place in range(number)]
    short = jnp.maximum(1.0 - lead, 0.0)
    together = [_later(one, after) * short for one, after in itertools.pairwise(in_order)]

    # Lists, and a body of one portion: compiles to few small loops, whose slopes are as cheap as they are.
    def portion(
        ends: list[list[jax.Array]], own: tuple[list[jax.Array], list[jax.Array], list[jax.Array]]
    ) -> tuple[list[list[jax.Array]], jax.Array]:
        times, near, together = own
        new: list[jax.Array] = []
        for stage, time in enumerate(times):
            end = ends[stage][0] + time
            if stage:
                end = _later(end, _later(new[-1], ends[stage - 1][0] + time))
            if stage < last and not (has_memory and stage == 0):
                # The row as far ahead as the queue holds has entered the next stage.
                parts = [share * one for share, one in zip(near, ends[stage + 1], strict=True)]
                end = _later(end, functools.reduce(jnp.add, parts) + together[stage])
            new.append(end)
        return [[end, *before[:-1]] for end, before in zip(new, ends, strict=True)], new[-1]

    start = [[jnp.zeros(shape[:2], times[0].dtype)] * number] * len(times)  # the latest first
    return jax.lax.scan(portion, start, (in_order, near, together))[1][number - 1 :: number]


def _later(one: jax.Array, other: jax.Array) -> jax.Array:
    """Returns the larger; of two alike the first has the slope, which is cheaper than to share it."""
    return jnp.where(one >= other, one, other)
