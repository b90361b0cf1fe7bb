"""Published machines of several nodes scaled to 28 nm and 1 V, as a published table scales them; standard library only.

References:
  Wang et al., "SOFA", MICRO 2024, arXiv 2407.10416, Table II: clock falls as 1 / s^2 and power as 1 / (s Vdd^2), s being
  the node over 28 nm. Derived: supplies that make every row come out, and the multipliers, from the printed latencies.
"""

from dataclasses import dataclass
from types import MappingProxyType

from codesign.errors import UnknownNameError
from codesign.units import MS_PER_S

NODE_NM = 28.0
SUPPLY_VOLTS = MappingProxyType({22.0: 0.8, 28.0: 1.0, 40.0: 1.1, 45.0: 1.1, 55.0: 1.2})
"""Supply by node in nm (Derived: those with which every row of Table II comes out)."""
TASK_GOP = 137.0
"""Attention of Llama-7B, billions of operations, whose latency Table II gives (arXiv 2407.10416)."""
TASK_MULTIPLIERS = 128.0
"""Multipliers to which latencies are scaled (arXiv 2407.10416, Table II)."""


@dataclass(frozen=True, kw_only=True)
class PublishedSystem:
    """A row of Table II of arXiv 2407.10416, as printed.

    Attributes:
      name: The machine.
      loss_percent: What accuracy it loses.
      saved_percent: What part of the computation of attention it saves.
      node_nm: Technology.
      clock_mhz: Clock.
      area_mm2: Area at its node.
      core_watts: Power of the core at its node.
      interface_watts: Power of main memory and its interface; None: not printed.
      effective_gops: Operations of dense attention over time, skipped ones among them.
      core_gops_per_watt: Printed efficiency of the core at 28 nm.
      device_gops_per_watt: That of core, interface and memory; None: not printed.
      gops_per_mm2: Printed efficiency of the area at 28 nm.
      latency_ms: Printed latency of `TASK_GOP` at `TASK_MULTIPLIERS`.
      multipliers: Multipliers at 1 GHz that it has (Derived: from the latency).
    """

    name: str
    loss_percent: float
    saved_percent: float
    node_nm: float
    clock_mhz: float
    area_mm2: float
    core_watts: float
    interface_watts: float | None
    effective_gops: float
    core_gops_per_watt: float
    device_gops_per_watt: float | None
    gops_per_mm2: float
    latency_ms: float
    multipliers: float


def _system(name: str, *values: float | None) -> PublishedSystem:
    """Returns a row; the values are in the order of the table's columns."""
    names = tuple(field for field in PublishedSystem.__dataclass_fields__ if field != "name")
    return PublishedSystem(name=name, **dict(zip(names, values, strict=True)))  # type: ignore[arg-type]


SYSTEMS = {
    system.name: system
    for system in (
        _system("A3", 5.3, 40, 40, 1000, 2.08, 0.205, 0.617, 221, 1863, 300, 217, 622, 128),
        _system("ELSA", 2, 73, 40, 1000, 1.26, 0.969, 0.525, 1090, 1944, 1004, 1765, 252, 256),
        _system("Sanger", 0, 76, 55, 500, 16.9, 2.76, None, 2285, 2342, None, 522, 241, 512),
        _system("DOTA", 0.8, 80, 22, 1000, 4.44, 3.02, None, 4905, 817, None, 683, 448, 2048),
        _system("Energon", 0.9, 77, 45, 1000, 4.2, 0.32, 2.4, 1153, 7007, 450, 709, 477, 512),
        _system("DTATrans", 0.74, 74, 40, 1000, 1.49, 0.734, None, 1304, 3071, None, 1786, 652, 794),
        _system("SpAtten", 0.9, 67, 40, 1000, 1.55, 0.325, 0.617, 360, 1915, 447, 474, 382, 128),
        _system("FACT", 0, 79, 28, 500, 6.03, 0.337, None, 928, 2754, None, 154, 296, 256),
        _system("SOFA", 0, 82, 28, 1000, 5.69, 0.95, 2.45, 24423, 25708, 7183, 4292, 45, 1024),
    )
}  # fmt: skip
"""Rows of Table II of arXiv 2407.10416 by machine."""


@dataclass(frozen=True, kw_only=True)
class ScaledSystem:
    """A machine at 28 nm and 1 V; fields as in `PublishedSystem`."""

    core_gops_per_watt: float
    device_gops_per_watt: float | None
    gops_per_mm2: float
    latency_ms: float


def power_factor(node_nm: float) -> float:
    """Returns how many times the power at 28 nm and 1 V a core draws at a node, `s Vdd^2`.

    Raises:
      UnknownNameError: If no supply is known for the node.
    """
    if node_nm not in SUPPLY_VOLTS:
        known = ", ".join(f"{node:g}" for node in SUPPLY_VOLTS)
        raise UnknownNameError(
            f"no supply is known at {node_nm:g} nm: take a node among {known}, or add its supply"
        )
    return node_nm / NODE_NM * SUPPLY_VOLTS[node_nm] ** 2


def area_factor(node_nm: float) -> float:
    """Returns how many times its area at 28 nm a machine takes at a node, `s^2`."""
    return (node_nm / NODE_NM) ** 2


def scaled_system(system: PublishedSystem) -> ScaledSystem:
    """Returns the efficiencies of a machine at 28 nm and 1 V, and its latency at `TASK_MULTIPLIERS`.

    Area shrinks by `area_factor` and the core's power by `power_factor`; main memory and its interface stay.
    """
    core_watts = system.core_watts / power_factor(system.node_nm)
    gops, device = system.effective_gops, None
    if system.interface_watts is not None:
        device = gops / (core_watts + system.interface_watts)
    return ScaledSystem(
        core_gops_per_watt=gops / core_watts,
        device_gops_per_watt=device,
        gops_per_mm2=gops * area_factor(system.node_nm) / system.area_mm2,
        latency_ms=TASK_GOP * system.multipliers / TASK_MULTIPLIERS / gops * MS_PER_S,
    )
