"""Runs in the simulators: the actual masks of a deployed model, beside the cost model's price of the same."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign.errors import CodesignError
from codesign.experiments.configs import Metric
from codesign.experiments.data import Examples, Part
from codesign.experiments.evaluate import HardChunk, deployment
from codesign.experiments.finished import FinishedRun
from codesign.experiments.problem import Problem
from codesign.experiments.traced import examples_of, gemm_shapes, trace_of, traced_chunks
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.simulator import Simulation, simulate
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.surrogate import SCOPES
from codesign.hw.timeline import Watched
from codesign.models.deploy import Deployment

METRICS: tuple[tuple[Metric, str], ...] = (
    ("latency", "latency_cycles"),
    ("energy", "energy_pj"),
)


def simulated_chunks(
    problem: Problem,
    deployed: Deployment,
    examples: Examples,
    machine: Accelerator,
    spec: AcceleratorSpec,
    watched: Watched | None = None,
) -> Iterator[tuple[HardChunk, Simulation]]:
    """Yields chunks of examples as the JAX hard path runs them, and the simulator on their masks.

    Args:
      problem: Of the model.
      deployed: The integers.
      examples: Data; their labels are not looked at.
      machine: The machine as the cost model reads it, which prices the chunks.
      spec: The same machine as a file.
      watched: Layer and example whose timeline to keep.
    """
    shapes = gemm_shapes(deployed.structure)
    for batch in traced_chunks(problem, deployed, examples, machine):
        yield (
            batch,
            simulate(
                trace_of(deployed, batch),
                spec,
                shapes,
                is_causal=deployed.structure.is_causal,
                watched=_watched_in(batch, watched),
            ),
        )


def compare_with_simulator(
    finished: FinishedRun, part: Part, num_examples: int, watched: Watched | None = None
) -> dict[str, Any]:
    """Returns latency, energy and counts of the cost model beside those of the simulator on actual masks.

    Args:
      finished: The run.
      part: Part of the data.
      num_examples: Images, the first ones of the part, >= 1.
      watched: Layer and example whose timeline is added.

    Raises:
      CodesignError: If there is no such layer or example.
    """
    problem = finished.problem
    deployed = deployment(problem, finished.point)
    examples = examples_of(problem, part, num_examples)
    if watched is not None:
        _check_watched(watched, deployed.structure.num_layers, len(examples))
    timeline: dict[str, Any] | None = None
    modelled: dict[str, list[NDArray[np.float64]]] = {}
    simulated: dict[str, list[NDArray[np.float64]]] = {}
    differing: str | None = None
    machine = accelerator_from_spec(finished.spec)
    spec = finished.spec
    for batch, simulation in simulated_chunks(problem, deployed, examples, machine, spec, watched):
        if watched is not None and watched.example in batch.indices:
            timeline = _timeline_record(simulation, spec.name, watched)
        differing = differing or _differing_count(simulation, batch)
        for scope in SCOPES:
            for metric, name in METRICS:
                key = f"{scope}.{name}"
                modelled.setdefault(key, []).append(batch.costs[scope][metric])
                simulated.setdefault(key, []).append(getattr(simulation, name)(scope))
    record: dict[str, Any] = {
        "part": part,
        "num_examples": len(examples),
        "counts_equal": differing is None,
        "first_differing_count": differing,
    }
    if timeline is not None:
        record["timeline"] = timeline
    for scope in SCOPES:
        record[scope] = {}
        for _, name in METRICS:
            model = np.concatenate(modelled[f"{scope}.{name}"])
            real = np.concatenate(simulated[f"{scope}.{name}"])
            record[scope][name] = {
                "cost_model": float(model.mean()),
                "simulator": float(real.mean()),
                "largest_relative_error": float(np.max(np.abs(model / real - 1.0))),
            }
    return record


def _check_watched(watched: Watched, num_layers: int, num_examples: int) -> None:
    """Does nothing if there are such a layer and such an example.

    Raises:
      CodesignError: If not.
    """
    for name, place, number in (
        ("layer", watched.layer, num_layers),
        ("example", watched.example, num_examples),
    ):
        if not 0 <= place < number:
            raise CodesignError(
                f"`--timeline-{name}` must lie in [0, {number - 1}], got {place}: choose a number in it"
            )


def _watched_in(batch: HardChunk, watched: Watched | None) -> Watched | None:
    """Returns what is watched by its place in a chunk; None if it is in another."""
    if watched is None or watched.example not in batch.indices:
        return None
    (places,) = np.nonzero(batch.indices == watched.example)
    return Watched(layer=watched.layer, example=int(places[0]))


def _timeline_record(simulation: Simulation, machine: str, watched: Watched) -> dict[str, Any]:
    """Returns the timeline of a simulation, of types that JSON can hold; times in cycles."""
    return {
        "machine": machine,
        **dataclasses.asdict(watched),
        "unit": "cycle",
        "spans": [dataclasses.asdict(span) for span in simulation.timeline],
    }


def _differing_count(simulation: Simulation, batch: HardChunk) -> str | None:
    """Returns the first operation whose count differs in any example or layer; None if none does."""
    for key in sorted(simulation.operations.keys() | batch.counts.keys()):
        if key not in simulation.operations or key not in batch.counts:
            return key
        if not np.all(simulation.operations[key] == batch.counts[key]):
            return key
    return None
