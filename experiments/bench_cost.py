"""Speed of the cost model: many design points in one compiled call, beside one point after the other."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign.experiments.bench_sizes import BenchSizes
from codesign.experiments.timing import Record, interleaved_seconds, rate_record
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.closed_form import ModelShape, Setting, workload_from_fractions
from codesign.hw.spec import load_preset
from codesign.hw.surrogate import cost
from codesign.workload import Workload

DesignPoints = tuple[Workload, dict[str, Any]]
"""Workload leaves and sizes of the machine, all with a leading axis of design points."""

BERT_LAYER = ModelShape(
    num_layers=1, num_tokens=128, num_heads=12, head_dim=64, width=768, hidden=3072
)
"""One layer of BERT-Base at 128 tokens (Devlin et al., arXiv 1810.04805)."""
SIZE_SPAN = 2.0
"""Design points have sizes from 1 / SIZE_SPAN to SIZE_SPAN times the preset's."""
SMOOTHNESS = 8.0
"""Exponent of the smooth maximum under the gradient: where training starts."""


def design_points(accelerator: Accelerator, sizes: BenchSizes) -> DesignPoints:
    """Returns random design points of `BERT_LAYER`: every size of the machine, all kept fractions and all bits vary.

    Leaves are NumPy arrays `[num_chunks, chunk, ...]`.
    """
    rng = np.random.default_rng(0)

    def setting() -> Setting:
        first = rng.uniform(0.2, 1.0)
        low = rng.uniform(2.0, 4.0)
        return Setting(
            kept=(first, first * rng.uniform(0.1, 1.0)),
            query_bits=rng.uniform(2.0, 8.0),
            key_bits=(low, low + rng.uniform(1.0, 4.0)),
            qk_bits=rng.uniform(8.0, 16.0),
            v_bits=rng.uniform(8.0, 16.0),
            weight_bits=rng.uniform(2.0, 8.0),
            activation_bits=rng.uniform(2.0, 8.0),
        )

    shape = (sizes.num_chunks, sizes.chunk)
    workloads = [workload_from_fractions(BERT_LAYER, setting()) for _ in range(sizes.num_settings)]
    chosen = rng.integers(sizes.num_settings, size=shape)
    workload = jax.tree.map(lambda *leaves: np.stack(leaves)[chosen], *workloads)
    spread = np.log(SIZE_SPAN)
    scaled = {
        name: (float(size) * np.exp(rng.uniform(-spread, spread, shape))).astype(np.float32)
        for name, size in accelerator.sizes.items()
    }
    return workload, scaled


def point_cost(
    point: DesignPoints, accelerator: Accelerator, smoothness: float | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns energy (pJ), latency (cycles) and area (mm2) of one design point, host included."""
    workload, sizes = point
    machine = accelerator.replace(sizes=sizes)  # type: ignore[attr-defined]
    price = cost(workload, machine, smoothness=smoothness)
    energy, latency = price.energy_pj("end_to_end")[0], price.latency_cycles("end_to_end")[0]
    return energy, latency, price.area_mm2("end_to_end")


def log_cost(point: DesignPoints, accelerator: Accelerator) -> jax.Array:
    """Returns log(energy * latency * area) of one design point, with the smooth maximum of training, scalar."""
    energy, latency, area = point_cost(point, accelerator, SMOOTHNESS)
    return jnp.log(energy) + jnp.log(latency) + jnp.log(area)


def cost_functions(accelerator: Accelerator) -> dict[str, Callable[[DesignPoints], Any]]:
    """Returns what is evaluated at a design point: its cost; `log_cost` with all derivatives."""
    return {
        "cost": functools.partial(point_cost, accelerator=accelerator),
        "cost_gradient": jax.value_and_grad(functools.partial(log_cost, accelerator=accelerator)),
    }


def batched(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns the compiled function of design points, leaves `[num_chunks, chunk, ...]`.

    Chunk by chunk, what passes between operations stays in the processor's cache.
    """

    def mapped(points: Any) -> Any:
        return jax.lax.map(jax.vmap(function), points)

    return jax.jit(mapped)


def bench_cost(sizes: BenchSizes) -> list[Record]:
    """Measures evaluations of the cost model per second, forward and with the gradient by sizes and workload.

    Baseline: the same function, compiled, called with one design point after the other.
    """
    accelerator = accelerator_from_spec(load_preset("energon"))
    points = design_points(accelerator, sizes)
    singles = [
        jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[0, i]), points)
        for i in range(min(sizes.num_single, sizes.chunk))
    ]
    batch = jax.tree.map(jnp.asarray, points)
    records = []
    for name, function in cost_functions(accelerator).items():
        single = jax.jit(function)

        def one_by_one(single: Callable[[DesignPoints], Any] = single) -> Any:
            return [single(point) for point in singles]

        seconds = interleaved_seconds(
            [functools.partial(batched(function), batch), one_by_one], sizes.repeats
        )
        done = (sizes.num_chunks * sizes.chunk, len(singles))
        records.append(
            rate_record(name, "evaluation/s", "one design point per call", done, seconds)
        )
    return records
