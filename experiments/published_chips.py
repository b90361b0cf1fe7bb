"""Area and power of every preset at its published operating point, beside what was published; nothing is trained."""

from dataclasses import dataclass

from codesign.experiments.reference_tables import PERCENT, ValidationRow
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import ModelShape
from codesign.hw.operating_points import closed_form_workload, published_setting
from codesign.hw.quantities import Quantity
from codesign.hw.spec import AcceleratorSpec, load_preset, preset_names
from codesign.hw.surrogate import SCOPES, Scope, cost
from codesign.units import PJ_PER_J

MAIN_MEMORY = ("dram", "host.dram")
LIMIT = 1.0
"""Most that an area, or a power to which a factor was fitted, may be off, %."""
FITTED_ELSEWHERE = ("esact",)
"""Presets whose published power holds where all prediction hides, which it does not at the operating point."""
ALWAYS_END_TO_END = ("esact", "fact")
"""Presets whose published power is that of whole layers: their own array runs the linear ones."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A preset at its published operating point.

    Attributes:
      name: The preset.
      scope: Of the power.
      area_mm2: Ours, without a host.
      published_area_mm2: As its file states it.
      core_watt: Ours: energy without main memory over latency; None where nothing was published.
      published_core_watt: As its file states it; None: not published.
      interface_watt: Main memory at full bandwidth, ours.
      published_interface_watt: The same as its file states it; None: not published.
      energy_factor: On all energies of the core, and where it comes from.
      area_factor: On all areas, and where it comes from.
    """

    name: str
    scope: Scope
    area_mm2: float
    published_area_mm2: float
    core_watt: float | None
    published_core_watt: float | None
    interface_watt: float
    published_interface_watt: float | None
    energy_factor: Quantity
    area_factor: Quantity


def chip_of(spec: AcceleratorSpec) -> Chip:
    """Returns a machine at its published operating point: one layer of as many heads, hidden size four times its width."""
    point = spec.operating_point
    heads, head_dim = int(point.num_heads.value), int(point.head_dim.value)
    width = heads * head_dim
    shape = ModelShape(
        num_layers=1,
        num_tokens=int(point.num_tokens.value),
        num_heads=heads,
        head_dim=head_dim,
        width=width,
        hidden=4 * width,
    )
    accelerator = accelerator_from_spec(spec)
    price = cost(closed_form_workload(spec, shape, published_setting(spec)), accelerator)
    scope = SCOPES[1] if spec.name in ALWAYS_END_TO_END else SCOPES[0]
    energy = price.energy_by_unit(scope)
    core_pj = sum(float(value[0]) for name, value in energy.items() if name not in MAIN_MEMORY)
    seconds = float(price.latency_cycles(scope)[0]) / spec.clock_hz
    published = None if point.core_power is None else point.core_power.base
    memory = None if point.memory_power is None else point.memory_power.base
    return Chip(
        name=spec.name,
        scope=scope,
        area_mm2=float(price.area_mm2("attention")),
        published_area_mm2=point.area.base,
        core_watt=None if published is None else core_pj / PJ_PER_J / seconds,
        published_core_watt=published,
        interface_watt=spec.dram.bandwidth.base * accelerator.structure.dram_pj_per_byte / PJ_PER_J,
        published_interface_watt=memory,
        energy_factor=spec.energy_factor,
        area_factor=spec.area.factor,
    )


def chips() -> list[Chip]:
    """Returns every shipped preset."""
    return [chip_of(load_preset(name)) for name in preset_names()]


def validate_chips() -> list[ValidationRow]:
    """Returns how far areas and powers of the presets are from published ones; the metric names both, and the factor."""
    rows = []
    for chip in chips():
        area = f"area {chip.area_mm2:.4g} mm2, published {chip.published_area_mm2:.4g}"
        error = chip.area_mm2 / chip.published_area_mm2 - 1.0
        rows.append(_row(chip, area, error, chip.area_factor, LIMIT))
        if chip.core_watt is not None and chip.published_core_watt is not None:
            scope = chip.scope.replace("_", " ")
            core = (
                f"core, {scope}, {chip.core_watt:.3g} W, published {chip.published_core_watt:.3g}"
            )
            error = chip.core_watt / chip.published_core_watt - 1.0
            is_fitted = chip.energy_factor.source.startswith("Fitted")
            limit = LIMIT if is_fitted and chip.name not in FITTED_ELSEWHERE else None
            rows.append(_row(chip, core, error, chip.energy_factor, limit))
        if chip.published_interface_watt is not None:
            ours, published = chip.interface_watt, chip.published_interface_watt
            memory = f"main memory at full bandwidth {ours:.3g} W, published {published:.3g}"
            rows.append(_row(chip, memory, ours / published - 1.0, None, None))
    return rows


def _row(
    chip: Chip, metric: str, error: float, factor: Quantity | None, limit: float | None
) -> ValidationRow:
    if factor is not None and factor.source.startswith("Fitted"):
        metric += f", by a fitted factor of {factor.value:.4g}"
    return ValidationRow(
        reference=f"preset {chip.name}",
        metric=metric,
        value=PERCENT * abs(error),
        unit="%",
        limit=limit,
        rows=1,
    )
