"""Commands that train, measure and report."""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from codesign.errors import CodesignError, RunDirectoryError
from codesign.experiments.configs import Budget, BudgetMetric, Experiment, Mode, Scope
from codesign.experiments.curve import CURVE_FILE, checked_curve, run_curve
from codesign.experiments.curve_settings import CurveSettings
from codesign.experiments.data import Part
from codesign.experiments.estimate import estimate_seconds
from codesign.experiments.evaluate import deployment, measure, summary
from codesign.experiments.finished import (
    DENSE_FOLDER,
    RESULT_FILE,
    checked,
    dense_folder,
    deployed_policy,
    load_run,
    train_run,
)
from codesign.experiments.problem import Problem
from codesign.experiments.run import CONFIG, check_directory, write_json
from codesign.experiments.tables import (
    COLUMNS,
    policy_table,
    print_json,
    print_table,
    result_cells,
)
from codesign.hw.sizing import Caps

Json = Annotated[bool, tyro.conf.arg(name="json")]


def train(
    *,
    experiment: Experiment,
    out: Path,
    mode: Mode = "joint",
    budget: Budget = Budget(),  # noqa: B008 (frozen)
    caps: Caps = Caps(),  # noqa: B008 (frozen)
    cache: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    estimate: bool = False,
) -> int:
    """Trains thresholds and bits (and weights) under a budget.

    Exits with 1 if the deployed model misses the budget by more than 1 %.
    Writes config.json, versions.json, metrics.jsonl, checkpoints and result.json (hard path, validation part).

    Example: `codesign train digits --out runs/half --budget.energy 0.5`

    Args:
      experiment: The named experiment; every field can be overridden.
      out: Run directory, made here.
      mode: What is trained: weights, thresholds and bits (joint), thresholds and bits alone (policy), or the first and the
        machine's sizes (codesign).
      budget: At least one bound is needed; each is a fraction of the dense cost on the file's machine.
      caps: What trained sizes keep; the area is at most the file's own where none is given.
      cache: Folder of the dense models; default: `dense` beside the run.
      resume: Continue the run in `--out`.
      overwrite: Delete the run in `--out` first.
      estimate: Print the expected time and stop.
    """
    check_directory(out, resume=resume, overwrite=overwrite)
    outlined = checked(experiment, mode, budget, caps)
    tell_notes(outlined)
    announce(estimate_seconds(outlined))
    if estimate:
        return 0
    result = train_run(
        experiment,
        mode,
        budget,
        caps,
        out,
        cache=cache or dense_folder(out),
        resume=resume,
        overwrite=overwrite,
        progress=True,
    )
    print_result(result)
    return 0 if result["is_met"] else 1


def evaluate(
    run: tyro.conf.Positional[Path],
    *,
    part: Part = "validation",
    cache: Path | None = None,
    as_json: Json = False,
) -> int:
    """Measures a run's integer path and the dense reference on a part of the data; writes RUN/evaluation-PART.json.

    The test part is meant for the last look: choose on the validation part.

    Example: `codesign evaluate runs/half --part test`

    Args:
      run: Run directory, or a directory in `points` of a curve.
      part: Part of the data.
      cache: Folder of the dense models; default: `dense` beside the run.
      as_json: Print JSON only.
    """
    finished = load_run(run, cache=cache, progress=not as_json)
    dense = finished.dense_measurement(part)
    measured = measure(finished.problem, finished.point, part)
    record = {
        "preset": finished.settings.experiment.preset,
        "part": part,
        "clock_hz": finished.problem.spec.clock_hz,
        "dense": summary(dense, dense),
        "trained": summary(measured, dense),
        "policy": deployed_policy(deployment(finished.problem, finished.point)),
    }
    write_json(run / f"evaluation-{part}.json", record)
    if as_json:
        print_json(record)
    else:
        print_result(record)
        print(run / f"evaluation-{part}.json")
    return 0


def curve(
    *,
    experiment: Experiment,
    out: Path,
    budgets: tuple[float, ...] = (0.7, 0.6, 0.5, 0.4, 0.35, 0.3),
    metric: BudgetMetric = "energy",
    scope: Scope = "end_to_end",
    seeds: tuple[int, ...] = (0,),
    part: Part = "validation",
    num_selection: int = 128,
    ablations: bool = False,
    cache: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    estimate: bool = False,
) -> int:
    """Draws accuracy against cost: trained under each budget, beside dense and uniform settings.

    Writes curve.json, curve.png and one run directory per trained point under points/.

    Example: `codesign curve digits --out runs/curve --seeds 0 1 2 --part test`

    Args:
      experiment: The named experiment; every field can be overridden; its seed is replaced by `--seeds`.
      out: Directory of the curve, made here.
      budgets: Fractions of the dense cost, falling; each point starts from the one before.
      metric: The cost under the budget.
      scope: Whether the linear layers count (end_to_end) or attention alone.
      seeds: Seeds of the dense model and its fine-tuning.
      part: Part of the data on which points are measured.
      num_selection: Validation examples on which the uniform settings are chosen; fewer are faster.
      ablations: Also train bits only and thresholds only.
      cache: Folder of the dense models; default: `dense` in `--out`.
      resume: Continue the curve in `--out`, point by point.
      overwrite: Delete the curve in `--out` first.
      estimate: Print the expected time and stop.
    """
    settings = CurveSettings(
        budgets=budgets,
        metric=metric,
        scope=scope,
        num_selection=num_selection,
        ablations=ablations,
    )
    check_directory(out, resume=resume, overwrite=overwrite)
    outlined = checked_curve(experiment, settings, seeds)
    tell_notes(outlined)
    announce(curve_seconds(outlined, settings, seeds, part))
    if estimate:
        return 0
    path = run_curve(
        experiment,
        settings,
        out,
        seeds=seeds,
        part=part,
        cache=cache or out / DENSE_FOLDER,
        resume=resume,
        overwrite=overwrite,
        progress=True,
        report=say,
    ).path
    print_curve(json.loads(path.read_text()))
    print(path)
    print(path.with_suffix(".png"))
    return 0


def curve_seconds(
    outlined: Problem,
    settings: CurveSettings,
    seeds: tuple[int, ...],
    part: Part,
    *,
    dense_is_cached: bool = False,
) -> float:
    """Returns the expected time of a curve whose settings hold (`checked_curve`), s.

    Args:
      outlined: The outline of its experiment.
      settings: Budgets and the uniform grid.
      seeds: Seeds of the dense model and its fine-tuning.
      part: Part of the data on which points are measured.
      dense_is_cached: Whether another curve trains the dense models before.
    """
    scale = outlined.mechanism.thresholds
    assert scale is not None
    chosen = min(settings.num_selection, len(outlined.task.part("validation")))
    grid, measured = settings.num_tried(len(scale.settings)), settings.num_measured
    return estimate_seconds(
        outlined,
        num_points=settings.num_points,
        num_fitted=settings.num_points - len(settings.budgets),
        num_runs=grid + measured,
        num_measured=grid * chosen + measured * len(outlined.task.part(part)),
        num_seeds=len(seeds),
        dense_is_cached=dense_is_cached,
    )


def report(path: tyro.conf.Positional[Path], *, as_json: Json = False) -> int:
    """Prints the table of a curve or a run from its JSON file; trains and measures nothing.

    Example: `codesign report runs/curve`

    Args:
      path: curve.json, result.json or evaluation-PART.json, or a directory that holds one of the first two.
      as_json: Print the file's JSON only.
    """
    for name in (CURVE_FILE, RESULT_FILE):
        if (path / name).is_file():
            path = path / name
    if (path / CONFIG).is_file():
        raise RunDirectoryError(f"'{path}' is not finished: continue it with `--resume`")
    advice = "give a curve.json, a result.json, or the directory of a finished curve or run"
    if not path.exists():
        raise CodesignError(f"'{path}' does not exist: {advice}")
    if path.is_dir():
        raise CodesignError(f"'{path}' has neither {CURVE_FILE} nor {RESULT_FILE}: {advice}")
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        is_curve = "means" in record
        point = record["means"][0] if is_curve else record["trained"]
        record["clock_hz"], point["quality"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CodesignError(f"'{path}' holds no result of this version: {advice}") from error
    if as_json:
        print_json(record)
    elif is_curve:
        print_curve(record)
    else:
        print_result(record)
    return 0


def bench(
    *, names: tuple[str, ...] | None = None, quick: bool = False, as_json: Json = False
) -> int:
    """Measures speed on this machine, each figure beside a baseline timed in the same run.

    Cost model, training step, integer path, compilation, simulator.

    Example: `codesign bench --quick --json`

    Args:
      names: Benchmarks to run; default: all but the longest. An unknown name is answered with the list.
      quick: Fewer repeats and points.
      as_json: Print JSON only.
    """
    from codesign.experiments.bench import bench_seconds, bench_table, run_bench

    if not as_json:
        announce(bench_seconds(names=names, quick=quick))
    records = run_bench(names=names, quick=quick)
    if as_json:
        print_json(records)
    else:
        print_table(*bench_table(records))
    return 0


def tell_notes(problem: Problem) -> None:
    """Prints what was done so that checkpoint, task and settings fit each other."""
    for note in problem.notes:
        say(note)


def announce(seconds: float) -> None:
    """Prints how long a command is expected to take."""
    length = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
    say(f"expected time: {length} on two CPU cores")


def say(line: str) -> None:
    """Prints a line at once, also into a file or pipe."""
    print(line, flush=True)


def print_result(record: dict[str, Any]) -> None:
    """Prints the table of a trained or measured run, and how its budget and its drift came out."""
    rows = [
        (
            f"{kind}, {scope.replace('_', ' ')}",
            *result_cells(record[kind], scope, record["clock_hz"]),
        )
        for scope in ("end_to_end", "attention")
        for kind in ("dense", "trained")
    ]
    count = record["trained"]["num_examples"]
    name = record["trained"]["quality_name"].replace("_", " ")
    title = f"{record['part']} part, {count} examples, integer path; quality: {name}"
    print_table(title, ("point", *COLUMNS), rows)
    if "mac_ratio" in record["trained"]["attention"]:
        parts = [
            f"{scope.replace('_', ' ')} {record['trained'][scope]['mac_ratio']:.3f}"
            for scope in ("end_to_end", "attention")
        ]
        print(f"multiplications of dense, predictions apart: {', '.join(parts)}")
    if "policy" in record:
        print_table(*policy_table(record["policy"]))
    budget = dict(record.get("budget", {}))
    scope = budget.pop("scope", "")
    for metric, one in budget.items():
        print(
            f"budget: {metric} {one['limit']:g} of dense ({scope}), reached {one['reached']:.4f}: "
            f"{'met' if record['is_met'] else 'MISSED'}"
        )
    if "drift" in record:
        drift = record["drift"]
        parts = [
            f"{path} {drift[f'{path}_quality']:.4f} / {drift[f'{path}_kept']:.3f}"
            for path in ("hard", "straight_through", "soft")
        ]
        print(f"{record['trained']['quality_name']} / kept fraction by path: {', '.join(parts)}")


def print_curve(record: dict[str, Any]) -> None:
    """Prints the table of a curve."""
    scope = record["scope"]
    columns = [column for column in COLUMNS if column != "kept"]
    keep = [index for index, column in enumerate(COLUMNS) if column != "kept"]
    rows = []
    for entry in record["means"]:
        cells = result_cells(entry, scope, record["clock_hz"])
        budget = "-" if entry["budget"] is None else f"{entry['budget']:g}"
        rows.append((entry["kind"].replace("_", " "), budget, *(cells[index] for index in keep)))
    print_table(
        f"{record['task']} on {record['preset']}, {record['part']} part, {record['num_examples']} examples, "
        f"seeds {', '.join(map(str, record['seeds']))}, {scope.replace('_', ' ')}; budgets on {record['metric']}; "
        f"quality: {record['quality_name'].replace('_', ' ')}",
        ("point", "budget", *columns),
        rows,
    )
    for entry in record["equal_kl"]:
        if entry["ratio"] is not None:
            print(
                f"at equal KL, {entry['baseline'].replace('_', ' ')} needs {entry['ratio']:.2f} times the trained "
                f"{record['metric']}"
            )
