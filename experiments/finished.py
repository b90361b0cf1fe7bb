"""Runs of one point: trained under a budget, stored in a run directory, and loaded from it again."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from pydantic import BaseModel, ConfigDict, ValidationError

from codesign.calibration import Calibration
from codesign.errors import CheckpointError, CodesignError, RunDirectoryError
from codesign.experiments.batches import chunks
from codesign.experiments.configs import MODES, Budget, Experiment, Mode
from codesign.experiments.data import Part, Task
from codesign.experiments.drift import drift
from codesign.experiments.evaluate import (
    Measurement,
    Point,
    dense_point,
    deployment,
    machine_of,
    measure,
    summary,
)
from codesign.experiments.problem import Problem, load_problem, outline
from codesign.experiments.reach import check_reachable
from codesign.experiments.run import CONFIG, RunDirectory, write_json
from codesign.experiments.sizing import resolved_caps
from codesign.experiments.start import start_point, start_policy
from codesign.experiments.teacher import float_path
from codesign.experiments.train import SIZES_FILE, BudgetedTraining, finished_point
from codesign.hw.accelerator import Accelerator
from codesign.hw.hardware_config import IntegerPolicy
from codesign.hw.resizing import spec_with_sizes
from codesign.hw.sizing import Caps, total_area_mm2
from codesign.hw.spec import AcceleratorSpec
from codesign.mechanisms import dense_beside
from codesign.models.deploy import Deployment
from codesign.models.parameters import init_params
from codesign.objective import BUDGET_MISS

RESULT_FILE = "result.json"
MACHINE_FILE = "machine.json"
"""Of a run that trains sizes: the machine with those that are built, an accelerator file."""
DATA_FILE = "data.json"
"""Digests of the parts that a run reads."""
RECORDED_PARTS: tuple[Part, ...] = ("train", "validation")
DENSE_FOLDER = "dense"


class Settings(BaseModel):
    """`config.json` of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: Experiment
    mode: Mode
    budget: Budget
    caps: Caps = Caps()

    def plain(self) -> dict[str, Any]:
        """Returns the settings as plain types."""
        return {
            "experiment": self.experiment.plain(),
            "mode": self.mode,
            "budget": dataclasses.asdict(self.budget),
            "caps": dataclasses.asdict(self.caps),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A trained point with everything needed to measure and deploy it."""

    path: Path
    settings: Settings
    problem: Problem
    point: Point

    @property
    def spec(self) -> AcceleratorSpec:
        """The machine that the point runs on: the file's, with the trained sizes if there are any."""
        return spec_of(self.problem, self.point)

    def dense_measurement(self, part: Part) -> Measurement:
        """Returns what the dense model of the file's machine does on a part, hard path."""
        return measure_dense(self.problem, self.point, part)


def measure_dense(
    problem: Problem,
    point: Point,
    part: Part,
    *,
    machines: Mapping[str, Accelerator] | None = None,
) -> Measurement:
    """Returns what the dense model of a problem does on a part of the data, hard path, and on other machines."""
    reference = dense_point(problem, point.calibration)
    mechanism = dense_beside(problem.machine_mechanism)
    return measure(problem, reference, part, mechanism=mechanism, machines=machines)


def spec_of(problem: Problem, point: Point) -> AcceleratorSpec:
    """Returns the machine of a point as a file."""
    if not point.sizes:
        return problem.spec
    sizes = {name: float(value) for name, value in point.sizes.items()}
    return spec_with_sizes(problem.spec, sizes)


def checked(experiment: Experiment, mode: Mode, budget: Budget, caps: Caps) -> Problem:
    """Returns the outline of an experiment whose budget can be met, before anything is written.

    Raises:
      CodesignError: If there is no budget, or a setting or the data is wrong.
      InfeasibleBudgetError: If no legal policy reaches the budget on the file's own sizes, and they are not trained.
      InfeasibleCapError: If no legal machine keeps the caps.
    """
    if not budget.limits:
        raise CodesignError(
            "no budget is given: add `--budget.energy 0.5` (or `latency`, `edp`), a fraction of dense"
        )
    outlined = outline(experiment)
    if "sizes" in MODES[mode]:
        resolved_caps(outlined.spec, caps)
        return outlined
    if caps.names:
        raise CodesignError(
            f"`caps` bound sizes, which mode `{mode}` does not train: use `--mode codesign`"
        )
    check_reachable(outlined, budget)
    return outlined


def dense_folder(run: Path) -> Path:
    """Returns where the dense models of a run are kept: `dense` beside it, or beside its parent if only that exists."""
    run = run.absolute()
    beside, above = run.parent / DENSE_FOLDER, run.parent.parent / DENSE_FOLDER
    return above if above.is_dir() and not beside.is_dir() else beside


def train_run(
    experiment: Experiment,
    mode: Mode,
    budget: Budget,
    caps: Caps,
    out: Path,
    *,
    cache: Path,
    resume: bool,
    overwrite: bool,
    progress: bool,
) -> dict[str, Any]:
    """Trains one point under a budget and returns the contents of its `result.json`.

    Args:
      experiment: Settings that passed `checked`.
      mode: Which optimiser groups are trained.
      budget: Bounds, at least one.
      caps: What trained sizes keep.
      out: Run directory.
      cache: Folder of the dense models.
      resume: Continue the run that is there.
      overwrite: Delete the run that is there.
      progress: Whether to show progress bars.

    Raises:
      RunDirectoryError: If `out` exists and neither flag is given, or it was made with other settings.
    """
    optimize = dataclasses.replace(experiment.optimize, train=MODES[mode])
    settings = Settings(
        experiment=dataclasses.replace(experiment, optimize=optimize),
        mode=mode,
        budget=budget,
        caps=caps,
    )
    run = RunDirectory.create(out, settings.plain(), resume=resume, overwrite=overwrite)
    problem = load_problem(settings.experiment, cache=cache, progress=progress)
    record_data(run.path, problem.task)
    training = BudgetedTraining(problem, optimize, tuple(budget.limits), budget.scope, caps)
    point = training.train(
        start_point(problem),
        budget,
        run,
        checkpoint_every=max(1, optimize.num_steps // 4),
        progress=progress,
    )
    measured, dense = (
        measure(problem, point, "validation"),
        measure_dense(problem, point, "validation"),
    )
    # On the same examples: elsewhere texts have other lengths.
    whole = training.dense_cost.mean(problem.task.part("validation"), problem.buckets, budget.scope)
    reached: dict[str, dict[str, float]] = {
        metric: {
            "limit": budget.limits[metric],
            "reached": measured.mean_cost(metric, budget.scope) / whole[metric],
        }
        for metric in training.metrics
    }
    result = {
        "preset": experiment.preset,
        "part": "validation",
        "clock_hz": problem.spec.clock_hz,
        "dense": summary(dense, dense),
        "trained": summary(measured, dense),
        "policy": deployed_policy(deployment(problem, point)),
        "drift": drift(problem, point, measured),
        "budget": {"scope": budget.scope, **reached},
        "is_met": all(
            one["reached"] <= one["limit"] * (1.0 + BUDGET_MISS) for one in reached.values()
        ),
    }
    if point.sizes:
        spec = spec_of(problem, point)
        sizes = json.loads((run.path / SIZES_FILE).read_text())
        result["sizes"] = sizes | {"area_mm2": float(total_area_mm2(machine_of(problem, point)))}
        (run.path / MACHINE_FILE).write_text(spec.model_dump_json(indent=2) + "\n")
    write_json(run.path / RESULT_FILE, result)
    return result


def deployed_policy(deployed: Deployment) -> dict[str, Any]:
    """Returns the widths and the mechanism's integers of a deployment, for a file."""
    arrays = deployed.structure, deployed.layers, deployed.ends
    plain: dict[str, Any] = IntegerPolicy.from_arrays(*arrays).model_dump(mode="json")
    return plain


def data_digests(task: Task) -> dict[str, str]:
    """Returns what tells the parts that training and its measurement read from those of other data."""
    return {part: task.part(part).digest() for part in RECORDED_PARTS}


def record_data(path: Path, task: Task) -> None:
    """Writes which data a run is trained on.

    Raises:
      RunDirectoryError: If the run was begun on other data.
    """
    if (path / DATA_FILE).exists():
        check_data(path, task)
    write_json(path / DATA_FILE, data_digests(task))


def check_data(path: Path, task: Task) -> None:
    """Raises `RunDirectoryError` unless the data is still that of the run."""
    try:
        recorded = json.loads((path / DATA_FILE).read_text())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(
            f"'{path / DATA_FILE}' cannot be read: train again with `--overwrite`"
        ) from error
    changed = [part for part, digest in data_digests(task).items() if recorded.get(part) != digest]
    if changed:
        raise RunDirectoryError(
            f"the {' and '.join(changed)} data of '{path}' has changed since it was trained ({task.origin}): restore it, "
            "or train again with `--overwrite`"
        )


def load_run(path: Path, *, cache: Path | None, progress: bool) -> FinishedRun:
    """Returns a finished run; changes nothing in it.

    Args:
      path: Run directory of `codesign train`, or a point of a curve.
      cache: Folder of the dense models; `dense_folder(path)` by default.
      progress: Whether to show a progress bar should the dense model have to be trained again.

    Raises:
      RunDirectoryError: If `path` holds no run of one point.
      CheckpointError: If the run is not finished, or its checkpoint is corrupted or of another model.
    """
    if not (path / CONFIG).is_file():
        raise RunDirectoryError(
            f"'{path}' is not a run directory (it lacks {CONFIG}): give the `--out` of `codesign train`, "
            "or a directory in `points` of a curve"
        )
    try:
        settings = Settings.model_validate_json((path / CONFIG).read_bytes())
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(key) for key in fault["loc"])
        raise RunDirectoryError(
            f"'{path / CONFIG}' is not that of a run of one point: `{place}`: {fault['msg']}; "
            "give the `--out` of `codesign train`, or a directory in `points` of a curve"
        ) from error
    # Nothing is written: the directory has its files. A setting this version does not know is named.
    run = RunDirectory.create(path, settings.plain(), resume=True, overwrite=False)
    experiment, budget = settings.experiment, settings.budget
    step, last = run.checkpoint_step(), experiment.optimize.num_steps
    if step is None or step <= last:
        raise CheckpointError(
            f"'{path}' is not finished ({step or 0} of {last} steps): continue the command that trains it with `--resume`"
        )
    outlined = outline(experiment)
    check_data(path, outlined.task)
    training = BudgetedTraining(
        outlined, experiment.optimize, tuple(budget.limits), budget.scope, settings.caps
    )
    _, tree = run.load(_blank_checkpoint(training, budget))
    return FinishedRun(
        path=path,
        settings=settings,
        problem=load_problem(experiment, cache=cache or dense_folder(path), progress=progress),
        point=finished_point(tree),
    )


def _blank_checkpoint(training: BudgetedTraining, budget: Budget) -> dict[str, Any]:
    """Returns the shapes and dtypes of a training's checkpoints; computes nothing."""
    problem = training.problem
    inputs, _ = next(
        iter(chunks(problem.calibration_examples.first(1), lambda _: 1, problem.buckets))
    )
    one = jax.tree.map(jnp.asarray, inputs)

    def initial() -> dict[str, Any]:
        params = init_params(problem.config.structure, key=jax.random.key(0))
        ranges = float_path(params, one, problem.config, calibrating=True)[1]
        like = ranges["layers"]["query"]
        ranges["layers"] |= dict.fromkeys(problem.mechanism.own_ranges, jnp.zeros_like(like))
        policy = start_policy(
            problem,
            linear_bits=problem.experiment.start_linear_bits,
            attention_bits=problem.experiment.start_attention_bits,
        )
        calibration = Calibration(layers=ranges["layers"], ends=ranges["ends"])
        sizes = {} if training.sizing is None else training.sizing.start
        point = Point(params=params, policy=policy, calibration=calibration, sizes=sizes)
        return training.initial(point, budget)

    shapes: dict[str, Any] = jax.eval_shape(initial)
    return shapes
