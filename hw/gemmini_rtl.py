"""Cycles of Gemmini's RTL from what it executes (`codesign.hw.gemmini_counts`) and five physical factors; differentiable.

The array multiplies one block of a layer while the DMA reads the next one and writes the last one. With the
counts of a block:

    compute = weight_tiles * max(rows, pair_issue_cycles * pairs)
    load    = read_beats + read_request_cycles * reads + read_miss_cycles * missed reads
    store   = (write_beats + write_miss_cycles * missed lines) / blocks_per_output
    cycles  = start_cycles + sum over blocks of max(compute, load, store) + what the first and the last one cannot hide

A read or a write misses if its line is not in the last-level cache, which replaces lines at random: of `b` bytes
touched again and again, a cache of `c` bytes misses the fraction m = 1 - exp(-m b / c), nothing while b <= c. A
line is used again along the loops that leave it unchanged, and from one run of a layer to the next.

Figures, reasons and limits: docs/validation_rtl.md.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from codesign import gates, units
from codesign.errors import UnknownNameError
from codesign.hw.calibrate import Factor
from codesign.hw.gemmini_counts import TENSORS, GemminiCounts

Overlap = Literal["engines", "memory_in_series", "none"]
"""What works at once on different blocks: array, reads and writes; array and (reads, then writes); nothing."""

CACHE_BYTES = 512.0 * units.BYTES_PER_KIB
"""Last-level cache: Chipyard's inclusive cache as it comes (8 ways, 512 KiB, a random victim)."""
SMOOTHNESS = 8.0
"""Exponent of the smooth maximum: queues are short, and two limits that lie near one another both cost."""
NEWTON_STEPS = 12
"""Each at least halves the error of `missing`."""

# Starts are of the right order only; calibration finds the values.
FACTORS = (
    Factor(
        name="pair_issue_cycles",
        unit="cycle per pair",
        start=8.0,
        meaning="from one preload and compute command to the next, unless the array itself is busy for longer",
    ),
    Factor(
        name="read_request_cycles",
        unit="cycle per request",
        start=2.0,
        meaning="of a read request, beside those in which the bus moves its bytes",
    ),
    Factor(
        name="read_miss_cycles",
        unit="cycle per line",
        start=4.0,
        meaning="further ones of a read whose line is not in the last-level cache",
    ),
    Factor(
        name="write_miss_cycles",
        unit="cycle per line",
        start=30.0,
        meaning="of a line that is written in part and not in the cache: read first, another one written back",
    ),
    Factor(
        name="start_cycles",
        unit="cycle per run",
        start=300.0,
        meaning="before the first and after the last block: configuration by the processor, fence",
    ),
)
"""What `cycles` takes, and where its calibration starts."""

CALIBRATED = {
    "pair_issue_cycles": 7.53,
    "read_request_cycles": 2.32,
    "read_miss_cycles": 2.84,
    "write_miss_cycles": 54.8,
    "start_cycles": 232.0,
}
"""Factors of the 16 x 16 Gemmini in FireSim, fitted: docs/validation_rtl.md, where their spread is too."""


@struct.dataclass
class GemminiCycles:
    """Cycles of N layers, `[N]`; the parts overlap in `total`.

    Attributes:
      total: Cycles of a run.
      compute: In which the array works.
      load: In which inputs and weights are read.
      store: In which outputs are written.
      misses: Those of `load` and `store` that lines take which are not in the last-level cache.
    """

    total: jax.Array
    compute: jax.Array
    load: jax.Array
    store: jax.Array
    misses: jax.Array


def missing(num_bytes: jax.Array, cache_bytes: jax.Array | float) -> jax.Array:
    """Returns the fraction of lines that miss when `num_bytes` are touched again and again, in [0, 1).

    The largest solution of m = 1 - exp(-m b / c): a line survives each of the m b / line misses between two of its uses
    with probability 1 - line / c.

    Args:
      num_bytes: Bytes b of all lines between two uses of one, > 0, any shape.
      cache_bytes: Capacity c of a cache that replaces at random, > 0, broadcast.
    """
    ratio = num_bytes / cache_bytes
    found = jnp.ones_like(ratio)
    for _ in range(NEWTON_STEPS):
        # Convex, and positive at 1: steps approach the largest root from above.
        power = jnp.expm1(-ratio * found)
        found = found - (found + power) / (1.0 - ratio - ratio * power)
    return jnp.maximum(found, 0.0)


def cycles(
    factors: Mapping[str, jax.Array | float],
    counts: GemminiCounts,
    *,
    cache_bytes: jax.Array | float = CACHE_BYTES,
    smoothness: float | None = SMOOTHNESS,
    overlap: Overlap = "engines",
) -> GemminiCycles:
    """Returns the cycles of layers.

    Args:
      factors: A positive value for each of `FACTORS`.
      counts: What the layers make the machine do.
      cache_bytes: Capacity of the last-level cache, > 0.
      smoothness: Exponent of the maximum over limits that overlap, > 1; None: the maximum itself.
      overlap: What works at once.

    Raises:
      UnknownNameError: If a factor is missing or unknown, or the overlap is.
    """
    names = [factor.name for factor in FACTORS]
    if set(factors) != set(names):
        raise UnknownNameError(f"`factors` must be {', '.join(names)}, got {', '.join(factors)}")

    def maximum(*values: jax.Array) -> jax.Array:
        stacked = jnp.stack(jnp.broadcast_arrays(*values), axis=-1)
        return stacked.max(-1) if smoothness is None else gates.smooth_max(stacked, smoothness)

    own: Any = jax.tree.map(jnp.asarray, counts)
    # Of the three tensors, the fraction of their lines that miss, `[N, 3]`.
    fresh = 1.0 / own.reuse_steps
    again = missing(own.reuse_bytes, cache_bytes)
    misses = jnp.prod(fresh + (1.0 - fresh) * again, axis=-1)
    misses *= missing(own.total_bytes, cache_bytes)
    reads = len(TENSORS) - 1

    issue = factors["pair_issue_cycles"] * own.pairs
    compute = own.weight_tiles * maximum(own.rows, issue)
    missed_reads = jnp.sum(own.reads * misses[:, None, :reads], axis=-1)
    read_miss = factors["read_miss_cycles"] * missed_reads
    requests = own.read_beats + factors["read_request_cycles"] * own.reads
    load = jnp.sum(requests, axis=-1) + read_miss
    write_miss = factors["write_miss_cycles"] * own.writes * misses[:, reads:]
    last_store = own.write_beats + write_miss
    store = last_store / own.blocks_per_output
    match overlap:
        case "engines":
            block = maximum(compute, load, store)
        case "memory_in_series":
            block = maximum(compute, load + store)
        case "none":
            block = compute + load + store
        case _:
            raise UnknownNameError(
                f"unknown overlap `{overlap}`: use one of {', '.join(get_args(Overlap))}"
            )
    # The mean block stands for the first one, loaded before anything, and for the last one, stored after everything.
    share = own.blocks / jnp.sum(own.blocks, axis=-1, keepdims=True)
    alone = jnp.sum(share * (compute + load + last_store - block), axis=-1)

    def of_all(cycles_of_block: jax.Array) -> jax.Array:
        return jnp.sum(own.blocks * cycles_of_block, axis=-1)

    return GemminiCycles(
        total=factors["start_cycles"] + of_all(block) + jnp.maximum(alone, 0.0),
        compute=of_all(compute),
        load=of_all(load),
        store=of_all(store),
        misses=of_all(read_miss + write_miss / own.blocks_per_output),
    )
