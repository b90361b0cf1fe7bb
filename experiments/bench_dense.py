"""Speed of the dense cost model: layers, each with mappings and a machine of its own, in one compiled call; other tools.

A layer is the five different products of BERT-Base at 128 tokens. Another tool searches the mappings that it prices, or is
given one at a time, so that a ratio to it is one of speed, not of equal work.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import NDArray

from codesign.experiments.bench_cost import SIZE_SPAN, SMOOTHNESS, batched
from codesign.experiments.bench_sizes import BenchSizes
from codesign.experiments.bench_tools import LAYER, beside
from codesign.experiments.timing import Record, interleaved_seconds, make_record, rate_record
from codesign.hw.gemm.cost import cost
from codesign.hw.gemm.layer import Layer, matmul
from codesign.hw.gemm.machine import Machine, machine_from_file, with_sizes
from codesign.hw.gemm.machine_file import load_machine
from codesign.hw.gemm.mapping import complete, dataflow_orders, spread_allowed, tile_allowed
from codesign.hw.gemm.names import MATMUL
from codesign.hw.tool_models import TOOLS

CHUNK = 256
"""Layers that are priced at a time: what passes between operations stays in a core's cache (ours, by trial)."""
MAX_SIDE_POWER = 5
"""Power of two of the most iterations side by side along a side of the array: 32."""
QUOTED_LAYERS_PER_S = {
    "dense_dosa": ("DOSA's access counts, quoted", 63.0),
    "dense_gradient_dosa": ("DOSA's access counts with gradient, quoted", 45.0),
    "dense_accelforge_fixed": ("AccelForge 1.0.467, mapping fixed, quoted", 6.0),
}
"""Ours: measured once, CPU time of one thread of a two-core x86-64 machine. DOSA's core (PyTorch, repository ucb-bar/dosa)
takes 3.19 ms forward and 4.44 ms with gradient for one product, five taken for a layer; AccelForge's `evaluate_mapping`
33 ms."""


@struct.dataclass
class DesignPoints:
    """Layers on machines, all numbers as logarithms to base 2; E products, L levels, D dimensions.

    Attributes:
      temporal: Iterations at all levels but the outermost, `[..., E, L - 1, D]`.
      spatial: Iterations side by side, `[..., E, L, D]`.
      sizes: Sizes of the machine, `[...]` each.
    """

    temporal: jax.Array
    spatial: jax.Array
    sizes: dict[str, jax.Array]


def products() -> Layer:
    """Returns the products of `LAYER`, `[E]`."""
    rows, outer, inner = np.asarray(LAYER, float).T
    return matmul(jnp.asarray(rows), jnp.asarray(inner), jnp.asarray(outer))


def design_points(machine: Machine, sizes: BenchSizes) -> tuple[DesignPoints, NDArray[np.int32]]:
    """Returns random design points with the orders of their loops, `[chunks, CHUNK, E, L, D]`, NumPy arrays.

    Every product has its own whole mapping, every level of it one of the three dataflows, every machine its own sizes.
    """
    rng = np.random.default_rng(0)
    chunk = min(CHUNK, sizes.chunk)
    shape = (sizes.num_chunks * sizes.chunk // chunk, chunk)
    structure, extents = machine.structure, np.asarray(products().extents, int)
    levels = len(structure.levels)
    tiles, spreads = tile_allowed(structure, MATMUL), spread_allowed(structure, MATMUL)
    temporal, spatial = np.zeros((2, *shape, len(LAYER), levels, len(MATMUL)), np.float32)
    for product, dim in np.ndindex(*extents.shape):
        # Each factor of two goes to a loop that may have it; what else there is, to the outermost one.
        extent = int(extents[product, dim])
        twos = (extent & -extent).bit_length() - 1
        loops = [(temporal, level) for level in np.flatnonzero(tiles[:, dim])]
        loops += [(spatial, level) for level in np.flatnonzero(spreads[:, dim])]
        powers = rng.multinomial(twos, np.full(len(loops), 1.0 / len(loops)), shape)
        for place, (factors, level) in enumerate(loops):
            factors[:, :, product, level, dim] = powers[..., place]
    spatial = np.minimum(spatial, MAX_SIDE_POWER)
    spread = np.log2(SIZE_SPAN)
    scaled = {
        name: (np.log2(float(size)) + rng.uniform(-spread, spread, shape)).astype(np.float32)
        for name, size in machine.sizes.items()
    }
    orders = dataflow_orders(MATMUL)
    chosen = orders[rng.integers(len(orders), size=(*shape, len(LAYER), levels))]
    return DesignPoints(temporal[..., :-1, :], spatial, scaled), chosen  # type: ignore[arg-type]


def log_edp(
    point: DesignPoints,
    order: jax.Array,
    machine: Machine,
    smoothness: float | None = None,
) -> jax.Array:
    """Returns log(energy * latency) of a layer on one machine, its products in turn, scalar."""
    layer = products()
    mapping = complete(jnp.exp2(point.temporal), jnp.exp2(point.spatial), order, layer)
    sized = with_sizes(machine, {name: jnp.exp2(size) for name, size in point.sizes.items()})
    found = cost(layer, mapping, sized, smoothness=smoothness)
    return jnp.log(jnp.sum(found.total_pj)) + jnp.log(jnp.sum(found.latency_cycles))


def edp_functions(machine: Machine) -> dict[str, Callable[[tuple[DesignPoints, jax.Array]], Any]]:
    """Returns what is evaluated at a design point: its cost; the smooth one of training with all derivatives."""

    def forward(given: tuple[DesignPoints, jax.Array]) -> jax.Array:
        return log_edp(*given, machine)

    def gradient(given: tuple[DesignPoints, jax.Array]) -> Any:
        smooth = functools.partial(log_edp, machine=machine, smoothness=SMOOTHNESS)
        return jax.value_and_grad(smooth)(*given)

    return {"dense": forward, "dense_gradient": gradient}


def bench_dense(sizes: BenchSizes) -> list[Record]:
    """Measures layers per second, forward and with the derivatives by all inner factors and all sizes.

    Baselines: the same function, compiled, called with one design point after the other; other tools, timed where they run
    and quoted where they do not (`codesign.experiments.bench_tools`); quoted figures of tools that are never timed here.
    """
    machine = machine_from_file(load_machine("gemmini"))
    points = design_points(machine, sizes)
    batch = jax.tree.map(jnp.asarray, points)
    singles = [
        jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[0, i]), points)
        for i in range(min(sizes.num_single, CHUNK, sizes.chunk))
    ]
    done = points[1].shape[0] * points[1].shape[1]
    records, per_s = [], {}
    for name, function in edp_functions(machine).items():
        single = jax.jit(function)

        def one_by_one(single: Callable[..., Any] = single) -> Any:
            return [single(point) for point in singles]

        together = functools.partial(batched(function), batch)
        seconds = interleaved_seconds([together, one_by_one], sizes.repeats)
        own = (done, len(singles))
        records.append(rate_record(name, "layer/s", "one design point per call", own, seconds))
        per_s[name] = records[-1]["value"]
        if name == "dense":
            records += [
                beside(f"dense_{tool}", tool, together, sizes.repeats, layers=done)
                for tool in TOOLS
            ]
    for name, (baseline, quoted) in QUOTED_LAYERS_PER_S.items():
        value = per_s["dense_gradient" if "gradient" in name else "dense"]
        records.append(make_record(name, value, "layer/s", baseline, quoted))
    return records
