"""The command line without training: overview, help, tables, and one line for every bad input."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codesign.errors import CodesignError
from codesign.experiments import commands, finished, tasks
from codesign.experiments.cli import COMMANDS, main
from codesign.experiments.configs import (
    Budget,
    DenseSettings,
    Experiment,
    ModelSettings,
    digits,
)
from codesign.experiments.curve import checked_curve
from codesign.experiments.curve_record import SCHEMA_VERSION
from codesign.experiments.curve_settings import CurveSettings
from codesign.experiments.data import DataSettings, Task
from codesign.experiments.run import RunDirectory
from codesign.hw.spec import PRESET_FOLDER
from codesign.mechanisms import MECHANISMS

TEXT = (PRESET_FOLDER / "energon.toml").read_text()
LANES = next(line for line in TEXT.splitlines() if line.startswith("lanes = "))
STAGES = next(line for line in TEXT.splitlines() if line.startswith("stages = "))
BUDGET = ("--budget.energy", "0.5")


def run(*arguments: str | Path) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Returns the message of a refusal: exit status 2, one line on standard error."""
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("codesign: error: ") and error.count("\n") == 1
    return error


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    capsys.readouterr()
    assert run("--help") == 0
    overview = capsys.readouterr().out
    assert all(f"  {name} " in overview for name in COMMANDS)
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("codesign 0.")
    assert "did you mean `cost`?" in refused(capsys, "cots")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = ["digits"] if COMMANDS[name].takes_experiment else []
    assert run(name, *experiment, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"usage: codesign {name}" in text
    assert f"`codesign {name}" in text and "Example" in text
    if experiment:
        assert run(name, "--help") == 0
        assert "digits" in capsys.readouterr().out


def test_help_of_list_does_not_import_jax() -> None:
    program = (
        "import sys\nfrom codesign.experiments.cli import main\n"
        "try:\n    main(['list', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'jax', 'flax', 'optax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing from codesign train digits: --out PATH"),
        (("--out",), "Missing value for argument '--out'"),
        (("--out", "x", "--budget.energy", "half"), "Error parsing --budget.energy"),
        (("--out", "x", "--mode", "foo"), "invalid choice 'foo' for argument '--mode'"),
        (("--out", "x", "--bugdet.energy", "1"), "did you mean `--budget.energy`?"),
        (("--out", "x", "y"), "Unrecognized options: y"),
    ],
)
def test_usage_errors_are_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, "train", "digits", *arguments)
    assert message in error and "see `codesign train digits --help`" in error
    assert "Got errors" not in error and "\u2502" not in error


@pytest.mark.smoke
def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json") == 0
    names = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in names["mechanisms"]] == list(MECHANISMS)
    assert names["presets"]["energon"] == "energon"
    assert names["presets"]["acceltran-edge"] == "acceltran"
    assert "digits" in names["tasks"] and "digits" in names["experiments"]
    assert run("list") == 0
    table = capsys.readouterr().out
    assert "arXiv 2110.09310" in table and "arXiv 2302.14705" in table


@pytest.mark.smoke
def test_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cost", "energon", "--json", "--experiment", "digits") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"]["num_tokens"] == 64
    points = record["points"]
    assert list(points) == ["dense", "cheapest legal", "published"]
    for scopes in points.values():
        for one in scopes.values():
            assert one["energy_pj"] == pytest.approx(sum(one["energy_pj_by_unit"].values()))
            assert one["area_mm2"] == pytest.approx(sum(one["area_mm2_by_unit"].values()))
            assert one["latency_us"] == pytest.approx(
                one["latency_cycles"] / record["clock_hz"] * 1e6
            )
        busy = scopes["end_to_end"]["busy_cycles_by_unit"]["host"]
        both = scopes["attention"]["latency_cycles"] + busy
        assert scopes["end_to_end"]["latency_cycles"] == pytest.approx(both)
    for scope in ("attention", "end_to_end"):
        energies = [points[name][scope]["energy_pj"] for name in points]
        assert energies[1] < energies[2] < energies[0]
    assert run("cost", "energon") == 0
    table = capsys.readouterr().out
    assert "cheapest legal" in table and "host.mac" in table


def test_cost_of_an_experiment_takes_no_other_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--tokens", "--head-dim"):
        message = refused(capsys, "cost", "energon", "--experiment", "digits", option, "16")
        assert f"`{option}` does not go with" in message


def test_cost_of_a_file_and_of_bad_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(TEXT.replace('name = "energon"', 'name = "mine"', 1))
    assert run("cost", mine, "--json", "--tokens", "16", "--layers", "1") == 0
    assert json.loads(capsys.readouterr().out)["preset"] == "mine"
    assert "`--head-dim` must be at least 1, got 0" in refused(
        capsys, "cost", "energon", "--head-dim", "0"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (LANES, LANES.replace("lanes", "lane"), "unknown key: did you mean `lanes`?"),
        (LANES, LANES.replace('unit = "lane", ', ""), "`unit` is missing"),
        (LANES, LANES[: LANES.index(", source")] + " }", "`source` is missing"),
        (LANES, "lanes = 8", "a bare number has no unit"),
        ('serves = ["qk.mac"]', 'serves = ["qk.mac", "predict.mac"]', "feeds `predict.mac`"),
        ("[units.qk]", "[units.spare]", "`pipeline.stages`: `qk` must be a unit"),
        (STAGES, STAGES.replace('"qk"', '"qk", "qk"'), "`qk` stands in it twice"),
        (
            STAGES,
            'stages = [["filter_array", "filter_statistics"], ["softmax", "pv"], ["qk"]]',
            "go round in a cycle",
        ),
        (
            STAGES,
            'stages = [["qk", "softmax", "pv"], ["filter_array", "filter_statistics"]]',
            "go round in a cycle",
        ),
        (LANES, LANES.replace("value = ", "value = -"), "value must be above 0"),
        (
            "capacity = { value = 64,",
            "capacity = { value = 0.03,",
            "hold no tile, a vector of a head",
        ),
    ],
)
def test_faulty_preset_is_one_line(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace(old, new, 1))
    out = tmp_path / "run"
    for arguments in (
        ("cost", path),
        ("train", "digits", "--out", out, *BUDGET, "--experiment.preset", path),
    ):
        assert message in refused(capsys, *arguments)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "needs the name of an experiment"),
        (
            ("train", "nope", "--out", "{}"),
            "experiment `nope` does not exist: choose one of digits",
        ),
        (("train", "digits", "--out", "{}"), "no budget is given"),
        (("train", "digits", "--out", "{}", "--budget.energy", "0.01"), "give at least 0."),
        (
            ("train", "digits", "--out", "{}", "--budget.latency", "0.1"),
            "`budget.latency` 0.1 cannot",
        ),
        (("curve", "digits", "--out", "{}", "--budgets", "0.5", "0.01"), "give at least 0."),
        (("curve", "digits", "--out", "{}", "--budgets", "0.4", "0.5"), "falling"),
        (
            ("train", "digits", "--out", "{}", *BUDGET, "--experiment.task", "nope"),
            "task `nope` does not exist",
        ),
        (
            ("train", "digits", "--out", "{}", *BUDGET, "--experiment.preset", "energo"),
            "did you mean `energon`?",
        ),
        (
            ("train", "digits", "--out", "{}", *BUDGET, "--experiment.mechanism", "nope"),
            "mechanism `nope` does not exist: choose one of a3, acceltran, bitserial",
        ),
        (
            ("train", "digits", "--out", "{}", *BUDGET, "--experiment.model.num-layers", "0"),
            "`experiment.model.num_layers` must be at least 1, got 0",
        ),
        (
            ("train", "digits", "--out", "{}", "--budget.energy", "-1"),
            "`budget.energy` must be > 0",
        ),
        (
            ("train", "digits", "--out", "{}", *BUDGET, "--experiment.batch-size", "0"),
            "`experiment.batch_size` must be at least 1, got 0",
        ),
        (
            ("train", "digits", "--out", "{}", *BUDGET, "--experiment.start-kept", "0.5"),
            "one entry for each of round 0, round 1 of `energon`",
        ),
        (
            ("train", "digits", "--out", "{}", *BUDGET, "--experiment.model.patch-size", "11"),
            "`patch_size` must fit the padded image (10 pixels), got 11",
        ),
        (("curve", "digits", "--out", "{}", "--seeds", "0", "-1"), "`seeds` must be whole numbers"),
        (
            ("curve", "digits", "--out", "{}", "--experiment.mechanism", "dense"),
            "`experiment.mechanism` must have thresholds",
        ),
        (("cost", "nope"), "unknown accelerator preset `nope`"),
        (("cost", "nope.toml"), "does not exist: check the path"),
        (("evaluate", "{}"), "is not a run directory"),
        (("export", "{}", "--out", "{}/export"), "is not a run directory"),
        (("simulate", "{}"), "is not a run directory"),
        (("simulate", "{}", "--timeline", "{}.svg"), "must end in `.png`"),
        (("simulate", "{}", "--timeline", "{}/in.png"), "make the folder of the figure"),
        (("verify", "{}"), "name the directory of an export"),
        (("report", "{}"), "does not exist"),
        (("report", "."), "has neither curve.json nor result.json"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(tmp_path / "run") for argument in arguments]
    assert message in refused(capsys, *filled)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (ModelSettings, "model.hidden", 0),
        (ModelSettings, "model.padding", -1),
        (DenseSettings, "dense.num_steps", -1),
        (DenseSettings, "dense.batch_size", 0),
        (DenseSettings, "dense.rate", 0.0),
        (DenseSettings, "dense.rate", math.nan),
        (DenseSettings, "dense.weight_decay", -0.1),
        (DenseSettings, "dense.label_smoothing", 1.0),
        (Experiment, "seed", -1),
        (Experiment, "batch_size", 0),
        (Experiment, "num_calibration", 0),
        (Experiment, "distillation", 1.1),
        (Experiment, "distillation", math.nan),
        (Experiment, "reach", -1),
        (Experiment, "start_kept", (0.5, 1.1)),
        (Experiment, "start_kept", (0.5, 0.0)),
        (Experiment, "start_linear_bits", 8.5),
        (Experiment, "start_attention_bits", 7.5),
        (CurveSettings, "budgets", ()),
        (CurveSettings, "budgets", (0.5, 0.5)),
        (CurveSettings, "budgets", (0.5, 0.0)),
        (Experiment, "buckets", (64, 32)),
        (Experiment, "buckets", (32, 32)),
        (CurveSettings, "curve.uniform_thresholds", ((0.0, math.nan),)),
        (CurveSettings, "curve.uniform_thresholds", ((),)),
        (CurveSettings, "curve.uniform_bits", ()),
        (CurveSettings, "curve.uniform_bits", ((8, 9, 16),)),
        (CurveSettings, "curve.uniform_bits", ((8, 8, 4),)),
        (CurveSettings, "curve.num_selection", 0),
        (CurveSettings, "curve.num_resamples", 0),
    ],
)
def test_settings_outside_their_range_are_named(make: Any, field: str, value: Any) -> None:
    with pytest.raises(CodesignError, match=re.escape(f"{field}` must ")):
        make(**{field.rpartition(".")[2]: value})


def test_nan_in_the_data_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(settings: DataSettings) -> Task:
        pixels = np.zeros((3, 8, 8))
        pixels[1, 2, 3] = np.nan
        tasks.checked(pixels, np.zeros(3, int), 10, "broken, train")
        raise AssertionError("a NaN was let through")

    monkeypatch.setitem(tasks.TASKS, "broken", broken)
    out = tmp_path / "run"
    message = refused(
        capsys, "train", "digits", "--out", out, *BUDGET, "--experiment.task", "broken"
    )
    assert "broken, train: pixel (1, 2, 3) is nan" in message
    assert not out.exists()


def files_of(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_existing_directory_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    settings = finished.Settings(experiment=digits(), mode="joint", budget=Budget(energy=0.7))
    RunDirectory.create(out, settings.plain(), resume=False, overwrite=False)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")
    before = files_of(tmp_path)
    train = ("train", "digits", "--out")
    assert "`--resume`" in refused(capsys, *train, out, *BUDGET)
    assert "another `budget.energy`" in refused(capsys, *train, out, *BUDGET, "--resume")
    assert "exclude each other" in refused(capsys, *train, out, *BUDGET, "--resume", "--overwrite")
    assert "`--resume`" in refused(capsys, *train, out, *BUDGET, "--estimate")
    for below in (stranger / "thesis.tex", stranger / "thesis.tex" / "run"):
        message = refused(capsys, *train, below, *BUDGET, "--overwrite")
        assert f"'{stranger / 'thesis.tex'}' is a file: give a directory" in message
    assert "not a run directory" in refused(capsys, *train, stranger, *BUDGET, "--overwrite")
    # A setting that cannot work is found before `--overwrite` deletes anything.
    for wrong in (("--budget.energy", "0.01"), (*BUDGET, "--experiment.task", "nope")):
        refused(capsys, *train, out, *wrong, "--overwrite")
    refused(capsys, "curve", "digits", "--out", out, "--budgets", "0.01", "--overwrite")
    refused(capsys, "quickstart", "--out", stranger)
    assert "is not finished (0 of" in refused(capsys, "evaluate", out)
    assert files_of(tmp_path) == before


def test_uniform_settings_have_the_mechanisms_length() -> None:
    settings = CurveSettings(uniform_thresholds=((0.0, 0.0), (0.1,)))
    with pytest.raises(CodesignError, match="`curve.uniform_thresholds` must have 2 values"):
        checked_curve(digits(), settings, (0,))


def test_config_of_another_kind_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = finished.Settings(experiment=digits(), mode="joint", budget=Budget(energy=0.7))
    out = tmp_path / "run"
    RunDirectory.create(out, settings.plain() | {"curve": {}}, resume=False, overwrite=False)
    assert "`curve`: Extra inputs are not permitted" in refused(capsys, "evaluate", out)
    plain = settings.plain()
    plain["experiment"]["optimize"]["unheard_of"] = 1
    (out / "config.json").write_text(json.dumps(plain))
    assert "optimize.unheard_of`: Unexpected keyword" in refused(capsys, "evaluate", out)
    del plain["experiment"]["optimize"]["unheard_of"]
    del plain["experiment"]["reach"]  # as a version without that setting would have written it
    (out / "config.json").write_text(json.dumps(plain))
    assert "another `experiment.reach`" in refused(capsys, "evaluate", out)


def test_interruption_exits_with_130(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train_run", interrupt)
    assert run("train", "digits", "--out", tmp_path / "run", *BUDGET) == 130
    assert "`--resume`" in capsys.readouterr().err


def test_unexpected_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a defect of ours")

    monkeypatch.setattr(commands, "train_run", fail)
    with pytest.raises(ValueError, match="a defect of ours"):
        run("train", "digits", "--out", tmp_path / "run", *BUDGET)


def point(quality: Any, energy_pj: float) -> dict[str, Any]:
    costs = {
        "energy_pj": energy_pj,
        "energy_ratio": energy_pj / 4e6,
        "latency_cycles": 2500.0,
        "latency_ratio": 0.5,
    }
    return {"quality": quality, "kl_nats": quality, "attention": costs, "end_to_end": costs}


def test_report_reads_a_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interval = {"mean": 0.875, "low": 0.8, "high": 0.9}
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "quality_name": "accuracy",
        "task": "digits",
        "preset": "withdrawn",
        "clock_hz": 2e9,
        "part": "test",
        "metric": "energy",
        "scope": "end_to_end",
        "num_examples": 100,
        "seeds": [0, 1],
        "means": [
            {"kind": "dense", "budget": None, **point(interval, 4e6)},
            {"kind": "trained", "budget": 0.25, **point(interval, 1e6)},
        ],
        "equal_kl": [{"baseline": "uniform_tuned", "ratio": 1.25}],
    }
    (tmp_path / "curve.json").write_text(json.dumps(record))
    assert run("report", tmp_path) == 0
    text = capsys.readouterr().out
    assert "seeds 0, 1" in text and "uniform tuned needs 1.25 times" in text
    trained = next(line for line in text.splitlines() if "trained" in line)
    # 1 uJ, a quarter of dense; 2500 cycles at 2 GHz are 1.25 us. The file has it all: its preset need not exist.
    for cell in ("0.25", "0.8750", "1.000", "0.250", "1.25", "0.500"):
        assert f" {cell} " in trained
    assert run("report", tmp_path / "curve.json", "--json") == 0
    assert json.loads(capsys.readouterr().out) == record
    # A file of an earlier version has accuracies.
    for entry in record["means"]:
        entry["accuracy"] = entry.pop("quality")
    (tmp_path / "curve.json").write_text(json.dumps(record))
    assert "holds no result" in refused(capsys, "report", tmp_path)


def test_shipped_results_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    results = Path(__file__).parents[1] / "docs" / "results"
    paths = [path for path in results.glob("*.json") if "means" in json.loads(path.read_text())]
    assert results / "digits-energy.json" in paths
    for path in paths:
        assert run("report", path) == 0
        table = capsys.readouterr().out
        assert "quality" in table and "dense" in table and "uniform tuned" in table


def test_bench_prints_what_it_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {
        "name": "cost",
        "value": 2.5e6,
        "unit": "evaluations/s",
        "baseline": {"name": "one by one", "value": 5e3},
        "ratio": 500.0,
        "device": {"name": "cpu", "num_cores": 2, "load": 0.0},
    }
    monkeypatch.setattr("codesign.experiments.bench.run_bench", lambda **_: [record])
    assert run("bench") == 0
    table = capsys.readouterr().out
    assert "2,500,000" in table and "one by one" in table
    assert run("bench", "--quick", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [record]
    monkeypatch.undo()
    assert "benchmark `nope` does not exist" in refused(capsys, "bench", "--names", "nope")
