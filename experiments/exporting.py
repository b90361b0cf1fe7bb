"""From a finished run to an export, and what checks it: the emulator and the simulator against the JAX hard path."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign import __version__
from codesign.errors import CodesignError
from codesign.experiments.data import Part
from codesign.experiments.evaluate import (
    deployment,
    machine_of,
    measure,
)
from codesign.experiments.finished import FinishedRun
from codesign.experiments.traced import TRACE_CHUNK, examples_of, traced_chunks
from codesign.hw import emulator
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
from codesign.hw.sizing import total_area_mm2
from codesign.hw.surrogate import SCOPES
from codesign.models.deploy import Deployment
from codesign.references import reference_by_name
from codesign.structure import PatchInput


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
