"""The dense array that runs linear layers, weight stationary, in series with the attention engine.

Its size, cycles and energy are ours, not published: attention-only machines name no such unit.
"""

from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
from flax import struct

from codesign import gates, units
from codesign.hw.accelerator import Accelerator
from codesign.workload import Gemm

Maximum = Callable[[list[jax.Array]], jax.Array]


@struct.dataclass
class HostCost:
    """Cost of dense products, `[B, L]`: cycles, and pJ in multipliers, SRAM and main memory."""

    cycles: jax.Array
    mac_pj: jax.Array
    sram_pj: jax.Array
    dram_pj: jax.Array


def ceil(x: jax.Array) -> jax.Array:
    """Returns ceil(x); true derivative zero almost everywhere, substituted: 1."""
    return gates.straight_through(jnp.ceil(x), x)


def _repeats(extent: jax.Array, resident: jax.Array) -> jax.Array:
    """Returns how often the other operand is fetched: ceil(extent / floor(resident)), at least 1."""
    whole = jnp.maximum(gates.straight_through(jnp.floor(resident), resident), 1.0)
    return ceil(jnp.maximum(extent / whole, 1.0))


def host_cost(gemm: Gemm, accelerator: Accelerator, maximum: Maximum) -> HostCost:
    """Returns the cost of one dense product per example and layer.

    Args:
      gemm: out[M, N] = x[M, K] w[K, N], M `[B, L]`.
      accelerator: The machine with its host.
      maximum: Combines the times of computation and transfer.

    References:
      Fill, drain and tiles of a weight-stationary systolic array: docs/cost_model.md, section 4.
    """
    host, sizes = accelerator.structure.host, accelerator.sizes
    rows, cols = sizes["host.rows"], sizes["host.cols"]
    activation_bits, weight_bits = gemm.activation_bits, gemm.weight_bits
    tiles = ceil(gemm.inner / rows) * ceil(gemm.outer / cols)
    passes = ceil(activation_bits / host.bits) * ceil(weight_bits / host.bits)
    fill = 2.0 * rows + cols - 2.0
    if host.prefetches_weights:
        cycles = tiles * gemm.rows * passes + fill
    else:
        cycles = tiles * (fill + gemm.rows) * passes - 1.0
    if host.scales_with_bits:
        widths = activation_bits * weight_bits
        cycles = cycles * widths / (passes * (host.bits * host.bits))

    weights = gemm.inner * gemm.outer * weight_bits
    inputs = gemm.rows * gemm.inner * activation_bits
    outputs = gemm.rows * gemm.outer * activation_bits
    half = sizes["host.sram_bytes"] * (units.BITS_PER_BYTE / 2)
    weight_fetches = _repeats(gemm.rows, half / (gemm.inner * activation_bits))
    input_fetches = _repeats(jnp.asarray(float(gemm.outer)), half / (gemm.inner * weight_bits))
    bits = outputs + jnp.minimum(
        weights * weight_fetches + inputs, weights + inputs * input_fetches
    )
    moved = bits / units.BITS_PER_BYTE

    macs = gemm.rows * (gemm.inner * gemm.outer)
    read = gemm.rows * tiles * rows * activation_bits / units.BITS_PER_BYTE
    capacity_ratio = jnp.maximum(sizes["host.sram_bytes"] / host.sram_reference_bytes, 1.0)
    return HostCost(
        cycles=maximum([cycles, moved / sizes["dram.bytes_per_cycle"]]),
        mac_pj=macs * (host.multiply_pj * activation_bits * weight_bits + host.add_pj),
        sram_pj=read * (host.sram_pj_per_byte * jnp.sqrt(capacity_ratio)),
        dram_pj=moved * accelerator.structure.dram_pj_per_byte,
    )


def total(costs: list[HostCost]) -> HostCost:
    """Returns the sum of the costs of products that run one after another."""
    return reduce(lambda a, b: jax.tree.map(jnp.add, a, b), costs)


def host_mm2(accelerator: Accelerator) -> dict[str, jax.Array]:
    """Returns the area of the host's array and SRAM, mm2."""
    host, sizes = accelerator.structure.host, accelerator.sizes
    return {
        "host.mac": sizes["host.rows"] * sizes["host.cols"] * host.mac_mm2,
        "host.sram": sizes["host.sram_bytes"] * host.sram_mm2_per_byte,
    }
