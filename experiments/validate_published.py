"""Comparisons with published numbers that need no file: SOFA's table of scaled machines, Sanger's latency."""

from codesign.experiments.published_cases import (
    LATENCY_KEPT,
    LATENCY_TOKENS,
    LATENCY_UTILISATION,
    LATENCY_WIDTH,
)
from codesign.experiments.reference_tables import ValidationRow
from codesign.hw import sanger_estimator
from codesign.hw.scaling import SYSTEMS, scaled_system
from codesign.units import MS_PER_S

SANGER_MS = 0.822
"""Latency of the repository's example (hatsu3/Sanger)."""
COLUMNS = {
    "core_gops_per_watt": "GOPS/W of the core",
    "device_gops_per_watt": "GOPS/W of the device",
    "gops_per_mm2": "GOPS/mm2",
}
UNIT_LIMIT, LATENCY_LIMIT, PRINTED_LIMIT = 1.0, 0.7, 0.5e-3
"""Most that may differ: a unit of the printed columns, percent of latencies, half of the last printed digit in ms."""


def sofa_scaling() -> list[ValidationRow]:
    """Returns how far the nine machines scaled to 28 nm are from the printed columns (arXiv 2407.10416, Table II)."""
    pairs = [(system, scaled_system(system)) for system in SYSTEMS.values()]
    rows = []
    for column, name in COLUMNS.items():
        differences = [
            abs(getattr(scaled, column) - getattr(system, column))
            for system, scaled in pairs
            if getattr(system, column) is not None
        ]
        rows.append(
            ValidationRow(
                reference="SOFA, Table II",
                metric=f"{name}, largest difference",
                value=max(differences),
                unit="GOPS/mm2" if "mm2" in column else "GOPS/W",
                limit=UNIT_LIMIT,
                rows=len(differences),
            )
        )
    errors = [100.0 * abs(scaled.latency_ms / system.latency_ms - 1.0) for system, scaled in pairs]
    rows.append(
        ValidationRow(
            reference="SOFA, Table II",
            metric="latency, largest error",
            value=max(errors),
            unit="%",
            limit=LATENCY_LIMIT,
            rows=len(errors),
        )
    )
    return rows


def sanger_latency() -> list[ValidationRow]:
    """Returns how far Sanger's published formula is from its printed latency."""
    own = MS_PER_S * sanger_estimator.latency_s(
        LATENCY_TOKENS,
        LATENCY_WIDTH,
        kept=LATENCY_KEPT,
        utilisation=LATENCY_UTILISATION,
        scales_projection=True,
    )
    return [
        ValidationRow(
            reference="Sanger's formula",
            metric="latency, difference",
            value=abs(own - SANGER_MS),
            unit="ms",
            limit=PRINTED_LIMIT,
            rows=1,
        )
    ]
