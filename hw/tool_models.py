"""Dense products as other tools price them, each tool's assumptions as named switches; NumPy only.

Cycles and energy of out[M, N] += in[M, K] w[K, N] on a square array behind registers, a buffer and main memory. One model
with the switches of SCALE-Sim, ZigZag or AccelForge gives that tool's answer (docs/validation.md says how nearly).

References:
  Raj et al., "SCALE-Sim v3", ISPASS 2025 (scalesim 3.0.0). Mei et al., "ZigZag", IEEE TC 2021 (zigzag-dse 3.9.1).
  Andrulis et al., "AccelForge" (accelforge 1.0.467).
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codesign.errors import CodesignError, UnknownNameError
from codesign.hw.loop_nests import COLS, INNER, ROWS, Floats, Operand
from codesign.hw.mapped_nests import MappedNests
from codesign.hw.nest_search import all_orders, divisors, tiled_nests
from codesign.hw.tool_switches import Dataflow, Memory, Switches, ToolModel

BLOCK = 32
"""Products whose orders are held at a time: the search needs about 8 MB for each."""


# Prices, widths and capacities: settings of the runs of dense_gemm_tools.csv. Registers: ZigZag's own examples.
_BUFFER_BITS = 768 * 1024 * 8.0
_DRAM_PJ, _DRAM_BITS = 4.0, 512.0
_SRAM = Memory(
    read_pj=0.20, write_pj=0.25, capacity_bits=_BUFFER_BITS, port_bits=2048.0, granule_bits=8.0
)
_OUTPUT_STATIONARY: dict[Operand, tuple[str, ...]] = {
    "output": ("output_register", "sram", "dram"),
    "input": ("sram", "dram"),
    "weight": ("sram", "dram"),
}

SCALE_SIM = ToolModel(
    name="SCALE-Sim 3.0.0",
    switches=Switches(mapping="fixed", fill_and_drain=True, perfect_overlap=True),
    dataflows=("weight_stationary", "output_stationary", "input_stationary"),
    memories={},
    paths={},
)
ZIGZAG = ToolModel(
    name="ZigZag 3.9.1",
    switches=Switches(
        mapping="orders",
        on_and_off_loading=True,
        reads_first_partial_sum=True,
        holds_last_value=True,
        whole_words=True,
    ),
    dataflows=("weight_stationary", "output_stationary"),
    mac_pj=0.2,
    memories={
        "weight_register": Memory(
            read_pj=0.0,
            write_pj=0.08 / 8,
            capacity_bits=8.0,
            port_bits=8.0,
            granule_bits=8.0,
            is_register=True,
            ports="transfer",
        ),
        "output_register": Memory(
            read_pj=0.02 / 32,
            write_pj=0.02 / 32,
            capacity_bits=32.0,
            port_bits=32.0,
            granule_bits=8.0,
            is_register=True,
            ports="transfer",
        ),
        "sram": _SRAM,
        "dram": Memory(
            read_pj=_DRAM_PJ,
            write_pj=_DRAM_PJ,
            capacity_bits=np.inf,
            port_bits=_DRAM_BITS,
            granule_bits=_DRAM_BITS,
            ports="one",
        ),
    },
    paths={
        "weight_stationary": {
            "output": ("output_register", "sram", "dram"),
            "input": ("sram", "dram"),
            "weight": ("weight_register", "dram"),
        },
        "output_stationary": _OUTPUT_STATIONARY,
    },
)
ACCELFORGE = ToolModel(
    name="AccelForge 1.0.467",
    switches=Switches(
        mapping="divisors",
        objective="energy_delay",
        exact_divisors=True,
        perfect_overlap=True,
        partial_sum_bits=8.0,
    ),
    dataflows=("weight_stationary",),
    mac_pj=0.2,
    memories={
        "weight_register": Memory(
            read_pj=0.0,
            write_pj=0.01,
            capacity_bits=8.0,
            port_bits=np.inf,
            granule_bits=8.0,
            is_register=True,
        ),
        "sram": dataclasses.replace(_SRAM, ports="direction"),
        "dram": Memory(
            read_pj=_DRAM_PJ,
            write_pj=_DRAM_PJ,
            capacity_bits=np.inf,
            port_bits=_DRAM_BITS,
            granule_bits=8.0,
            ports="one",
        ),
    },
    paths={
        "weight_stationary": {
            "output": ("sram", "dram"),
            "input": ("sram", "dram"),
            "weight": ("weight_register", "dram"),
        }
    },
)
TOOLS = {"scale_sim": SCALE_SIM, "zigzag": ZIGZAG, "accelforge": ACCELFORGE}

SPREAD: dict[Dataflow, tuple[int, int]] = {
    "weight_stationary": (COLS, INNER),
    "output_stationary": (ROWS, COLS),
    "input_stationary": (ROWS, INNER),
}
"""Dimensions along the sides of the array; the third one streams."""


@dataclass(frozen=True, kw_only=True)
class GemmCost:
    """Cycles of each product, and its energy in pJ where the tool states one, `[R]`."""

    cycles: Floats
    energy_pj: Floats | None


def gemm_cost(
    model: ToolModel, sizes: NDArray[np.int_], sides: NDArray[np.int_], dataflow: Dataflow
) -> GemmCost:
    """Returns what products cost with a tool's switches.

    Args:
      model: The tool and its machine.
      sizes: M, N and K of each product, `[R, 3]`, at least 1.
      sides: Places along each side of the array, `[R]`, at least 1.
      dataflow: What stays in the array.

    Raises:
      UnknownNameError: If the tool was not run with this dataflow.
      CodesignError: If sizes are not positive, or a product fits the machine in no way.
    """
    if dataflow not in model.dataflows:
        raise UnknownNameError(
            f"{model.name}: no dataflow `{dataflow}`: choose one of {', '.join(model.dataflows)}"
        )
    sizes, sides = np.asarray(sizes), np.asarray(sides)
    if np.min(sizes, initial=1) < 1 or np.min(sides, initial=1) < 1:
        raise CodesignError("a size of a product or an array is below 1: give positive sizes")
    places, rounds = _places(sizes, sides, dataflow, model.switches.exact_divisors)
    if model.switches.mapping == "fixed":
        return GemmCost(cycles=_tiles_in_turn(model, rounds, sides, dataflow), energy_pj=None)
    blocks = [
        _best(
            model, sizes[start:][:BLOCK], places[start:][:BLOCK], rounds[start:][:BLOCK], dataflow
        )
        for start in range(0, len(sizes), BLOCK)
    ]
    cycles, energy = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return GemmCost(cycles=cycles, energy_pj=energy)


def _places(
    sizes: NDArray[np.int_], sides: NDArray[np.int_], dataflow: Dataflow, exact: bool
) -> tuple[Floats, NDArray[np.int_]]:
    """Returns places of the array that a dimension takes, on average over its tiles, and its tiles, `[R, 3]`."""
    places, rounds = np.ones(sizes.shape), sizes.copy()
    for dim in SPREAD[dataflow]:
        if exact:
            pairs = zip(sizes[:, dim].tolist(), sides.tolist(), strict=True)
            used = np.array([max(d for d in divisors(size) if d <= side) for size, side in pairs])
            rounds[:, dim] = sizes[:, dim] // used
        else:
            rounds[:, dim] = -(-sizes[:, dim] // sides)
        places[:, dim] = sizes[:, dim] / rounds[:, dim]
    return places, rounds


def _tiles_in_turn(
    model: ToolModel, rounds: NDArray[np.int_], sides: NDArray[np.int_], dataflow: Dataflow
) -> Floats:
    """Returns cycles of tiles of the array one after another, `[R]`: the sizes of the tile are those of the array."""
    switches = model.switches
    first, second = SPREAD[dataflow]
    tiles = rounds[:, first] * rounds[:, second]
    streamed = rounds[:, ROWS + COLS + INNER - first - second]
    # Operands enter slantwise along both sides; what stays in the array enters before, a row per cycle.
    fill = 2 * sides - 2 + (0 if dataflow == "output_stationary" else sides)
    if not switches.fill_and_drain:
        return (tiles * streamed).astype(np.float64)
    if switches.weights_prefetched:
        return (tiles * streamed + fill).astype(np.float64)
    return (tiles * (streamed + fill) - 1).astype(np.float64)


def _best(
    model: ToolModel,
    sizes: NDArray[np.int_],
    places: Floats,
    rounds: NDArray[np.int_],
    dataflow: Dataflow,
) -> tuple[Floats, Floats]:
    """Returns cycles and energy of the best nest of each product, `[R]`."""
    switches = model.switches
    if switches.mapping == "divisors":
        nests, kept, product = tiled_nests(rounds)
        cuts = {operand: [cut] for operand, cut in kept.items()}
        mapped = MappedNests(
            model=model, dataflow=dataflow, nests=nests, places=places[product], cuts=cuts
        )
        fits = mapped.fits()
    else:
        nests, product = all_orders(rounds)
        mapped, fits = MappedNests(
            model=model, dataflow=dataflow, nests=nests, places=places[product]
        ).filled()
    macs = np.prod(sizes[product], axis=-1, dtype=np.float64)
    energy = np.where(fits, mapped.energy_pj() + model.mac_pj * macs, np.inf)
    cycles = mapped.cycles()
    keys = (cycles, energy) if switches.objective == "energy" else (energy * cycles,)
    order = np.lexsort((*keys, product))
    chosen = order[np.searchsorted(product[order], np.arange(len(sizes)))]
    if not np.all(np.isfinite(energy[chosen])):
        bad = sizes[np.argmin(np.isfinite(energy[chosen]))]
        raise CodesignError(
            f"{model.name}: no loop nest of a product of {'x'.join(map(str, bad))} fits its memories: "
            "give smaller sizes or larger memories"
        )
    return cycles[chosen], energy[chosen]
