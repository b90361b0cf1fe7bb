"""Whole mappings as places of prime factors: rounding to them, and moves that lower the cost; all of them legal."""

import jax
import jax.numpy as jnp
from flax import struct

from codesign.hw.gemm.slots import Problem

_DRAWS = ("kind", "first", "second", "third", "loop")
"""What a move draws."""
NUM_KINDS = 4
_, TWO, THREE, LOOP = range(NUM_KINDS)
"""Kinds of moves: so many prime factors; a prime factor and a loop."""


@struct.dataclass
class Placed:
    """Whole mappings, `[..., N, S]`.

    Attributes:
      slots: Slot of each prime factor of the layer, `[T, N, S]`.
      factors: Products of the prime factors of each slot, `[G, N, S]`.
      order: Loops from the innermost outwards, `[L, D, N, S]`.
    """

    slots: jax.Array
    factors: jax.Array
    order: jax.Array


def rounded(problem: Problem, logs: jax.Array, order: jax.Array) -> Placed:
    """Returns whole mappings near relaxed ones.

    Every prime factor, the largest first, goes where most is missing, or to the outermost level if it breaks a limit there.

    Args:
      problem: The layers.
      logs: Log2 of the relaxed factors, `[G, N, S]`.
      order: Their orders, `[L, D, N, S]`.
    """
    dim_of = jnp.asarray(problem.slots.dim_of)[:, None, None]
    places = jnp.arange(len(problem.slots.places))[:, None, None]

    def place(
        factors: jax.Array, prime_and_dim: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        prime, dim = prime_and_dim
        missing = jnp.where(dim_of == dim[None], logs - jnp.log2(factors), -jnp.inf)
        slot = jnp.argmax(missing, axis=0)
        tried = jnp.where(places == slot[None], factors * prime[None], factors)
        fits = problem.is_legal(problem.mapping(tried, order))
        slot = jnp.where(fits, slot, problem.slots.num_free + dim)
        return jnp.where(places == slot[None], factors * prime[None], factors), slot

    factors, slots = jax.lax.scan(place, jnp.ones_like(logs), (problem.primes, problem.prime_dims))
    return Placed(slots=slots.astype(jnp.int32), factors=factors, order=order)


def with_loop_moved(
    order: jax.Array, level: jax.Array, dim: jax.Array, place: jax.Array
) -> jax.Array:
    """Returns orders `[L, D, ...]` in which a dimension stands at a place of a level, the others as they were.

    Args:
      order: Loops from the innermost outwards, `[L, D, N, S]`.
      level: Which level, `[1, S]`.
      dim: Which dimension, `[1, S]`.
      place: Where it goes, counted from the innermost loop, `[1, S]`.
    """
    num_levels, num_dims = order.shape[:2]
    places = jnp.arange(num_dims)[None, :, None, None]
    level, dim, place = (_beside(part, 4) for part in (level, dim, place))
    before = jnp.sum(jnp.where(order == dim, places, 0), axis=1, keepdims=True)
    inner, outer = jnp.roll(order, 1, axis=1), jnp.roll(order, -1, axis=1)
    source = places - (places > place)
    source = source + (source >= before)
    moved = jnp.where(source < places, inner, jnp.where(source > places, outer, order))
    moved = jnp.where(places == place, dim, moved)
    return jnp.where(jnp.arange(num_levels)[:, None, None, None] == level, moved, order)


def improved(
    problem: Problem,
    start: Placed,
    score: jax.Array,
    *,
    num_rounds: int,
    moves_per_round: int,
    key: jax.Array,
) -> tuple[Placed, jax.Array]:
    """Returns legal mappings after random moves that do not raise the objective, and log2 of it, `[N, S]`.

    A move sends one, two or three prime factors to slots of their dimension, or one of them and a loop to another place in
    its level. It is taken unless it breaks a limit or costs more. The same moves for every layer (`random_starts`).
    In the second half of the rounds, each begins with the better half of a layer's mappings in place of the others.

    Args:
      problem: The layers.
      start: Legal mappings.
      score: Log2 of their objective, `[N, S]`.
      num_rounds: Rounds of moves.
      moves_per_round: Moves that each mapping tries in a round.
      key: Random key.
    """
    num_levels, num_dims, _, num_starts = start.order.shape

    def try_move(
        current: tuple[Placed, jax.Array], key: jax.Array
    ) -> tuple[tuple[Placed, jax.Array], None]:
        placed, score = current
        bits = jax.random.bits(key, (len(_DRAWS), 1, num_starts))
        draws = dict(zip(_DRAWS, bits, strict=True))
        kind = draws["kind"] % NUM_KINDS
        tried = _sent(problem, placed, draws["first"], jnp.ones_like(kind, bool))
        tried = _sent(problem, tried, draws["second"], (kind == TWO) | (kind == THREE))
        tried = _sent(problem, tried, draws["third"], kind == THREE)
        # The loops of the innermost level have no level within whose tiles they could move.
        level, dim, place = (
            ((draws["loop"] >> (8 * part)) % number).astype(jnp.int32)
            for part, number in enumerate((num_levels - 1, num_dims, num_dims))
        )
        order = with_loop_moved(tried.order, 1 + level, dim, place)
        tried = tried.replace(order=jnp.where(_beside(kind == LOOP, 4), order, tried.order))  # type: ignore[attr-defined]
        reached = problem.score(tried.factors, tried.order)
        is_taken = reached <= score
        kept = jax.tree.map(
            lambda new, old: jnp.where(_beside(is_taken, new.ndim), new, old), tried, placed
        )
        return (kept, jnp.minimum(reached, score)), None

    def one_round(
        current: tuple[Placed, jax.Array], given: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[Placed, jax.Array], None]:
        keys, selects = given
        return jax.lax.scan(try_move, _selected(*current, selects), keys)[0], None

    keys = jax.random.split(key, (num_rounds, moves_per_round))
    selects = jnp.arange(num_rounds) >= (num_rounds + 1) // 2
    return jax.lax.scan(one_round, (start, score), (keys, selects))[0]


def _selected(placed: Placed, score: jax.Array, selects: jax.Array) -> tuple[Placed, jax.Array]:
    """Returns the better half of each layer's mappings twice, if `selects`, else all, and log2 of the objective."""
    places = jnp.broadcast_to(jnp.arange(score.shape[1]), score.shape)
    half = (score.shape[1] + 1) // 2
    best_first = jnp.argsort(score, axis=1)
    twice = jnp.where(places < half, best_first, jnp.roll(best_first, half, axis=1))
    chosen = jnp.where(selects, twice, places)
    taken: tuple[Placed, jax.Array] = jax.tree.map(
        lambda values: starts_at(values, chosen), (placed, score)
    )
    return taken


def starts_at(values: jax.Array, places: jax.Array) -> jax.Array:
    """Returns the starts of each layer, `[..., N, S]`, that stand at places `[N, K]`."""
    return jnp.take_along_axis(values, _beside(places, values.ndim), axis=-1)


def _beside(values: jax.Array, rank: int) -> jax.Array:
    """Returns values `[N, S]` with axes of one before them."""
    return values.reshape((1,) * (rank - 2) + values.shape)


def _sent(problem: Problem, placed: Placed, draw: jax.Array, is_sent: jax.Array) -> Placed:
    """Returns mappings of which a drawn prime factor is sent to a drawn slot of its dimension.

    Args:
      problem: The layers.
      placed: Their mappings.
      draw: Random bits, `[1, S]`: 16 choose the factor, 16 the slot.
      is_sent: Whether it is sent at all, `[1, S]`.
    """
    table, counts = (jnp.asarray(part) for part in problem.slots.of_dims())
    number = jnp.maximum(problem.num_primes, 1).astype(draw.dtype)
    chosen = ((draw % 2**16) % number).astype(jnp.int32)[None]
    prime, dim, before = (
        jnp.take_along_axis(part, chosen, axis=0)[0]
        for part in (problem.primes, problem.prime_dims, placed.slots)
    )
    after = table[dim, ((draw >> 16) % counts[dim].astype(draw.dtype)).astype(jnp.int32)]
    after = jnp.where(is_sent, after, before)
    places = jnp.arange(len(problem.slots.places))[:, None, None]
    factors = placed.factors / jnp.where(places == before[None], prime[None], 1.0)
    factors = factors * jnp.where(places == after[None], prime[None], 1.0)
    instances = jnp.arange(problem.primes.shape[0])[:, None, None]
    slots = jnp.where(instances == chosen, after[None], placed.slots)
    moved: Placed = placed.replace(slots=slots, factors=factors)  # type: ignore[attr-defined]
    return moved
