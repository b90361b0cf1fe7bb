"""Speed of the mapper: products of BERT on many machines in one compiled call, beside one product after the other."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign.experiments.bench_sizes import BenchSizes
from codesign.experiments.bench_tools import LAYER
from codesign.experiments.timing import Record, interleaved_seconds, rate_record
from codesign.hw.gemm.layer import Layer, matmul
from codesign.hw.gemm.machine import Machine, machine_from_file, with_sizes
from codesign.hw.gemm.machine_file import load_machine
from codesign.hw.gemm.mapper import map_layers

NUM_SINGLE = 4
"""Products of the baseline, one call each."""
SIDES = (4, 8, 16, 32, 64, 128)
KIB_SPAN = (16, 2048)
"""Sides of the array and KB of each memory that machines are drawn from, buffers in powers of two."""


def products_on_machines(number: int) -> tuple[Layer, Machine]:
    """Returns the products of `LAYER` by turns, `[number]`, each on a machine of its own."""
    rng = np.random.default_rng(0)
    machine = machine_from_file(load_machine("gemmini"))
    low, high = np.log2(KIB_SPAN).astype(int)
    sizes = {"side": rng.choice(SIDES, number).astype(float)}
    for name in ("accumulator.bytes", "scratchpad.bytes"):
        sizes[name] = 1024.0 * 2.0 ** rng.integers(low, high + 1, number)
    extents = jnp.asarray(np.resize(LAYER, (number, len(LAYER[0]))), float)
    return matmul(*extents.T), with_sizes(
        machine, {name: jnp.asarray(size) for name, size in sizes.items()}
    )


def bench_mapper(sizes: BenchSizes) -> list[Record]:
    """Measures layers mapped per second with the default settings, all starts included.

    Baseline: the same function, compiled, called with one layer after the other.
    """
    number = sizes.num_single
    layer, machine = products_on_machines(number)
    key = jax.random.key(0)
    names = [name for name, size in machine.sizes.items() if size.ndim]

    def only(place: int) -> tuple[Layer, Machine]:
        own = slice(place, place + 1)
        part = layer.replace(  # type: ignore[attr-defined]
            extents=layer.extents[own], stride=layer.stride[own]
        )
        return part, with_sizes(machine, {name: machine.sizes[name][own] for name in names})

    singles = [only(place) for place in range(min(NUM_SINGLE, number))]

    def one_by_one() -> Any:
        return [map_layers(*single, key=key).reached for single in singles]

    together = functools.partial(map_layers, layer, machine, key=key)
    seconds = interleaved_seconds([together, one_by_one], sizes.repeats)
    done = (number, len(singles))
    return [rate_record("mapper", "layer/s", "one layer per call", done, seconds)]
