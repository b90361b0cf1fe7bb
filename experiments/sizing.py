"""Sizes of the machine in training: what they descend on, the caps they keep, and the values that can be built."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.sizing import (
    Caps,
    Sizes,
    bounds_of,
    built,
    cap_ratios,
    check_caps,
    descended,
    inside,
    size_ranges,
    total_area_mm2,
    with_sizes,
)
from codesign.hw.spec import AcceleratorSpec

PriceFn = Callable[[Any, Accelerator, Any, Any], tuple[jax.Array, jax.Array, jax.Array]]
"""`(costs, accelerator, constants, smoothness)` to cost over budget `[C]`, mean energy in pJ and mean latency in cycles."""


def resolved_caps(spec: AcceleratorSpec, caps: Caps) -> Caps:
    """Returns the caps with the file's own area where none is given.

    Raises:
      InfeasibleCapError: If no legal machine keeps them.
    """
    if caps.area_mm2 is None:
        own = float(total_area_mm2(accelerator_from_spec(spec)))
        caps = dataclasses.replace(caps, area_mm2=own)
    check_caps(spec, caps)
    return caps


class SizeTraining:
    """The sizes of one machine under caps, scored by the budgets on what a model executes.

    Args:
      spec: The machine.
      caps: What sizes keep.
      price: Prices of a workload.
    """

    def __init__(self, spec: AcceleratorSpec, caps: Caps, price: PriceFn):
        self.spec = spec
        self.caps = resolved_caps(spec, caps)
        self.ranges = size_ranges(spec)
        self.bounds = bounds_of(self.ranges)
        self.accelerator = accelerator_from_spec(spec)
        self._price = price
        self._descended = jax.jit(self._descend)
        self._scores = jax.jit(jax.vmap(self._score, in_axes=(0, None, None, None, None)))

    @property
    def start(self) -> Sizes:
        """The file's own sizes."""
        return dict(self.accelerator.sizes)

    def legal(self, sizes: Sizes, costs: Any, constants: Any, smoothness: jax.Array) -> Sizes:
        """See `codesign.optimize.SizesFn`."""

        def ratios(tried: Sizes) -> jax.Array:
            machine = with_sizes(self.accelerator, tried)
            _, energy_pj, latency_cycles = self._price(costs, machine, constants, smoothness)
            return cap_ratios(machine, energy_pj, latency_cycles, self.caps)

        return inside(sizes, self.bounds, ratios)

    def descended(
        self,
        sizes: Sizes,
        batches: Sequence[tuple[Any, ArrayLike]],
        constants: Any,
        smoothness: jax.Array,
    ) -> Sizes:
        """Returns the sizes that a descent reaches on given workloads, the policy held.

        Args:
          sizes: Where to start.
          batches: Workloads as `PriceFn` takes them, each with its weight in the means, scalar or `[C]`.
          constants: What `PriceFn` reads.
          smoothness: The exponent of the smooth maximum.
        """
        costs, weights = zip(*batches, strict=True)
        shares = self._shares(weights)
        result: Sizes = self._descended(sizes, costs, shares, constants, smoothness)
        return result

    def built(
        self, sizes: Sizes, batches: Sequence[tuple[Any, ArrayLike]], constants: Any
    ) -> dict[str, float]:
        """Returns sizes that can be built, near given ones; arguments as in `descended`.

        Raises:
          InfeasibleCapError: If the caps leave none.
        """
        costs, weights = zip(*batches, strict=True)
        shares = self._shares(weights)

        def scores(tried: Sizes) -> tuple[jax.Array, jax.Array]:
            found: tuple[jax.Array, jax.Array] = self._scores(tried, costs, shares, constants, None)
            return found

        return built(sizes, self.ranges, scores)

    def score(
        self, sizes: Sizes, batches: Sequence[tuple[Any, ArrayLike]], constants: Any
    ) -> float:
        """Returns the sum of the logarithms of the ratios at given sizes, without smoothing."""
        costs, weights = zip(*batches, strict=True)
        one = {name: jnp.asarray(value)[None] for name, value in sizes.items()}
        return float(self._scores(one, costs, self._shares(weights), constants, None)[0][0])

    def _shares(self, weights: Sequence[ArrayLike]) -> NDArray[np.float32]:
        """Returns the share of each batch in the mean of each ratio, `[N, C]`."""
        stacked = np.stack([np.atleast_1d(np.asarray(one, np.float64)) for one in weights])
        shares: NDArray[np.float32] = (stacked / np.sum(stacked, axis=0)).astype(np.float32)
        return shares

    def _score(
        self, sizes: Sizes, costs: Any, shares: jax.Array, constants: Any, smoothness: Any
    ) -> tuple[jax.Array, jax.Array]:
        machine = with_sizes(self.accelerator, sizes)
        priced = [self._price(one, machine, constants, smoothness) for one in costs]
        ratios = sum(share * ratio for share, (ratio, _, _) in zip(shares, priced, strict=True))
        energy_pj, latency_cycles = (
            jnp.mean(jnp.stack([one[place] for one in priced])) for place in (1, 2)
        )
        return jnp.sum(jnp.log(ratios)), cap_ratios(machine, energy_pj, latency_cycles, self.caps)

    def _descend(
        self, sizes: Sizes, costs: Any, shares: jax.Array, constants: Any, smoothness: jax.Array
    ) -> Sizes:
        def score(tried: Sizes) -> tuple[jax.Array, jax.Array]:
            return self._score(tried, costs, shares, constants, smoothness)

        return descended(sizes, self.bounds, score)
