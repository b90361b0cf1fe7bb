"""`codesign reproduce`: published studies, measured here beside their published points."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from codesign.errors import CodesignError, RunDirectoryError
from codesign.experiments.configs import Experiment, sst2
from codesign.experiments.finished import DENSE_FOLDER
from codesign.experiments.prediction_tables import StudyTable
from codesign.experiments.run import write_json
from codesign.experiments.tables import print_json, print_table

Study = Literal[
    "acceltran-sst2",
    "prediction-claims",
    "published-figures",
    "simulator-agreement",
    "trained-sizes",
]
Task = Literal["digits", "mnist", "tinyshakespeare", "sst2", "spamassassin", "spamassassin512"]
Machine = Literal[
    "energon",
    "sofa",
    "lapa",
    "esact",
    "topk",
    "bitserial",
    "sanger",
    "a3",
    "spatten",
    "fact",
    "acceltran-edge",
    "acceltran-edge-lp",
    "acceltran-server",
]
"""Presets that a simulator has rules for, each run with the mechanism that it was made for."""
SIZED_MACHINES: tuple[Machine, ...] = ("energon", "acceltran-edge", "sofa")
"""What `trained-sizes` runs on if nothing else is said."""
STUDY_FILE = "study.json"


def acceltran_sst2() -> Experiment:
    """MiniLM on SST-2 with DynaTran on the Edge machine."""
    return dataclasses.replace(sst2(), mechanism="acceltran", preset="acceltran-edge")


def reproduce(
    study: tyro.conf.Positional[Study],
    *,
    out: Path,
    tasks: tuple[Task, ...] = (),
    seeds: tuple[int, ...] = (0,),
    num_examples: tuple[int, ...] = (32,),
    comparison: Path | None = None,
    machines: tuple[Machine, ...] = (),
    num_policies: int = 25,
    edp: float = 0.4,
    lower: float = 2.0,
    data: Path | None = None,
    cache: Path | None = None,
    overwrite: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Measures a published study, or how well the cost model agrees with the simulators, and prints a table.

    `acceltran-sst2`: accuracy and activation sparsity of MiniLM on SST-2 over AccelTran's threshold and top-k, sparsity
    with and without padding (arXiv 2302.14705). Writes OUT/study.json and OUT/study.png.

    `prediction-claims`: claims of ESACT (arXiv 2512.02403) and SOFA (arXiv 2407.10416) about scores predicted without
    multipliers, on queries and keys of trained models: similarity of rows, recall of the largest keys, top-k by segment,
    operations of sorted attention, fetches. Writes OUT/study.json. Half a minute a seed for digits, minutes for text.

    `published-figures`: published figures of SpAtten, Sanger, A3, FACT and Energon beside those of our integer path at the
    published settings, on trained models, and efficiencies of nine machines scaled to one node (arXiv 2407.10416, Table
    II). Writes OUT/study.json. Minutes a task, most of them to compile; a seed more takes seconds, of text minutes.

    `simulator-agreement`: latency and energy of the cost model against the simulators on masks of trained models, random
    policies on 8 random sizes of each machine: mean error, Kendall's tau overall and the least at one size, with the
    spread of the costs there. Writes OUT/study.json. About 8 minutes on two CPU cores once the dense models are trained.

    `trained-sizes`: a machine's sizes trained with the model (`--mode codesign`) beside those of its file, at equal area:
    quality, and energy-delay product in the simulator. Runs are kept in OUT/runs, so that the command goes on where it
    stopped. Writes OUT/study.json. Two trainings for each task, machine and seed.

    Examples: `codesign reproduce acceltran-sst2 --out runs/acceltran-sst2`,
    `codesign reproduce prediction-claims --tasks digits mnist --seeds 0 1 2 --out runs/prediction-claims`

    Args:
      study: Its name.
      out: Directory to make.
      tasks: What models are trained on; default: digits, for `simulator-agreement` also mnist and tinyshakespeare.
      seeds: Seeds of the training; claims, figures and sizes take several.
      num_examples: Validation examples of `prediction-claims` and `published-figures`, the first ones: one number, or one
        for each task.
      comparison: `comparison.json` of `codesign compare` on the first task: adds to `published-figures` what FACT and
        Energon save at equal quality.
      machines: Presets of `simulator-agreement` (default: all) and `trained-sizes` (energon, acceltran-edge, sofa),
        each with the mechanism that it was made for.
      num_policies: Random policies of `simulator-agreement` at each size, >= 2.
      edp: Budget of `trained-sizes` on the file's sizes, energy-delay product over that of dense.
      lower: By what the budget of `trained-sizes` is lower where sizes are trained, > 1.
      data: Folder of the data of the only task; default: that of the task in $CODESIGN_DATA, else where it is published.
      cache: Folder of the dense models; default: `dense` in `--out`.
      overwrite: Replace the study in `--out`.
      as_json: Print JSON only.
    """
    if (out / STUDY_FILE).exists() and not overwrite:
        raise RunDirectoryError(
            f"'{out}' holds a study already: replace it with `--overwrite`, or choose another directory"
        )
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise CodesignError(f"`seeds` must be different whole numbers from 0 on, got {seeds}")
    folder = cache or out / DENSE_FOLDER
    if comparison is not None and study != "published-figures":
        raise CodesignError(f"study `{study}` takes no comparison: leave out `--comparison`")
    if study in ("prediction-claims", "published-figures"):
        chosen = tasks or ("digits",)
        numbers = _checked_numbers(chosen, num_examples, data)
        if study == "prediction-claims":
            return _prediction_claims(out, chosen, seeds, numbers, data, folder, as_json)
        return _published_figures(out, chosen, seeds, numbers, data, folder, comparison, as_json)
    if study == "trained-sizes":
        chosen = tasks or ("digits",)
        _checked_numbers(chosen, (1,), data)
        return _trained_sizes(
            out, folder, seeds, chosen, machines or SIZED_MACHINES, edp, lower, data, as_json
        )
    if len(seeds) > 1:
        raise CodesignError(f"study `{study}` takes one seed: give one of `--seeds`")
    if study == "simulator-agreement":
        if num_policies < 2:
            raise CodesignError(
                f"`--num-policies` must be at least 2, got {num_policies}: raise it"
            )
        chosen = tasks or ("digits", "mnist", "tinyshakespeare")
        _checked_numbers(chosen, (1,), data)
        run_on = machines or get_args(Machine)
        return _simulator_agreement(
            out, folder, seeds[0], chosen, run_on, num_policies, data, as_json
        )
    if tasks:
        raise CodesignError(f"study `{study}` has one task: leave out `--tasks`")
    return _acceltran_sst2(out, seeds[0], data, folder, as_json)


def _acceltran_sst2(out: Path, seed: int, data: Path | None, cache: Path, as_json: bool) -> int:
    """Measures AccelTran's study."""
    from codesign.experiments.acceltran_sst2 import draw_study, study as run_study
    from codesign.experiments.problem import load_problem

    named = acceltran_sst2()
    experiment = dataclasses.replace(
        named, seed=seed, data=dataclasses.replace(named.data, data=data)
    )
    problem = load_problem(experiment, cache=cache, progress=not as_json)
    rows = run_study(problem)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / STUDY_FILE, rows)
    draw_study(rows, out / "study.png")
    if as_json:
        print_json(rows)
        return 0
    names = (
        *("accuracy", "published_accuracy"),
        *("sparsity", "sparsity_with_padding", "published_sparsity"),
    )
    print_table(
        f"SST-2, {len(problem.task.part('validation'))} sentences, percent",
        ("method", "setting", "accuracy", "published", "sparsity", "with padding", "published"),
        [
            (row["method"], f"{row['setting']:g}", *(f"{100.0 * row[name]:.2f}" for name in names))
            for row in rows
        ],
    )
    print(out / STUDY_FILE)
    print(out / "study.png")
    return 0


def _checked_numbers(
    tasks: tuple[str, ...], num_examples: tuple[int, ...], data: Path | None
) -> tuple[int, ...]:
    """Returns the number of examples of each task."""
    if data is not None and len(tasks) > 1:
        raise CodesignError(
            f"`--data` is the folder of one task, got {len(tasks)}: put all of them into $CODESIGN_DATA"
        )
    if len(set(tasks)) < len(tasks):
        raise CodesignError(f"`--tasks` must differ, got {', '.join(tasks)}")
    if len(num_examples) not in (1, len(tasks)):
        raise CodesignError(
            f"`--num-examples` must be one number, or one for each of {len(tasks)} tasks, got {len(num_examples)}"
        )
    if min(num_examples) < 1:
        raise CodesignError(f"`--num-examples` must be at least 1, got {min(num_examples)}")
    return num_examples * len(tasks) if len(num_examples) == 1 else num_examples


def _prediction_claims(
    out: Path,
    tasks: tuple[str, ...],
    seeds: tuple[int, ...],
    num_examples: tuple[int, ...],
    data: Path | None,
    cache: Path,
    as_json: bool,
) -> int:
    """Measures the claims about predictions."""
    from codesign.experiments.prediction_claims import claims_experiment, study
    from codesign.experiments.prediction_tables import study_tables
    from codesign.experiments.problem import outline

    for task in tasks:
        outline(claims_experiment(task, seeds[0], data)).task.part("validation")
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = study(
        tasks, seeds, num_examples, data=data, cache=cache, progress=not as_json
    )
    return _finished(out, record, study_tables(record), as_json)


def _published_figures(
    out: Path,
    tasks: tuple[str, ...],
    seeds: tuple[int, ...],
    num_examples: tuple[int, ...],
    data: Path | None,
    cache: Path,
    comparison: Path | None,
    as_json: bool,
) -> int:
    """Measures published figures of the baselines."""
    from codesign.experiments.problem import outline
    from codesign.experiments.published_figures import equal_quality, figures_experiment, study
    from codesign.experiments.published_tables import published_tables

    for task in tasks:
        outline(figures_experiment(task, "sanger", seeds[0], data)).task.part("validation")
    trained = {} if comparison is None else equal_quality(comparison)
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = study(
        tasks, seeds, num_examples, trained, data=data, cache=cache, progress=not as_json
    )
    return _finished(out, record, published_tables(record), as_json)


def _finished(
    out: Path, record: dict[str, Any], tables: Mapping[str, StudyTable], as_json: bool
) -> int:
    """Writes the record of a study and prints it, or its tables."""
    write_json(out / STUDY_FILE, record)
    if as_json:
        print_json(record)
        return 0
    for table in tables.values():
        print_table(table.title, table.columns, table.rows, text_columns=table.text_columns)
    print(out / STUDY_FILE)
    return 0


def _simulator_agreement(
    out: Path,
    cache: Path,
    seed: int,
    tasks: tuple[str, ...],
    machines: tuple[str, ...],
    num_policies: int,
    data: Path | None,
    as_json: bool,
) -> int:
    """Measures the cost model against the simulators."""
    from codesign.experiments.simulator_agreement import agreement_table, study as run_study

    rows = []
    studied = run_study(
        tasks,
        machines,
        cache=cache,
        progress=not as_json,
        seed=seed,
        num_policies=num_policies,
        data=data,
    )
    for found in studied:
        rows.append(dataclasses.asdict(found))
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / STUDY_FILE, rows)
    if as_json:
        print_json(rows)
    else:
        table = agreement_table(rows)
        print_table(table.title, table.columns, table.rows, text_columns=table.text_columns)
        print(out / STUDY_FILE)
    return 0 if all(row["counts_equal"] for row in rows) else 1


def _trained_sizes(
    out: Path,
    cache: Path,
    seeds: tuple[int, ...],
    tasks: tuple[str, ...],
    machines: tuple[str, ...],
    edp: float,
    lower: float,
    data: Path | None,
    as_json: bool,
) -> int:
    """Measures trained sizes beside those of the files."""
    from codesign.experiments.trained_sizes import sizes_table, study as run_study

    if not lower > 1.0:
        raise CodesignError(f"`--lower` must be > 1, got {lower:g}: raise it")
    rows = []
    for found in run_study(
        tasks,
        machines,
        seeds,
        budget=edp,
        lower=lower,
        out=out / "runs",
        cache=cache,
        data=data,
        progress=not as_json,
    ):
        rows.append(dataclasses.asdict(found))
        write_json(out / STUDY_FILE, rows)
    if as_json:
        print_json(rows)
    else:
        table = sizes_table(rows)
        print_table(table.title, table.columns, table.rows, text_columns=table.text_columns)
        print(out / STUDY_FILE)
    return 0
