"""Descent on relaxed mappings: Adam on log2 of every factor, from many starts at once.

References:
  Hong et al., "DOSA", MICRO 2023, arXiv 2509.10702, section 5. Differs: logarithms, smooth maximum, limits as penalties
  because the machine is given, orders chosen level by level.
"""

import jax
import jax.numpy as jnp
import optax

from codesign.hw.gemm.mapping import dataflow_orders
from codesign.hw.gemm.slots import Problem

SMOOTHNESS = (8.0, 32.0)
"""Exponents of the smooth maximum at the start and at the end."""
RATE_FLOOR = 0.1
"""Last step size over the first."""
State = tuple[jax.Array, optax.OptState, jax.Array]
"""Log2 of factors, the state of Adam, orders."""


def random_starts(problem: Problem, num_starts: int, *, key: jax.Array) -> jax.Array:
    """Returns log2 of factors that share the extents out at random, `[F, N, S]`.

    The same shares for every layer, so that what is found for one does not depend on those beside it.
    """
    slots = problem.slots
    weights = jax.random.exponential(key, (len(slots.places), num_starts))
    dims = slots.dim_of
    shares = (weights / slots.by_dim(weights)[dims])[: slots.num_free]
    extents = jnp.moveaxis(jnp.log2(problem.layer.extents), -1, 0)[dims[: slots.num_free]]
    return shares[:, None, :] * extents


def relaxed_factors(problem: Problem, logs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns log2 of all factors, `[G, N, S]`, and of those that stay above 1 where the cost is taken.

    Args:
      problem: The layers.
      logs: Log2 of all factors but the outermost in time, `[F, N, S]`.
    """
    slots = problem.slots
    kept = jnp.maximum(logs, 0.0)
    left = jnp.moveaxis(jnp.log2(problem.layer.extents), -1, 0) - slots.by_dim(kept)
    return jnp.concatenate([logs, left]), jnp.concatenate([kept, jnp.maximum(left, 0.0)])


def chosen_orders(problem: Problem, logs: jax.Array, order: jax.Array) -> jax.Array:
    """Returns the best dataflow of each level, from the innermost outwards, the others as they are, `[L, D, N, S]`."""
    orders = jnp.asarray(dataflow_orders(problem.slots.dims))
    factors = jnp.exp2(relaxed_factors(problem, logs)[1])
    places = jnp.arange(problem.slots.num_levels)[:, None, None, None]

    def choose(order: jax.Array, level: jax.Array) -> tuple[jax.Array, None]:
        def with_dataflow(own: jax.Array) -> jax.Array:
            return jnp.where(places == level, own[None, :, None, None], order)

        def score(own: jax.Array) -> jax.Array:
            return problem.cost(problem.mapping(factors, with_dataflow(own)))[1]

        best = orders[jnp.argmin(jax.vmap(score)(orders), axis=0)]
        return jnp.where(places == level, jnp.moveaxis(best, -1, 0)[None], order), None

    return jax.lax.scan(choose, order, jnp.arange(1, problem.slots.num_levels))[0]


def descend(
    problem: Problem,
    logs: jax.Array,
    *,
    num_rounds: int,
    steps_per_round: int,
    learning_rate: float,
    penalty: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns log2 of all factors, `[G, N, S]`, and orders, `[L, D, N, S]`, after descent.

    Args:
      problem: The layers.
      logs: Log2 of the factors of the starts, `[F, N, S]`.
      num_rounds: Rounds; at the beginning of each the orders are chosen again.
      steps_per_round: Steps of Adam in each.
      learning_rate: Size of the first steps, in powers of two.
      penalty: Of the square of every excess in powers of two, over that of a halved objective.
    """
    optimiser = optax.adam(
        optax.cosine_decay_schedule(learning_rate, num_rounds * steps_per_round, RATE_FLOOR)
    )

    def loss(logs: jax.Array, order: jax.Array, smoothness: jax.Array) -> jax.Array:
        all_logs, kept = relaxed_factors(problem, logs)
        mapping = problem.mapping(jnp.exp2(kept), order)
        limits = problem.excess(mapping).values()
        broken = [jnp.sum(jnp.maximum(excess, 0.0) ** 2) for excess in limits]
        below_one = jnp.sum(jnp.minimum(all_logs, 0.0) ** 2)
        return jnp.sum(problem.cost(mapping, smoothness)[1]) + penalty * (sum(broken) + below_one)

    def one_round(carry: State, smoothness: jax.Array) -> tuple[State, None]:
        logs, state, order = carry
        order = chosen_orders(problem, logs, order)

        def step(
            carry: tuple[jax.Array, optax.OptState], _: None
        ) -> tuple[tuple[jax.Array, optax.OptState], None]:
            logs, state = carry
            updates, state = optimiser.update(jax.grad(loss)(logs, order, smoothness), state)
            return (jnp.asarray(optax.apply_updates(logs, updates)), state), None

        (logs, state), _ = jax.lax.scan(step, (logs, state), length=steps_per_round)
        return (logs, state, order), None

    order = problem.plain_order(logs.shape[-1])
    smoothness = jnp.geomspace(*SMOOTHNESS, num_rounds, dtype=logs.dtype)
    (logs, _, order), _ = jax.lax.scan(one_round, (logs, optimiser.init(logs), order), smoothness)
    return relaxed_factors(problem, logs)[1], order
