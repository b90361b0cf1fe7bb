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

    Each portion of a head takes its slowest stage, but for what the queue between stages evens out. Where a later stage
    is the slow one at the end of a head and an earlier one at the begin of the next, as many rows of the next as the
    queue holds have passed the earlier stage before the head ends.

    Args:
      stages: Their times, `[B, L, H, P, stages]`.
      queue: Rows that wait between stages.
      workload: What passes.
      maximum: Combines times that overlap.
    """
    by_stage = [stages[..., index] for index in range(stages.shape[-1])]
    if len(by_stage) == 1:
        return jnp.sum(by_stage[0], axis=(2, 3))
    queries = workload.rows["attention"].queries
    alike = stages.shape[2] // queries.shape[2]
    rows = jnp.maximum(jnp.repeat(queries / alike, alike, axis=2), 1.0)
    number = stages.shape[3]
    held = jnp.minimum(queue / rows, 1.0)[..., None] * number
    total = jnp.sum(maximum(_evened(by_stage, held)), axis=(2, 3))
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


def _evened(stages: list[jax.Array], held: jax.Array) -> list[jax.Array]:
    """Returns each portion's time spread over those that a queue of `held` portions, `[B, L, H, 1]`, reaches."""
    number = stages[0].shape[3]
    # A queue fills and empties in more rows than it holds.
    reach = jnp.maximum(2.0 * held, 0.5)[..., None]
    place = jnp.arange(number)
    apart = (place[:, None] - place[None, :])[None, None, None]
    # How much of a portion lies within reach of the middle of another.
    near = jnp.clip(reach + 0.5 - jnp.abs(apart), 0.0, jnp.minimum(1.0, 2.0 * reach))
    shares = near / jnp.sum(near, axis=3, keepdims=True)
    return [jnp.sum(shares * stage[..., None, :], axis=4) for stage in stages]


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
