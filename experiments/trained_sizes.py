"""Trained sizes of a machine beside those of its file: energy-delay products in the simulator, at equal area.

The same steps train a policy for the file's sizes, and a policy together with sizes under a lower budget. Between the two
lies the model that was trained for the file's sizes, on sizes that suit what it executes: the same decisions, so
exactly the same quality.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from codesign.experiments.configs import MODES, Budget, Experiment, Mode, Scope
from codesign.experiments.evaluate import deployment, machine_of, measure
from codesign.experiments.finished import FinishedRun, checked, load_run, train_run
from codesign.experiments.prediction_tables import StudyTable
from codesign.experiments.simulated import simulated_chunks
from codesign.experiments.simulator_agreement import experiment_on
from codesign.experiments.traced import examples_of
from codesign.experiments.train import BudgetedTraining
from codesign.hw.sizing import Caps, total_area_mm2

Sizes = Literal["file", "fitted", "trained"]
"""Those of the file; those that suit the model trained for the file's; those trained with the model."""
SCOPE: Scope = "end_to_end"
NUM_EXAMPLES = 16
"""First examples of the validation part that the simulator runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizedMachine:
    """A model on a machine of given sizes.

    `budget` is the bound on the energy-delay product, a fraction of that of dense on the file's machine; quality and
    divergence (nat) are of the whole validation part, hard path; energy (pJ) and latency (cycles of the file's clock)
    are the simulator's means over its first examples, `gain` the energy-delay product on the file's sizes over this
    one, `modelled_gain` the same by the cost model.
    """

    task: str
    machine: str
    seed: int
    sizes: Sizes
    budget: float
    quality_name: str
    quality: float
    kl_nats: float
    area_mm2: float
    num_examples: int
    energy_pj: float
    latency_cycles: float
    gain: float
    modelled_gain: float


def study(
    tasks: Sequence[str],
    machines: Sequence[str],
    seeds: Sequence[int],
    *,
    budget: float,
    lower: float,
    out: Path,
    cache: Path,
    data: Path | None,
    progress: bool,
) -> Iterator[SizedMachine]:
    """Yields what models cost on sizes of the file and on trained ones, by task, machine, seed and sizes.

    Runs lie in `out`; those that are there are continued, finished ones taken as they are.

    Args:
      tasks: Names of experiments.
      machines: Names of presets, each run with the mechanism that it was made for.
      seeds: Seeds of the training.
      budget: Bound on the energy-delay product on the file's sizes, a fraction of that of dense.
      lower: By what the bound is lower where sizes are trained too, > 1.
      out: Folder of the runs.
      cache: Folder of the dense models.
      data: Folder of the data of the only task; None: where it is by default.
      progress: Whether to show progress bars of the training.
    """
    bounds: dict[Mode, Budget] = {
        "joint": Budget(edp=budget, scope=SCOPE),
        "codesign": Budget(edp=budget / lower, scope=SCOPE),
    }
    for task in tasks:
        for machine in machines:
            for seed in seeds:
                experiment = experiment_on(machine, task, seed, data)
                runs = {
                    mode: _run(
                        experiment,
                        mode,
                        bound,
                        out / f"{task}-{machine}-{seed}-{mode}",
                        cache,
                        progress,
                    )
                    for mode, bound in bounds.items()
                }
                yield from _compared(runs["joint"], runs["codesign"], bounds)


def _run(
    experiment: Experiment, mode: Mode, budget: Budget, path: Path, cache: Path, progress: bool
) -> FinishedRun:
    """Returns a run, trained as far as it is not yet."""
    checked(experiment, mode, budget, Caps())
    train_run(
        experiment,
        mode,
        budget,
        Caps(),
        path,
        cache=cache,
        resume=True,
        overwrite=False,
        progress=progress,
    )
    return load_run(path, cache=cache, progress=progress)


def _compared(
    own: FinishedRun, trained: FinishedRun, bounds: dict[Mode, Budget]
) -> Iterator[SizedMachine]:
    """Yields the model trained for the file's sizes there and on sizes that suit it, and the one trained with its sizes."""
    settings = dataclasses.replace(own.settings.experiment.optimize, train=MODES["codesign"])
    training = BudgetedTraining(own.problem, settings, ("edp",), SCOPE)
    fitted = dataclasses.replace(
        own, point=training.with_suitable_sizes(own.point, bounds["joint"])
    )
    cases: tuple[tuple[Sizes, FinishedRun, Mode], ...] = (
        ("file", own, "joint"),
        ("fitted", fitted, "joint"),
        ("trained", trained, "codesign"),
    )
    base = modelled_base = None
    for sizes, run, mode in cases:
        problem, point = run.problem, run.point
        measured = measure(problem, point, "validation")
        energy, latency, modelled = _simulated(run)
        base, modelled_base = base or energy * latency, modelled_base or modelled
        bound = bounds[mode].edp
        assert bound is not None
        yield SizedMachine(
            task=problem.task.name,
            machine=problem.spec.name,
            seed=problem.experiment.seed,
            sizes=sizes,
            budget=bound,
            quality_name=measured.quality_name,
            quality=float(np.mean(measured.quality)),
            kl_nats=float(np.mean(measured.kl_nats)),
            area_mm2=float(total_area_mm2(machine_of(problem, point))),
            num_examples=NUM_EXAMPLES,
            energy_pj=energy,
            latency_cycles=latency,
            gain=base / (energy * latency),
            modelled_gain=modelled_base / modelled,
        )


def _simulated(run: FinishedRun) -> tuple[float, float, float]:
    """Returns the simulator's mean energy and latency, and the cost model's product of both."""
    problem, spec = run.problem, run.spec
    examples = examples_of(problem, "validation", NUM_EXAMPLES)
    simulated, modelled = [], []
    deployed = deployment(problem, run.point)
    for chunk, simulation in simulated_chunks(
        problem, deployed, examples, machine_of(problem, run.point), spec
    ):
        clock = spec.clock_hz / problem.spec.clock_hz
        latency = simulation.latency_cycles(SCOPE) / clock
        simulated.append(np.stack([simulation.energy_pj(SCOPE), latency]))
        costs = chunk.costs[SCOPE]
        modelled.append(np.stack([costs["energy"], costs["latency"]]))
    (energy, latency), (energy_model, latency_model) = (
        np.mean(np.concatenate(parts, axis=1), axis=1) for parts in (simulated, modelled)
    )
    return float(energy), float(latency), float(energy_model * latency_model)


def sizes_table(rows: Sequence[dict[str, Any]]) -> StudyTable:
    """Returns the table of a study: means over seeds, gains of the energy-delay product with their range."""
    names = {"file": "of the file", "fitted": "fitted to it", "trained": "trained"}
    cells = []
    for task, machine, sizes in dict.fromkeys(
        (row["task"], row["machine"], row["sizes"]) for row in rows
    ):
        found = [
            row
            for row in rows
            if (row["task"], row["machine"], row["sizes"]) == (task, machine, sizes)
        ]

        def mean(name: str, found: Sequence[dict[str, Any]] = found) -> float:
            return float(np.mean([row[name] for row in found]))

        gains = [row["gain"] for row in found]
        scale, digits = (100.0, 1) if found[0]["quality_name"] == "accuracy" else (1.0, 4)
        cells.append(
            (
                f"{task}, {machine}",
                names[sizes],
                str(len(found)),
                f"{scale * mean('quality'):.{digits}f}",
                f"{mean('kl_nats'):.4f}",
                f"{mean('area_mm2'):.3f}",
                f"{mean('energy_pj') / 1e6:.2f}",
                f"{mean('latency_cycles'):,.0f}",
                f"{mean('gain'):.2f} [{min(gains):.2f}, {max(gains):.2f}]",
                f"{mean('modelled_gain'):.2f}",
            )
        )
    return StudyTable(
        title="energy-delay products in the simulator: gain over the file's sizes (mean and range over seeds), also by the "
        "cost model; quality: accuracy in percent, or bits per character",
        columns=(
            *("task, machine", "sizes", "seeds", "quality", "KL, nat", "mm2"),
            *("µJ", "cycles", "gain", "modelled"),
        ),
        rows=cells,
        text_columns=2,
    )
