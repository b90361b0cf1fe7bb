"""The mapper beside the best mappings that others found for the same matrix products on the same machines.

Two sets of DOSA (Hong et al., MICRO 2023; repository ucb-bar/dosa, BSD-2-Clause): random mappings on 64 machines, among
them the products of transformers with 128 rows, and mappings of BERT that DOSA itself searched.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.experiments.reference_tables import ValidationRow
from codesign.experiments.validation_timeloop import (
    TimeloopPoints,
    priced,
    read_points,
    timeloop_cost,
)
from codesign.hw.gemm.layer import Layer, matmul
from codesign.hw.gemm.machine import Machine, machine_from_file, with_sizes
from codesign.hw.gemm.machine_file import load_machine
from codesign.hw.gemm.mapper import MapperSettings, map_layers
from codesign.hw.gemm.names import CONVOLUTION, MATMUL

SEARCHED_FILE = "firesim_gemmini.csv.gz"
"""Mappings that DOSA searched; not needed."""
ROWS = 128.0
"""Rows of the products that are compared: sequences of 128, as in BERT."""
WORST_RATIO = 1.0 + 1e-6
"""EDP over that of the best mapping known: none may be worse, but the search, in float32, sees no smaller difference."""
Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class ProductsKnown:
    """Products on machines, each pair once, with the least EDP of any mapping of the data, uJ cycle.

    Attributes:
      extents: Rows, inner and outer size, `[N, 3]`.
      sizes: Sizes of the machine, `[N]`.
      modelled_edp: By our model, `[N]`.
      timeloop_edp: By Timeloop, `[N]`.
      num_mappings: Mappings of the data behind each, `[N]`.
    """

    extents: Floats
    sizes: dict[str, Floats]
    modelled_edp: Floats
    timeloop_edp: Floats
    num_mappings: NDArray[np.intp]


def products_known(points: TimeloopPoints, *, rows: float | None = ROWS) -> ProductsKnown:
    """Returns the matrix products among points.

    Args:
      points: Mappings with Timeloop's figures.
      rows: Only products of so many rows; None takes all.
    """
    extents = np.asarray(points.layer.extents)
    others = [CONVOLUTION.index(dim) for dim in CONVOLUTION if dim not in MATMUL]
    products = extents[:, [CONVOLUTION.index(dim) for dim in MATMUL]]
    is_chosen = np.all(extents[:, others] == 1.0, axis=1)
    if rows is not None:
        is_chosen &= products[:, MATMUL.index("P")] == rows
    kinds = np.column_stack([products, *points.sizes.values()])[is_chosen]
    pairs, place, number = np.unique(kinds, axis=0, return_inverse=True, return_counts=True)

    def least(edp: Floats) -> Floats:
        found = np.full(len(pairs), np.inf)
        np.minimum.at(found, place.ravel(), edp[is_chosen])
        return found

    return ProductsKnown(
        extents=pairs[:, : len(MATMUL)],
        sizes=dict(zip(points.sizes, pairs[:, len(MATMUL) :].T, strict=True)),
        modelled_edp=least(np.asarray(timeloop_cost(points).edp)),
        timeloop_edp=least(points.cycles * points.energy_uj),
        num_mappings=number,
    )


def both(first: ProductsKnown, second: ProductsKnown) -> ProductsKnown:
    """Returns the products of both."""
    joined: ProductsKnown = jax.tree.map(
        lambda a, b: np.concatenate([a, b]),
        dataclasses.asdict(first),
        dataclasses.asdict(second),
    )
    return ProductsKnown(**joined)  # type: ignore[arg-type]


def mapped_edp(known: ProductsKnown, *, settings: MapperSettings | None = None) -> Floats:
    """Returns the EDP of what the mapper finds, uJ cycle in float64, `[N]`."""
    layer, machine = _machines(known)
    found = map_layers(layer, machine, settings=settings, key=jax.random.key(0))
    with jax.enable_x64(True):
        exact_layer, exact_machine = _machines(known)
        mapping = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, float if leaf.dtype.kind == "f" else leaf.dtype),
            found.mapping,
        )
        return np.asarray(priced(exact_layer, mapping, exact_machine).edp)


def _machines(known: ProductsKnown) -> tuple[Layer, Machine]:
    machine = machine_from_file(load_machine("gemmini"))
    sizes = {name: jnp.asarray(size, float) for name, size in known.sizes.items()}
    return matmul(*jnp.asarray(known.extents, float).T), with_sizes(machine, sizes)


def validate_mapper(folder: Path, *, settings: MapperSettings | None = None) -> list[ValidationRow]:
    """Returns the mapper's EDP over that of the best mapping in the data, on the same machine.

    Args:
      folder: Where `timeloop_gemmini.csv.gz` and, if at all, `firesim_gemmini.csv.gz` are.
      settings: How much the mapper searches; None: its defaults.

    Raises:
      DataError: If the first is not there, or a file is not such a set.
    """
    known = {"random mappings, 128 rows": products_known(read_points(folder))}
    if (folder / SEARCHED_FILE).is_file():
        searched = read_points(folder, file=SEARCHED_FILE)
        known["DOSA's mappings of BERT"] = products_known(searched)
    # One search for all: it compiles once.
    parts = list(known.values())
    together = parts[0] if len(parts) == 1 else both(*parts)
    edp = mapped_edp(together, settings=settings)
    ends = np.cumsum([len(part.extents) for part in parts])
    rows = []
    for (name, part), own in zip(known.items(), np.split(edp, ends[:-1]), strict=True):
        figures: list[tuple[str, float, float | None]] = [
            ("largest", np.max(own / part.modelled_edp), WORST_RATIO),
            ("geometric mean", np.exp(np.mean(np.log(own / part.modelled_edp))), None),
            ("largest, theirs by Timeloop", np.max(own / part.timeloop_edp), None),
            ("number of products", len(own), None),
        ]
        rows += [
            ValidationRow(
                reference=f"Mapper beside {name}",
                metric=metric if metric.startswith("number") else f"EDP over the best, {metric}",
                value=float(value),
                unit="1",
                limit=limit,
                rows=int(part.num_mappings.sum()),
            )
            for metric, value, limit in figures
        ]
    return rows
