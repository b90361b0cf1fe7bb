"""The dense array that runs linear layers, weight stationary, in series with the attention engine.

Its size, cycles and energy are ours, not published: attention-only machines name no such unit. This is the closed form that
training evaluates; `codesign.hw.host_nest` finds the same figures as loops on a dense machine.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from codesign import units
from codesign.hw.accelerator import Accelerator
from codesign.hw.gemm.counting import ceil, fetches, narrowed, operand_passes, systolic_cycles
from codesign.workload import Gemm

Maximum = Callable[[list[jax.Array]], jax.Array]


@struct.dataclass
class HostCost:
    """Cost of dense products, any shape: cycles, and pJ in multipliers, SRAM and main memory."""

    cycles: jax.Array
    mac_pj: jax.Array
    sram_pj: jax.Array
    dram_pj: jax.Array


def host_cost(gemms: list[Gemm], accelerator: Accelerator, maximum: Maximum) -> HostCost:
    """Returns the cost of dense products, one by one, `[B, L, E]`.

    Args:
      gemms: E products out[M, N] = x[M, K] w[K, N], M `[B, L]`.
      accelerator: The machine with its host.
      maximum: Combines the times of computation and transfer.

    References:
      Fill, drain and tiles of a weight-stationary systolic array: docs/cost_model.md, section 4.
    """
    host, sizes = accelerator.structure.host, accelerator.sizes
    assert host is not None
    height, width = sizes["host.rows"], sizes["host.cols"]
    rows = side_by_side([gemm.rows for gemm in gemms])
    activation_bits = side_by_side([gemm.activation_bits for gemm in gemms])
    weight_bits = side_by_side([gemm.weight_bits for gemm in gemms])
    inner = jnp.asarray([[[float(gemm.inner) for gemm in gemms]]])
    outer = jnp.asarray([[[float(gemm.outer) for gemm in gemms]]])
    tiles = ceil(inner / height) * ceil(outer / width)
    passes = operand_passes(activation_bits, weight_bits, host.bits)
    fill = 2.0 * height + width - 2.0
    cycles = systolic_cycles(tiles, rows, passes, fill, prefetches=host.prefetches_weights)
    if host.scales_with_bits:
        cycles = narrowed(cycles, passes, activation_bits, weight_bits, host.bits)

    weights = inner * outer * weight_bits
    inputs = rows * inner * activation_bits
    outputs = rows * outer * activation_bits
    half = sizes["host.sram_bytes"] * (units.BITS_PER_BYTE / 2)
    weight_fetches = fetches(rows, half / (inner * activation_bits))
    input_fetches = fetches(outer, half / (inner * weight_bits))
    bits = outputs + jnp.minimum(
        weights * weight_fetches + inputs, weights + inputs * input_fetches
    )
    moved = bits / units.BITS_PER_BYTE

    read = rows * tiles * height * activation_bits / units.BITS_PER_BYTE
    capacity_ratio = jnp.maximum(sizes["host.sram_bytes"] / host.sram_reference_bytes, 1.0)
    mac_pj = host.multiply_pj * activation_bits * weight_bits + host.add_pj
    return HostCost(
        cycles=maximum([cycles, moved / sizes["dram.bytes_per_cycle"]]),
        mac_pj=rows * (inner * outer) * mac_pj,
        sram_pj=read * (host.sram_pj_per_byte * jnp.sqrt(capacity_ratio)),
        dram_pj=moved * accelerator.structure.dram_pj_per_byte,
    )


def side_by_side(parts: list[jax.Array]) -> jax.Array:
    """Stacks `[B, L]` or `[1, L]` along a last axis."""
    shape = jnp.broadcast_shapes(*(part.shape for part in parts))
    return jnp.stack([jnp.broadcast_to(part, shape) for part in parts], axis=-1)


def host_mm2(accelerator: Accelerator) -> dict[str, jax.Array]:
    """Returns the area of the host's array and SRAM, mm2; empty without a host."""
    host, sizes = accelerator.structure.host, accelerator.sizes
    if host is None:
        return {}
    return {
        "host.mac": sizes["host.rows"] * sizes["host.cols"] * host.mac_mm2,
        "host.sram": sizes["host.sram_bytes"] * host.sram_mm2_per_byte,
    }
