"""Clock and supply of a machine: what follows when the clock is not that of its file.

A faster clock needs a higher supply, which everything on chip pays with its square; main memory has its
own of both. Times stay in cycles of the file's clock, so that machines of different clocks can be compared.

References:
  Sakurai and Newton, "Alpha-power law MOSFET model and its applications to CMOS inverter delay", IEEE JSSC 25(2), 1990:
  delay in proportion to V / (V - Vt)^alpha. Leakage in proportion to the supply is a reconstruction.
"""

import jax

from codesign.hw.accelerator import CLOCK, Accelerator
from codesign.hw.engine import EngineCost
from codesign.hw.host import HostCost
from codesign.hw.supply import supply_ratio
from codesign.hw.timeline import DRAM

Parts = dict[str, jax.Array]


class Clocked:
    """A machine at its own clock: costs counted in its cycles become those in cycles of the file's clock.

    Args:
      accelerator: A machine with the size `clock`.
    """

    def __init__(self, accelerator: Accelerator):
        threshold = accelerator.structure.threshold_ratio
        assert threshold is not None
        self.clock = accelerator.sizes[CLOCK]
        self.supply = supply_ratio(self.clock, threshold)
        self.dynamic = self.supply * self.supply
        rate = accelerator.sizes["dram.bytes_per_cycle"] / self.clock
        sizes = accelerator.sizes | {"dram.bytes_per_cycle": rate}
        self.accelerator: Accelerator = accelerator.replace(sizes=sizes)  # type: ignore[attr-defined]

    def cycles(self, own: jax.Array) -> jax.Array:
        """Returns times in cycles of the file's clock."""
        return own / self.clock

    def all_cycles(self, own: Parts) -> Parts:
        """Returns times by name in cycles of the file's clock."""
        return {name: self.cycles(value) for name, value in own.items()}

    def energy(self, own: Parts) -> Parts:
        """Returns energies by name at the supply that the clock needs; main memory's stay."""
        return {
            name: value if name == DRAM else value * self.dynamic for name, value in own.items()
        }

    def engine(self, own: EngineCost) -> EngineCost:
        """Returns what units take."""
        return EngineCost(
            cycles=self.cycles(own.cycles),
            busy_cycles=self.all_cycles(own.busy_cycles),
            energy_pj=self.energy(own.energy_pj),
        )

    def host(self, own: HostCost) -> HostCost:
        """Returns what the host takes, which has the machine's clock and supply."""
        return HostCost(
            cycles=self.cycles(own.cycles),
            mac_pj=own.mac_pj * self.dynamic,
            sram_pj=own.sram_pj * self.dynamic,
            dram_pj=own.dram_pj,
        )

    def standing(self, own: jax.Array | None) -> jax.Array | None:
        """Returns what is drawn in every cycle of the file's clock."""
        return None if own is None else own * self.supply
