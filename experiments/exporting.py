"""From a finished run to an export, and what checks it: the emulator and the simulator against the JAX hard path."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign import __version__
from codesign.errors import CodesignError
from codesign.experiments.configs import Metric
from codesign.experiments.data import Examples, Part
from codesign.experiments.evaluate import (
    HardChunk,
    deployment,
    hard_chunks,
    machine_of,
    measure,
)
from codesign.experiments.finished import FinishedRun
from codesign.experiments.problem import Problem
from codesign.hw import emulator
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.export import (
    Difference,
    Export,
    ReplayReport,
    first_difference,
    write_export,
)
from codesign.hw.hardware_config import (
    Expected,
    ExpectedCost,
    HardwareConfig,
    IntegerPolicy,
    Scales,
)
from codesign.hw.simulator import GemmShape, Simulation, simulate
from codesign.hw.sizing import total_area_mm2
from codesign.hw.surrogate import SCOPES
from codesign.hw.timeline import Watched
from codesign.mechanisms import mechanism_by_name
from codesign.models.deploy import Deployment
from codesign.references import reference_by_name
from codesign.references.a3 import OFF as SEARCH_OFF
from codesign.references.esact import SIMILARITY_OFF
from codesign.structure import ModelStructure, PatchInput
from codesign.vocabulary import BLOCK_SITES
from codesign.workload import NonZero, Trace, nonzero

TRACE_CHUNK = 32
"""Most examples per call of the compiled tracing path."""
METRICS: tuple[tuple[Metric, str], ...] = (
    ("latency", "latency_cycles"),
    ("energy", "energy_pj"),
)


def traced_chunks(
    problem: Problem,
    deployed: Deployment,
    examples: Examples,
    machine: Accelerator | None = None,
) -> Iterator[HardChunk]:
    """Yields chunks of examples with everything the JAX hard path does on them, priced on `machine` or the problem's."""
    return hard_chunks(
        deployed,
        examples,
        machine or problem.accelerator,
        problem.buckets,
        mechanism=problem.mechanism,
        tracing=True,
        most=TRACE_CHUNK,
    )


def examples_of(problem: Problem, part: Part, num_examples: int) -> Examples:
    """Returns the first examples of a part.

    Raises:
      CodesignError: If `num_examples` is not positive, or the part is not there.
    """
    if num_examples < 1:
        raise CodesignError(f"at least one example is needed, got {num_examples}: raise the number")
    return problem.task.part(part).first(num_examples)


def write_run_export(finished: FinishedRun, out: Path, *, num_golden: int) -> HardwareConfig:
    """Writes the export of a run; golden vectors come from the JAX hard path on validation examples.

    Args:
      finished: The run.
      out: Directory to make.
      num_golden: Examples whose tensors are stored, 1 to `TRACE_CHUNK`; those of one length of padding.

    Returns:
      The configuration as written.

    Raises:
      CodesignError: If `num_golden` is out of range.
      RunDirectoryError: If `out` exists.
    """
    if not 1 <= num_golden <= TRACE_CHUNK:
        raise CodesignError(
            f"`--num-golden` must lie in [1, {TRACE_CHUNK}], got {num_golden}: choose a number in it"
        )
    problem = finished.problem
    deployed = deployment(problem, finished.point)
    chunk = next(traced_chunks(problem, deployed, examples_of(problem, "validation", num_golden)))
    scales = dict(deployed.scales)
    residual_scale = scales.pop("residual")
    assert isinstance(residual_scale, float)
    config = HardwareConfig(
        generator=f"codesign {__version__}",
        structure=deployed.structure,
        policy=IntegerPolicy.from_arrays(deployed.structure, deployed.layers, deployed.ends),
        scales=Scales(
            activation_scales=scales,
            residual_scale=residual_scale,
            logit_scale=deployed.logit_scale,
        ),
        accelerator=finished.spec,
        expected=_expected(finished),
    )
    return write_export(out, config, deployed.layers, deployed.ends, chunk.inputs, chunk.tensors)


def _expected(finished: FinishedRun) -> Expected:
    """Returns what the run reached on the validation part."""
    problem = finished.problem
    measured = measure(problem, finished.point, "validation")
    # Measured in cycles of the preset's clock; the machine that is exported may have another.
    clock = finished.spec.clock_hz / problem.spec.clock_hz
    area_mm2 = total_area_mm2(machine_of(problem, finished.point))
    attention, end_to_end = (
        ExpectedCost(
            energy_pj=measured.mean_cost("energy", scope),
            latency_cycles=measured.mean_cost("latency", scope) * clock,
        )
        for scope in SCOPES
    )
    return Expected(
        part="validation",
        num_examples=len(measured.quality),
        quality_name=measured.quality_name,
        quality=float(np.mean(measured.quality)),
        kl_nats=float(np.mean(measured.kl_nats)),
        attention=attention,
        end_to_end=end_to_end,
        area_mm2=float(area_mm2),
    )


def differing_array(export: Export, deployed: Deployment) -> str | None:
    """Returns the name of the first array in which an export differs from a deployment; None if none does."""
    if export.config.structure != deployed.structure:
        return "structure"
    for group, stored, own in (
        ("layers", export.layers, deployed.layers),
        ("ends", export.ends, deployed.ends),
    ):
        for name in sorted(own):
            if not np.array_equal(stored[name], own[name]):
                return f"{group}/{name}"
    return None


def compare_on_fresh_data(
    export: Export, finished: FinishedRun, part: Part, num_examples: int
) -> ReplayReport:
    """Returns how the emulator on an export compares with the run's JAX hard path, on examples that are not golden.

    Raises:
      CodesignError: If the part has no other example.
    """
    problem, structure = finished.problem, export.config.structure
    name = "pixels" if isinstance(structure.input, PatchInput) else "tokens"
    golden = {_content(row) for row in export.inputs[name]}
    everything = problem.task.part(part)
    is_fresh = np.asarray([_content(row) not in golden for row in everything.inputs[name]])
    examples = everything.take(np.flatnonzero(is_fresh)[:num_examples])
    if not len(examples):
        raise CodesignError(
            f"no example of part `{part}` is left to compare on ({num_examples} asked for): "
            "raise the number, or choose another part"
        )
    decisions = reference_by_name(structure.mechanism).decision_tensors
    num_values = num_decisions = 0
    difference: Difference | None = None
    deployed = deployment(problem, finished.point)
    for chunk in traced_chunks(problem, deployed, examples):
        emulated = emulator.emulate(structure, export.layers, export.ends, chunk.inputs)
        num_values += sum(values.size for values in chunk.tensors.values())
        num_decisions += sum(chunk.tensors[tensor].size for tensor in decisions)
        difference = difference or first_difference(chunk.tensors, emulated)
    return ReplayReport(
        num_examples=len(examples),
        num_values=num_values,
        num_decisions=num_decisions,
        difference=difference,
    )


def _content(row: NDArray[Any]) -> bytes:
    """Returns what tells one example from another: its integers without the padding at the end, which is 0."""
    return np.trim_zeros(np.ravel(row).astype(np.int64), "b").tobytes()


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
    shapes = gemm_shapes(deployed.structure)
    if watched is not None:
        _check_watched(watched, deployed.structure.num_layers, len(examples))
    timeline: dict[str, Any] | None = None
    modelled: dict[str, list[NDArray[np.float64]]] = {}
    simulated: dict[str, list[NDArray[np.float64]]] = {}
    differing: str | None = None
    machine = accelerator_from_spec(finished.spec)
    for batch in traced_chunks(problem, deployed, examples, machine):
        own = _watched_in(batch, watched)
        simulation = simulate(
            trace_of(deployed, batch),
            finished.spec,
            shapes,
            is_causal=deployed.structure.is_causal,
            watched=own,
        )
        if watched is not None and own is not None:
            timeline = _timeline_record(simulation, finished.spec.name, watched)
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


def trace_of(deployed: Deployment, batch: HardChunk) -> Trace:
    """Returns the masks and widths of a batch as the simulator reads them."""
    structure, layers, ends = deployed.structure, deployed.layers, deployed.ends
    probabilities = batch.tensors["probabilities"]
    num_tokens = probabilities.shape[-1]
    valid = np.ones((probabilities.shape[1], num_tokens), np.bool_)
    valid = np.asarray(batch.inputs.get("valid", valid), np.bool_)
    if "keep" in batch.tensors:
        keep = np.moveaxis(batch.tensors["keep"], 1, 3)  # [L, R, B, H, T, S] to [L, B, H, R, T, S]
        if structure.mechanism == "spatten":
            used = batch.tensors["used"] & keep[:, :, :, 0]
            keep = np.concatenate([keep, used[:, :, :, None]], axis=3)
    else:
        exists = np.broadcast_to(valid[:, None, None, :], probabilities.shape)
        keep = (np.tril(exists) if structure.is_causal else exists)[:, :, :, None]
    names = (
        "query_bits",
        "key_bits",
        "plane_bits",
        "search_bits",
        "tile_bits",
        "qk_bits",
        "v_bits",
    )
    bits: dict[str, NDArray[Any]] = {name: layers[name] for name in names if name in layers}
    for kind in ("weight_bits", "activation_bits"):
        bits |= {f"{site}.{kind}": layers[f"{site}_{kind}"] for site in BLOCK_SITES}
        bits |= {
            f"{site}.{kind}": np.atleast_1d(ends[f"{site}_{kind}"]) for site in structure.end_sites
        }
    compares = None
    if structure.mechanism == "esact":
        compares = layers["threshold"][..., 1] != SIMILARITY_OFF
    elif structure.mechanism == "a3":
        compares = layers["threshold"][..., 0] != SEARCH_OFF
    return Trace(
        packed=np.packbits(keep, axis=-1),
        valid=valid,
        num_keys=num_tokens,
        head_dim=structure.head_dim,
        bits=bits,
        source=batch.tensors.get("source"),
        ffn_source=batch.tensors.get("ffn_source"),
        compares=compares,
        one_hot=batch.tensors.get("one_hot"),
        ffn_full=batch.tensors.get("ffn_full"),
        nonzero=_nonzero(deployed, batch),
        mechanism=structure.mechanism,
    )


def _nonzero(deployed: Deployment, batch: HardChunk) -> dict[str, NonZero]:
    """Returns what is not zero in the tensors of a batch and in the weights; nothing for mechanisms that skip no zeros."""
    structure, tensors = deployed.structure, batch.tensors
    if not mechanism_by_name(structure.mechanism).hard.skips_zeros:
        return {}
    entering = emulator.entering(structure, deployed.layers, deployed.ends, tensors)
    sites = {
        "qkv": entering["qkv"],
        "query": tensors["query"],
        "key": tensors["key"],
        "value": tensors["value"],
        "scores": tensors["raw_scores"],
        "probabilities": tensors["probabilities"],
        "out": tensors["context"],
        "up": entering["up"],
        "down": tensors["hidden"],
    }
    sites |= {f"{site}.weight": deployed.layers[f"{site}_weight"] for site in BLOCK_SITES}
    return {site: nonzero(tensor) for site, tensor in sites.items()}


def gemm_shapes(structure: ModelStructure) -> dict[str, GemmShape]:
    """Returns the sizes of the linear layers by site."""
    width, attention = structure.width, structure.attention_width
    rows = None if structure.pooling == "all" else 1
    shapes = {
        "qkv": GemmShape(inner=width, outer=3 * attention),
        "out": GemmShape(inner=attention, outer=width),
        "up": GemmShape(inner=width, outer=structure.hidden),
        "down": GemmShape(inner=structure.hidden, outer=width),
        "head": GemmShape(inner=width, outer=structure.num_outputs, rows=rows),
    }
    if isinstance(structure.input, PatchInput):
        patches = structure.input
        shapes["embed"] = GemmShape(
            inner=patches.patch_values, outer=width, rows=patches.num_patches
        )
    if structure.pooler != "none":
        shapes["pool"] = GemmShape(inner=width, outer=width, rows=1)
    return shapes
