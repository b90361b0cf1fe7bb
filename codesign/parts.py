"""Functions of a batch computed a few examples at a time, so that arrays by pair of tokens stay in a processor's caches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from codesign.backward import keeping_marked, kept

MAX_PAIRS = 2**19
"""Pairs computed at a time: 2 MB in single precision, what a processor's own cache holds (ours)."""


def most_examples(batch: int, pairs: int) -> int:
    """Returns the largest divisor of a batch whose examples of `pairs` pairs each stay within `MAX_PAIRS`, at least 1."""
    return max(
        n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * pairs <= MAX_PAIRS)
    )


def map_examples(function: Callable[[Any], Any], inputs: Any, pairs: int) -> Any:
    """Returns what a function of examples that never look at each other returns, kept for the backward pass.

    Args:
      function: Of a tree of arrays `[b, ...]` to such a tree.
      inputs: Arrays `[B, ...]`.
      pairs: Pairs of tokens of an example, heads included.
    """
    batch = jax.tree.leaves(inputs)[0].shape[0]
    size = most_examples(batch, pairs)
    if size == batch:
        return kept(function(inputs))

    def split(x: jax.Array) -> jax.Array:
        return jnp.reshape(x, (batch // size, size, *x.shape[1:]))

    def joined(x: jax.Array) -> jax.Array:
        return jnp.reshape(x, (batch, *x.shape[2:]))

    outputs = jax.lax.map(keeping_marked(function), jax.tree.map(split, inputs))
    return kept(jax.tree.map(joined, outputs))
