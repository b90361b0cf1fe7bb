"""The dense cost model beside Timeloop and Accelergy on a Gemmini-like machine: every mapping of a published set at once.

The set is DOSA's (Hong et al., MICRO 2023; repository ucb-bar/dosa, BSD-2-Clause), `timeloop_gemmini.csv.gz`.
"""

import csv
import dataclasses
import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign import units
from codesign.errors import DataError
from codesign.experiments.reference_tables import ValidationRow
from codesign.hw.gemm.cost import MULTIPLIERS, GemmCost, cost
from codesign.hw.gemm.layer import Layer, widths
from codesign.hw.gemm.machine import Machine, machine_from_file, with_sizes, with_switches
from codesign.hw.gemm.machine_file import load_machine
from codesign.hw.gemm.mapping import Mapping
from codesign.hw.gemm.names import CONVOLUTION
from codesign.hw.gemm.timeloop import parse_mappings

FILE = "timeloop_gemmini.csv.gz"
REFERENCE = "Timeloop + Accelergy, Gemmini (DOSA, MICRO 2023)"
LATENCY_LIMIT, ENERGY_LIMIT = 0.01, 0.2
"""Mean absolute errors to stay below, %."""
RANK_LIMIT = 1e-5
"""Rank correlation to reach (DOSA's own model of the same counts has more)."""
PERCENT = 100.0
_ACCUMULATOR_BYTES = 4.0  # `arch.yaml` of the set: words of 32 bit.


@dataclasses.dataclass(frozen=True)
class TimeloopPoints:
    """Mappings with what Timeloop says of them: cycles, uJ and mm2, `[N]`; `sizes` are those of the machine, `[N]`."""

    layer: Layer
    mapping: Mapping
    sizes: dict[str, NDArray[np.float64]]
    cycles: NDArray[np.float64]
    energy_uj: NDArray[np.float64]
    area_mm2: NDArray[np.float64]


def read_points(folder: Path, *, num_rows: int | None = None, file: str = FILE) -> TimeloopPoints:
    """Returns the points of the set, or every so many of them.

    Args:
      folder: Where the file is.
      num_rows: How many, evenly spaced; None takes all.
      file: Its name, if it is another one with the same columns.

    Raises:
      DataError: If the file is not there, or not such a set.
    """
    path = folder / file
    if not path.is_file():
        raise DataError(f"{path} does not exist: give the folder that holds {file}")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        heading, *rows = csv.reader(lines)
    if num_rows is not None:
        rows = rows[:: max(1, len(rows) // num_rows)][:num_rows]
    columns = dict(zip(heading, zip(*rows, strict=True), strict=False))

    def number(name: str) -> NDArray[np.float64]:
        if name not in columns:
            raise DataError(f"{path} has no column `{name}`: it is another file")
        return np.asarray(columns[name], dtype=np.float64)

    extents = np.stack([number(f"prob.{dim}") for dim in CONVOLUTION], axis=-1)
    machine = load_machine("gemmini")
    factors = parse_mappings(columns["mapping.mapping"], CONVOLUTION, len(machine.levels))
    temporal, spatial, order = factors
    if not np.array_equal(np.prod(temporal * spatial, axis=1), extents):
        raise DataError(f"{path}: the factors of a mapping do not make its layer: it is damaged")
    stride = np.stack([number("prob.Wstride"), number("prob.Hstride")], axis=-1)
    layer = Layer(extents=extents, stride=stride, bits=widths(), dims=CONVOLUTION)  # type: ignore[arg-type]
    return TimeloopPoints(
        layer=layer,
        mapping=Mapping(temporal=temporal, spatial=spatial, order=order, dims=CONVOLUTION),  # type: ignore[arg-type]
        sizes={
            "side": number("arch.meshX"),
            "accumulator.bytes": number("arch.mem1_entries")
            * number("arch.mem1_instances")
            * _ACCUMULATOR_BYTES,
            "scratchpad.bytes": number("arch.mem2_entries"),
        },
        cycles=number("target.cycle"),
        energy_uj=number("target.energy"),
        area_mm2=number("target.area"),
    )


@jax.jit
def priced(layer: Layer, mapping: Mapping, machine: Machine) -> GemmCost:
    """Returns the cost of mappings, compiled."""
    return cost(layer, mapping, machine)


def timeloop_cost(points: TimeloopPoints, **switches: bool) -> GemmCost:
    """Returns the model's cost of every point, in float64, with the switches of Timeloop or some of another's."""
    with jax.enable_x64(True):
        machine = with_switches(machine_from_file(load_machine("gemmini")), **switches)
        sizes = {name: jnp.asarray(size) for name, size in points.sizes.items()}
        inputs = jax.tree.map(jnp.asarray, (points.layer, points.mapping))
        result: GemmCost = priced(*inputs, with_sizes(machine, sizes))
        return jax.tree.map(np.asarray, result)  # type: ignore[no-any-return]


def validate_timeloop(folder: Path, *, num_rows: int | None = None) -> list[ValidationRow]:
    """Returns how the model agrees with Timeloop.

    Args:
      folder: Where `timeloop_gemmini.csv.gz` is.
      num_rows: How many points, evenly spaced; None takes all.

    Raises:
      DataError: If the file is not there, or not such a set.
    """
    points = read_points(folder, num_rows=num_rows)
    result = timeloop_cost(points)
    cycles, energy = np.asarray(result.latency_cycles), np.asarray(result.total_pj)
    energy = energy / units.PJ_PER_UJ
    pairs = {
        "latency": (cycles, points.cycles, LATENCY_LIMIT),
        "energy": (energy, points.energy_uj, ENERGY_LIMIT),
        "EDP": (cycles * energy, points.cycles * points.energy_uj, None),
    }
    figures: list[tuple[str, float, str, float | None]] = []
    for name, (own, reference, limit) in pairs.items():
        errors = PERCENT * np.abs(own / reference - 1.0)
        figures.append((f"{name}, mean absolute error", float(errors.mean()), "%", limit))
        figures.append((f"{name}, largest error", float(errors.max()), "%", None))
        figures.append((f"{name}, 1 - Spearman", 1.0 - spearman(own, reference), "1", RANK_LIMIT))
    exact = PERCENT * float(np.mean(cycles == points.cycles))
    figures.append(("latency, equal to the cycle", exact, "%", None))
    for name, share in binding_shares(result).items():
        figures.append((f"points that {name} bind", PERCENT * share, "%", None))
    return [
        ValidationRow(
            reference=REFERENCE,
            metric=metric,
            value=value,
            unit=unit,
            limit=limit,
            rows=len(cycles),
        )
        for metric, value, unit, limit in figures
    ]


def binding_shares(result: GemmCost) -> dict[str, float]:
    """Returns for the array and each level the share of points whose latency it sets; ties go to the innermost."""
    levels = load_machine("gemmini").levels
    names = [name for name in (MULTIPLIERS, *levels) if name in result.busy_cycles]
    times = np.stack([np.asarray(result.busy_cycles[name]) for name in names])
    counts = np.bincount(times.argmax(axis=0), minlength=len(names))
    return {name: float(count) / times.shape[1] for name, count in zip(names, counts, strict=True)}


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Returns the rank correlation of two samples `[N]`, ties at their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2.0)[place]
    return ranks
