"""The host as a dense machine of `codesign.hw.gemm`: its closed form, found again as accesses of mapped loops.

The closed form takes two things apart that one mapping has together: the array holds a tile of weights for all rows, while
transfers go by blocks of rows or of columns that half of the SRAM holds. So three mappings make one cost: one for the array
and what it reads, and the cheaper of two for main memory.
"""

import jax
import jax.numpy as jnp

from codesign import units
from codesign.hw.accelerator import Accelerator
from codesign.hw.gemm.cost import MULTIPLIERS, cost
from codesign.hw.gemm.counting import fetches
from codesign.hw.gemm.layer import Layer, matmul
from codesign.hw.gemm.machine import (
    KIB,
    ExchangeStructure,
    LevelStructure,
    Machine,
    MachineStructure,
    MultiplierStructure,
    Switches,
)
from codesign.hw.gemm.mapping import Mapping, dataflow_order
from codesign.hw.gemm.names import INPUTS, MATMUL, OUTPUTS, PARTIAL, TENSORS, WEIGHTS
from codesign.hw.host import HostCost, Maximum, side_by_side
from codesign.workload import Gemm

_P, _C, _K = range(len(MATMUL))
_REGISTERS, _SUMS, _SRAM, _DRAM = range(4)
_SUM_BITS = 32.0
"""Width of sums inside the array, bit: they never leave it unfinished, so it changes nothing."""


def host_machine(accelerator: Accelerator) -> Machine:
    """Returns the host as a dense machine: registers for weights, sums in the array, SRAM, main memory.

    As in the closed form, the SRAM is priced for the inputs that the array reads, and never limits it.
    """
    host, sizes = accelerator.structure.host, accelerator.sizes
    assert host is not None
    reference_kib = host.sram_reference_bytes / KIB
    word = float(units.BITS_PER_BYTE)

    def level(name: str, holds: tuple[str, ...], **parts: object) -> LevelStructure:
        plain: dict[str, object] = {
            "fanout": None,
            "spreads": (),
            "tiles": None,
            "word_bits": word,
            "rate_per": None,
            "base_pj": 0.0,
            "slope_pj": 0.0,
            "exponent": 1.0,
            "least_kib": 0.0,
            "block_words": 1.0,
            "unpriced": (),
            "is_sized": False,
            "mm2_per_byte": 0.0,
        }
        return LevelStructure(name=name, holds=holds, **(plain | parts))  # type: ignore[arg-type]

    structure = MachineStructure(
        name=f"{accelerator.structure.name}.host",
        levels=(
            level("registers", (WEIGHTS,)),
            level("sums", (OUTPUTS,), fanout="rows", spreads=("C",)),
            level(
                "sram",
                (WEIGHTS, INPUTS),
                fanout="cols",
                spreads=("K",),
                slope_pj=host.sram_pj_per_byte / reference_kib**0.5,
                exponent=0.5,
                least_kib=reference_kib,
                unpriced=("weights.read", "weights.write", "inputs.write"),
                is_sized=True,
                mm2_per_byte=host.sram_mm2_per_byte,
            ),
            level(
                "dram", TENSORS, rate_per="machine", base_pj=accelerator.structure.dram_pj_per_byte
            ),
        ),
        multiplier=MultiplierStructure(
            bits=host.bits,
            constant_pj=host.add_pj,
            product_pj=host.multiply_pj,
            scales_with_bits=host.scales_with_bits,
            mm2=host.mac_mm2,
        ),
        exchange=ExchangeStructure(
            stationary=WEIGHTS, constant=1.0, cycles=(("rows", 2.0), ("cols", 1.0))
        ),
        least_sides=(("rows", 1.0), ("cols", 1.0)),
        switches=Switches(
            fill_and_drain=True,
            prefetch_weights=host.prefetches_weights,
            whole_steps=True,
            whole_blocks=False,
            whole_cycles=False,
            sliding_window=False,
            first_partial_sum_read=False,
            partial_sums_spill_in_full=False,
        ),
    )
    return Machine(
        sizes={
            "rows": sizes["host.rows"],
            "cols": sizes["host.cols"],
            "sram.bytes": sizes["host.sram_bytes"],
            "dram.words_per_cycle": sizes["dram.bytes_per_cycle"],
        },
        structure=structure,
    )


def host_layer(gemms: list[Gemm]) -> Layer:
    """Returns E dense products as layers `[B, L, E]`; results have the width of the inputs."""
    rows = side_by_side([gemm.rows for gemm in gemms])
    inner = jnp.asarray([[[float(gemm.inner) for gemm in gemms]]])
    outer = jnp.asarray([[[float(gemm.outer) for gemm in gemms]]])
    inputs = side_by_side([gemm.activation_bits for gemm in gemms])
    weights = side_by_side([gemm.weight_bits for gemm in gemms])
    bits = {WEIGHTS: weights, INPUTS: inputs, OUTPUTS: inputs, PARTIAL: jnp.asarray(_SUM_BITS)}
    return matmul(rows, inner, outer, bits)


def _mapping(
    layer: Layer,
    machine: Machine,
    *,
    row_blocks: jax.Array | float = 1.0,
    column_blocks: jax.Array | float = 1.0,
    streams_rows: bool = False,
) -> Mapping:
    """Returns weights stationary, with so many blocks of rows and of columns at main memory.

    Args:
      layer: Layers `[...]`.
      machine: The host.
      row_blocks: Blocks of rows, each held in the SRAM while all columns pass.
      column_blocks: Blocks of columns, each held while all rows pass.
      streams_rows: Whether rows pass through the SRAM one by one.
    """
    shape = (len(machine.structure.levels), *layer.extents.shape[:-1])
    temporal = [list(jnp.ones((len(MATMUL), *shape[1:]))) for _ in range(shape[0])]
    spatial = [list(jnp.ones((len(MATMUL), *shape[1:]))) for _ in range(shape[0])]
    spatial[_SUMS][_C] = spatial[_SUMS][_C] * machine.sizes["rows"]
    spatial[_SRAM][_K] = spatial[_SRAM][_K] * machine.sizes["cols"]
    temporal[_SUMS][_C] = layer.extent("C") / machine.sizes["rows"]
    columns = layer.extent("K") / machine.sizes["cols"]
    rows = layer.extent("P")
    if streams_rows:
        temporal[_DRAM][_P] = rows
        temporal[_SRAM][_K] = columns / column_blocks
        temporal[_DRAM][_K] = columns / temporal[_SRAM][_K]
    else:
        temporal[_DRAM][_P] = temporal[_DRAM][_P] * row_blocks
        temporal[_REGISTERS][_P] = rows / temporal[_DRAM][_P]
        temporal[_DRAM][_K] = columns
    orders = [dataflow_order("weight_stationary", MATMUL)] * shape[0]
    if not streams_rows:
        orders[_DRAM] = dataflow_order("input_stationary", MATMUL)

    def stacked(grid: list[list[jax.Array]]) -> jax.Array:
        return jnp.stack([jnp.stack(level, axis=-1) for level in grid], axis=-2)

    order = jnp.broadcast_to(
        jnp.asarray(orders), (*layer.extents.shape[:-1], *jnp.asarray(orders).shape)
    )
    return Mapping(temporal=stacked(temporal), spatial=stacked(spatial), order=order, dims=MATMUL)


def nested_host_cost(gemms: list[Gemm], accelerator: Accelerator, maximum: Maximum) -> HostCost:
    """Returns what `codesign.hw.host.host_cost` does, counted by the dense model; whole rows.

    Args:
      gemms: E products out[M, N] = x[M, K] w[K, N], M `[B, L]`.
      accelerator: The machine with its host.
      maximum: Combines the times of computation and transfer.
    """
    machine, layer = host_machine(accelerator), host_layer(gemms)
    half_bits = machine.sizes["sram.bytes"] * (units.BITS_PER_BYTE / 2)
    inner = layer.extent("C")
    row_blocks = fetches(layer.extent("P"), half_bits / (inner * layer.bits[INPUTS]))
    column_blocks = fetches(layer.extent("K"), half_bits / (inner * layer.bits[WEIGHTS]))
    array = cost(layer, _mapping(layer, machine), machine)
    transfers = [
        sum(cost(layer, mapping, machine).accesses["dram"].values(), start=jnp.zeros(()))
        for mapping in (
            _mapping(layer, machine, row_blocks=row_blocks),
            _mapping(layer, machine, column_blocks=column_blocks, streams_rows=True),
        )
    ]
    moved = jnp.minimum(*transfers)
    return HostCost(
        cycles=maximum(
            [array.busy_cycles[MULTIPLIERS], moved / machine.sizes["dram.words_per_cycle"]]
        ),
        mac_pj=array.energy_pj[MULTIPLIERS],
        sram_pj=array.energy_pj["sram"],
        dram_pj=moved * accelerator.structure.dram_pj_per_byte,
    )
