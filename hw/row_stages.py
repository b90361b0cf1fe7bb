"""How long rows take through stages that follow one another, head after head, beside a main memory.

Rules: docs/cost_model.md, section 2. Arrays are `[B, L]`, or by head `[B, L, H]`.
"""

import functools

import jax
import jax.numpy as jnp

from codesign.hw.accelerator import Accelerator
from codesign.hw.engine import portion_cycles
from codesign.workload import Workload


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
    times = [jnp.repeat(one / alike, alike, axis=2) for one in times]
    rows = jnp.maximum(jnp.repeat(queries / alike, alike, axis=2), 1.0)
    number = times[0].shape[3]
    ahead = jnp.minimum(structure.index_queue / rows, 1.0) * number
    if structure.memory_overlaps:
        share = memory / (rows.shape[2] * number)
        times = [jnp.broadcast_to(share[..., None, None], times[0].shape), *times]
    last = _passage(times, ahead, has_memory=structure.memory_overlaps)
    busy = [jnp.sum(cycles[name], axis=(2, 3)) for stage in stages for name in stage]
    busy += [memory] if structure.memory_overlaps else []
    return last - functools.reduce(jnp.maximum, busy)


def _passage(times: list[jax.Array], ahead: jax.Array, *, has_memory: bool) -> jax.Array:
    """Returns when the last stage has ended the last portion, `[B, L]`.

    Args:
      times: Of each stage, `[B, L, H, P]`.
      ahead: Portions that a stage may be ahead of the next one, at most P, `[B, L, H]`.
      has_memory: Whether the first stage is main memory, which waits for none.
    """
    number = times[0].shape[3]
    shape = jnp.broadcast_shapes(*(one.shape for one in times))
    in_order = jnp.stack([jnp.broadcast_to(one, shape) for one in times])
    in_order = jnp.reshape(in_order, (*in_order.shape[:3], -1))
    lead = jnp.broadcast_to(jnp.repeat(ahead, number, axis=2), in_order.shape[1:])

    def portion(
        state: tuple[jax.Array, jax.Array], own: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        ends, earlier = state  # [S, B, L], and those of the portions before, [P, S, B, L]
        times, lead = own
        new: list[jax.Array] = []
        for stage, time in enumerate(times):
            end = ends[stage] + time
            if stage:
                end = jnp.maximum(end, jnp.maximum(new[-1], ends[stage - 1] + time))
            if stage + 1 < len(times) and not (has_memory and stage == 0):
                # The row as far ahead as the queue holds has entered the next stage.
                behind = _at(earlier[:, stage + 1], lead - 1.0)
                together = jnp.maximum(time, times[stage + 1]) * jnp.maximum(1.0 - lead, 0.0)
                end = jnp.maximum(end, behind + together)
            new.append(end)
        done = jnp.stack(new)
        return (done, jnp.concatenate([done[None], earlier[:-1]])), None

    ends = jnp.zeros_like(in_order[..., 0])
    earlier = jnp.zeros((number, *ends.shape), ends.dtype)
    steps = (jnp.moveaxis(in_order, 3, 0), jnp.moveaxis(lead, 2, 0))
    (ends, _), _ = jax.lax.scan(portion, (ends, earlier), steps)
    return ends[-1]


def _at(values: jax.Array, place: jax.Array) -> jax.Array:
    """Interpolates values `[P, B, L]` linearly at places from 0 to P - 1, `[B, L]`."""
    apart = jnp.abs(jnp.arange(values.shape[0])[:, None, None] - jnp.maximum(place, 0.0)[None])
    return jnp.sum(values * jnp.maximum(1.0 - apart, 0.0), axis=0)
