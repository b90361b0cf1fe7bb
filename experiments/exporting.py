"""From a finished run to an export, and what checks it: the emulator and the simulator against the JAX hard path."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign import __version__
from codesign.errors import CodesignError
from codesign.experiments.configs import Metric, Scope, model_shape
from codesign.experiments.data import Part
from codesign.experiments.evaluate import deployment, measure, metrics_of
from codesign.experiments.finished import FinishedRun
from codesign.experiments.problem import Problem, chunks
from codesign.hw import emulator
from codesign.hw.accelerator import Accelerator
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
from codesign.hw.operating_points import Setting, workload_from_fractions
from codesign.hw.simulator import GemmShape, Simulation, simulate
from codesign.hw.surrogate import SCOPES, cost
from codesign.mechanisms import Mechanism, mechanism_by_name
from codesign.models import vit
from codesign.models.deploy import Deployment
from codesign.policy import BLOCK_SITES, END_SITES
from codesign.structure import ModelStructure
from codesign.workload import Trace

TRACE_CHUNK = 32
"""Examples per call of the compiled tracing path."""
METRICS: tuple[tuple[Metric, str], ...] = (
    ("latency", "latency_cycles"),
    ("energy", "energy_pj"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedBatch:
    """What the JAX hard path did on B examples.

    Attributes:
      tensors: Every tensor that docs/integer_path.md names, shaped as `ModelStructure.tensor_shapes` says.
      counts: Operations of the attention engine by `stage.kind`, heads summed, `[B, L]`.
      costs: `costs[scope][metric]` by the differentiable cost model, `[B]`: pJ and cycles.
    """

    tensors: dict[str, NDArray[Any]]
    counts: dict[str, NDArray[np.float64]]
    costs: dict[Scope, dict[Metric, NDArray[np.float64]]]


@functools.partial(jax.jit, static_argnames=("structure", "mechanism"))
def _traced_step(
    layers: dict[str, jax.Array],
    ends: dict[str, jax.Array],
    pixels: jax.Array,
    accelerator: Accelerator,
    structure: ModelStructure,
    mechanism: Mechanism,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[Scope, dict[Metric, jax.Array]]]:
    output = vit.apply_hard(
        layers, ends, pixels, structure=structure, mechanism=mechanism, tracing=True
    )
    price = cost(output.workload, accelerator)
    costs = {scope: metrics_of(price, scope) for scope in SCOPES}
    operations = output.workload.operations
    counts = {key: jnp.sum(operation.count, axis=2) for key, operation in operations.items()}
    return output.trace | {"logits": output.logits}, counts, costs


def traced_batches(
    deployed: Deployment, pixels: NDArray[np.int32], accelerator: Accelerator
) -> Iterator[tuple[NDArray[np.int32], TracedBatch]]:
    """Yields the images in chunks, each with what the JAX hard path does on it."""
    mechanism = mechanism_by_name(deployed.structure.mechanism)
    layers, ends = deployed.hard_arrays()
    for part, length in chunks(pixels, min(TRACE_CHUNK, len(pixels))):
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda size: np.asarray(size, np.float64), accelerator)
            result = _traced_step(
                layers, ends, part, wide, structure=deployed.structure, mechanism=mechanism
            )
        tensors, counts, costs = jax.tree.map(np.asarray, result)
        first = slice(length)
        yield (
            part[first],
            TracedBatch(
                tensors={
                    name: values[(slice(None),) * _batch_axis(name) + (first,)]
                    for name, values in tensors.items()
                },
                # Counts that agree for all examples have a batch axis of 1.
                counts={name: values[first] for name, values in counts.items()},
                costs=jax.tree.map(lambda values, first=first: values[first], costs),
            ),
        )


def _batch_axis(name: str) -> int:
    """Returns the axis of the examples in a tensor of the integer path."""
    if name in ("scores", "keep"):
        return 2
    return 1 if name in emulator.LAYER_TENSORS else 0


def examples_of(problem: Problem, part: Part, num_examples: int) -> NDArray[np.int32]:
    """Returns the first images of a part.

    Raises:
      CodesignError: If `num_examples` is not positive.
    """
    if num_examples < 1:
        raise CodesignError(f"at least one example is needed, got {num_examples}: raise the number")
    return problem.task.parts[part].pixels[:num_examples]


def write_run_export(finished: FinishedRun, out: Path, *, num_golden: int) -> HardwareConfig:
    """Writes the export of a run; golden vectors come from the JAX hard path on validation images.

    Args:
      finished: The run.
      out: Directory to make.
      num_golden: Images whose tensors are stored, 1 to `TRACE_CHUNK`.

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
    pixels = examples_of(problem, "validation", num_golden)
    _, batch = next(traced_batches(deployed, pixels, problem.accelerator))
    scales = dict(deployed.scales)
    residual_scale = scales.pop("residual")
    assert isinstance(residual_scale, float)
    config = HardwareConfig(
        generator=f"codesign {__version__}",
        structure=deployed.structure,
        policy=IntegerPolicy.from_arrays(deployed.layers, deployed.ends),
        scales=Scales(
            activation_scales=scales,
            residual_scale=residual_scale,
            logit_scale=deployed.logit_scale,
        ),
        accelerator=problem.spec,
        expected=_expected(finished),
    )
    golden = {"pixels": pixels, **batch.tensors}
    return write_export(out, config, deployed.layers, deployed.ends, golden)


def _expected(finished: FinishedRun) -> Expected:
    """Returns what the run reached on the validation part."""
    problem = finished.problem
    measured = measure(problem, finished.point, "validation")
    workload = workload_from_fractions(model_shape(problem.config.structure), Setting())
    area_mm2 = cost(workload, problem.accelerator).area_mm2("end_to_end")
    attention, end_to_end = (
        ExpectedCost(
            energy_pj=measured.mean_cost("energy", scope),
            latency_cycles=measured.mean_cost("latency", scope),
        )
        for scope in SCOPES
    )
    return Expected(
        part="validation",
        num_examples=len(measured.correct),
        accuracy=float(np.mean(measured.correct)),
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
    """Returns how the emulator on an export compares with the run's JAX hard path, on images that are not golden.

    Raises:
      CodesignError: If the part has no other image.
    """
    problem = finished.problem
    golden = {image.astype(np.int32).tobytes() for image in export.golden["pixels"]}
    everything = problem.task.parts[part].pixels
    is_fresh = [image.astype(np.int32).tobytes() not in golden for image in everything]
    pixels = everything[np.asarray(is_fresh)][:num_examples]
    if not len(pixels):
        raise CodesignError(
            f"no image of part `{part}` is left to compare on ({num_examples} asked for): "
            "raise the number, or choose another part"
        )
    num_values = num_decisions = 0
    difference: Difference | None = None
    for images, batch in traced_batches(
        deployment(problem, finished.point), pixels, problem.accelerator
    ):
        emulated = emulator.emulate(export.config.structure, export.layers, export.ends, images)
        num_values += sum(values.size for values in batch.tensors.values())
        num_decisions += batch.tensors["keep"].size if "keep" in batch.tensors else 0
        difference = difference or first_difference(batch.tensors, emulated)
    return ReplayReport(
        num_examples=len(pixels),
        num_values=num_values,
        num_decisions=num_decisions,
        difference=difference,
    )


def compare_with_simulator(finished: FinishedRun, part: Part, num_examples: int) -> dict[str, Any]:
    """Returns latency, energy and counts of the cost model beside those of the row-by-row simulator on actual masks.

    Args:
      finished: The run.
      part: Part of the data.
      num_examples: Images, the first ones of the part, >= 1.
    """
    problem = finished.problem
    deployed = deployment(problem, finished.point)
    pixels = examples_of(problem, part, num_examples)
    shapes = gemm_shapes(deployed.structure)
    modelled: dict[str, list[NDArray[np.float64]]] = {}
    simulated: dict[str, list[NDArray[np.float64]]] = {}
    differing: str | None = None
    for _, batch in traced_batches(deployed, pixels, problem.accelerator):
        simulation = simulate(trace_of(deployed, batch), problem.spec, shapes)
        differing = differing or _differing_count(simulation, batch)
        for scope in SCOPES:
            for metric, name in METRICS:
                key = f"{scope}.{name}"
                modelled.setdefault(key, []).append(batch.costs[scope][metric])
                simulated.setdefault(key, []).append(getattr(simulation, name)(scope))
    record: dict[str, Any] = {
        "part": part,
        "num_examples": len(pixels),
        "counts_equal": differing is None,
        "first_differing_count": differing,
    }
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


def _differing_count(simulation: Simulation, batch: TracedBatch) -> str | None:
    """Returns the first operation whose count differs in any example or layer; None if none does."""
    for key in sorted(simulation.operations.keys() | batch.counts.keys()):
        if key not in simulation.operations or key not in batch.counts:
            return key
        if not np.all(simulation.operations[key] == batch.counts[key]):
            return key
    return None


def trace_of(deployed: Deployment, batch: TracedBatch) -> Trace:
    """Returns the masks and widths of a batch as the simulator reads them."""
    structure, layers, ends = deployed.structure, deployed.layers, deployed.ends
    probabilities = batch.tensors["probabilities"]
    if "keep" in batch.tensors and batch.tensors["keep"].size:
        keep = np.moveaxis(batch.tensors["keep"], 1, 3)  # [L, R, B, H, T, S] to [L, B, H, R, T, S]
    else:
        keep = np.ones_like(probabilities, np.bool_)[:, :, :, None]
    names = ("query_bits", "key_bits", "qk_bits", "v_bits")
    bits: dict[str, NDArray[Any]] = {name: layers[name] for name in names if name in layers}
    for kind in ("weight_bits", "activation_bits"):
        bits |= {f"{site}.{kind}": layers[f"{site}_{kind}"] for site in BLOCK_SITES}
        bits |= {f"{site}.{kind}": np.atleast_1d(ends[f"{site}_{kind}"]) for site in END_SITES}
    return Trace(
        packed=np.packbits(keep, axis=-1),
        valid=np.ones((keep.shape[1], structure.num_tokens), np.bool_),
        num_keys=structure.num_tokens,
        head_dim=structure.head_dim,
        bits=bits,
    )


def gemm_shapes(structure: ModelStructure) -> dict[str, GemmShape]:
    """Returns the sizes of the linear layers by site."""
    width, attention = structure.width, structure.attention_width
    return {
        "embed": GemmShape(inner=structure.patch_values, outer=width),
        "qkv": GemmShape(inner=width, outer=3 * attention),
        "out": GemmShape(inner=attention, outer=width),
        "up": GemmShape(inner=width, outer=structure.hidden),
        "down": GemmShape(inner=structure.hidden, outer=width),
        "head": GemmShape(inner=width, outer=structure.num_classes, rows=1),
    }
