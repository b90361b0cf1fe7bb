"""Speed of what runs deployed integers: the hard path beside the emulator, the cost model beside the simulator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from codesign.experiments.bench_sizes import BenchSizes
from codesign.experiments.bench_steps import bench_problem
from codesign.experiments.data import Examples
from codesign.experiments.evaluate import deployment, hard_chunks
from codesign.experiments.problem import Problem
from codesign.experiments.timing import Record, interleaved_seconds, rate_record
from codesign.experiments.traced import gemm_shapes, trace_of, traced_chunks
from codesign.hw import emulator
from codesign.hw.simulator import simulate
from codesign.hw.surrogate import cost
from codesign.mechanisms import Mechanism, mechanism_by_name
from codesign.models.deploy import Deployment
from codesign.models.model import apply_hard
from codesign.structure import ModelStructure
from codesign.workload import Workload


def _deployed(sizes: BenchSizes) -> tuple[Problem, Deployment, Examples]:
    """Returns a problem, its integers, and the images to run."""
    problem, point = bench_problem(sizes.experiment)
    images = problem.task.part("validation").first(sizes.num_images)
    return problem, deployment(problem, point), images


def bench_hard_path(sizes: BenchSizes) -> list[Record]:
    """Measures images per second of the integer path, costs included. Baseline: the NumPy emulator's logits."""
    problem, deployed, images = _deployed(sizes)
    seconds = interleaved_seconds(
        [
            lambda: [
                chunk.logits
                for chunk in hard_chunks(deployed, images, problem.accelerator, problem.buckets)
            ],
            functools.partial(
                emulator.emulate,
                deployed.structure,
                deployed.layers,
                deployed.ends,
                images.inputs,
                tensors=("logits",),
            ),
        ],
        sizes.repeats,
    )
    done = (len(images), len(images))
    return [rate_record("hard_path", "image/s", "NumPy emulator", done, seconds)]


@functools.partial(jax.jit, static_argnames=("structure", "mechanism"))
def _counted(
    layers: dict[str, jax.Array],
    ends: dict[str, jax.Array],
    inputs: dict[str, jax.Array],
    structure: ModelStructure,
    mechanism: Mechanism,
) -> Workload:
    return apply_hard(layers, ends, inputs, structure=structure, mechanism=mechanism).workload


def bench_simulator(sizes: BenchSizes) -> list[Record]:
    """Measures images per second of the cost model on counts. Baseline: the row-by-row simulator on the same masks."""
    problem, deployed, images = _deployed(sizes)
    structure = deployed.structure
    with jax.enable_x64(True):
        workload = _counted(
            *deployed.hard_arrays(),
            images.inputs,
            structure=structure,
            mechanism=mechanism_by_name(structure.mechanism),
        )
        counts = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), workload)
    traces = [trace_of(deployed, chunk) for chunk in traced_chunks(problem, deployed, images)]
    shapes = gemm_shapes(structure)
    seconds = interleaved_seconds(
        [
            functools.partial(
                jax.jit(cost), jax.tree.map(jnp.asarray, counts), problem.accelerator
            ),
            lambda: [simulate(trace, problem.spec, shapes) for trace in traces],
        ],
        sizes.repeats,
    )
    done = (len(images), len(images))
    return [rate_record("cost_of_counts", "image/s", "row simulator on masks", done, seconds)]
