"""How long rows take through stages that follow one another, head after head, beside a main memory.

Rules: docs/cost_model.md, section 3. Arrays are `[B, L]`, or by head `[B, L, H]`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from codesign.hw.accelerator import Accelerator
from codesign.hw.engine import portion_cycles
from codesign.hw.host import Maximum
from codesign.workload import Workload


def stage_cycles(
    stages: list[list[str]], workload: Workload, accelerator: Accelerator, maximum: Maximum
) -> jax.Array:
    """Returns how long a head's rows take in each of its portions and stages, `[B, L, H, P, stages]`.

    Of a workload that holds sums of its heads these are heads alike.

    Args:
      stages: Resources by stage, without empty ones.
      workload: What passes.
      accelerator: The machine.
      maximum: Combines times that overlap.
    """
    cycles: dict[str, jax.Array] = {}
    for unit in accelerator.structure.units:
        cycles |= portion_cycles(unit, workload, accelerator.sizes)
    summed = jnp.stack([maximum([cycles[name] for name in stage]) for stage in stages], axis=-1)
    alike = workload.block_gemms["out"].inner // (workload.head_dim * summed.shape[2])
    return jnp.repeat(summed / alike, alike, axis=2)


def heads_in_turn(
    stages: jax.Array, queue: float, workload: Workload, maximum: Maximum
) -> jax.Array:
    """Returns how long heads take through stages, one after the other, `[B, L]`.

    Each portion of a head takes its slowest stage. Where a later stage is the slow one at the end of a head and an earlier
    one at the begin of the next, as many rows of the next as the queue between stages holds have passed the earlier
    stage before the head ends.

    Args:
      stages: Their times, `[B, L, H, P, stages]`.
      queue: Rows that wait between stages.
      workload: What passes.
      maximum: Combines times that overlap.
    """
    by_stage = [stages[..., index] for index in range(stages.shape[-1])]
    total = jnp.sum(maximum(by_stage), axis=(2, 3))
    if len(by_stage) == 1:
        return total
    queries = workload.rows["attention"].queries
    alike = stages.shape[2] // queries.shape[2]
    rows = jnp.maximum(jnp.repeat(queries / alike, alike, axis=2), 1.0)
    number = stages.shape[3]
    held = jnp.minimum(queue / rows, 1.0)[..., None] * number
    first = jnp.clip(held - jnp.arange(number)[None, None, None], 0.0, 1.0)
    last = first[..., ::-1]
    ahead = [
        functools.reduce(
            jnp.minimum,
            (
                jnp.sum(late * last, axis=3)[..., :-1],
                jnp.sum(early * first, axis=3)[..., 1:],
                _most(jnp.cumsum((late - early)[..., ::-1], axis=3))[..., :-1],
                _most(jnp.cumsum(early - late, axis=3))[..., 1:],
            ),
        )
        for early, late in itertools.combinations(by_stage, 2)
    ]
    return total - jnp.sum(functools.reduce(jnp.maximum, ahead), axis=2)


def _most(values: jax.Array) -> jax.Array:
    """Returns the largest along the last axis, at least 0."""
    return jnp.maximum(jnp.max(values, axis=-1), 0.0)


def waits_for_memory(stages: jax.Array, memory: jax.Array) -> jax.Array:
    """Returns by how much rows and main memory that overlap take longer than either, `[B, L]`.

    Memory brings the same for every row of a head, rows in order, and runs ahead as far as it can: where rows take longer
    later on, the first ones wait for it and the last ones for the stages. What comes up to a portion, and the work
    behind it, follow one another.

    Args:
      stages: Times of the stages, `[B, L, H, P, stages]`.
      memory: Time of main memory, `[B, L]`.
    """
    work = functools.reduce(jnp.maximum, (stages[..., index] for index in range(stages.shape[-1])))
    work = jnp.reshape(work, (*work.shape[:2], -1))
    number = work.shape[2]
    behind = jnp.sum(work, axis=2, keepdims=True) - jnp.cumsum(work, axis=2)
    come = memory[..., None] * (jnp.arange(1, number + 1) / number)[None, None]
    longest = jnp.maximum(jnp.max(come + behind, axis=2), jnp.sum(work, axis=2))
    return longest - jnp.maximum(jnp.sum(work, axis=2), memory)
