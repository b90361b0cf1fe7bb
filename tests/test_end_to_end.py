"""From settings to a verified export through the command line, on a model of two layers and 16 tokens."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_experiment
from jax.experimental.compilation_cache import compilation_cache
from tiny_experiment import NUM_STEPS, NUM_VALIDATION, tiny

from codesign.experiments import commands, configs, deploy_commands, quickstart, run as runs
from codesign.experiments.cli import main
from codesign.experiments.curve_settings import CurveSettings
from codesign.experiments.finished import dense_folder, load_run
from codesign.experiments.problem import Problem
from codesign.hw.accelerator import CLOCK, accelerator_from_spec
from codesign.hw.spec import load_preset


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps compiled programs on disk, so that the run which is interrupted and resumed compiles nothing again."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    compiled: None,
    dense_cache: Path,
    tiny_problem: Problem,
) -> Path:
    """A folder with a finished run and its export."""
    del compiled, tiny_problem  # its dense model is in the cache
    path = tmp_path_factory.mktemp("runs")
    shutil.copytree(dense_cache, path / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.EXPERIMENTS, "tiny", tiny)
        assert train(path / "run") == 0
    assert call("export", path / "run", "--out", path / "export", "--num-golden", "4") == 0
    return path


KINDS = (
    pytest.param(("text", "acceltran"), marks=pytest.mark.slow),
    pytest.param(("decoder", "energon"), marks=pytest.mark.slow),
    ("decoder", "sofa"),
)
"""Tasks on text, and the mechanism that each is trained with."""
PRESETS = {"energon": "energon", "acceltran": "acceltran-edge", "sofa": "sofa"}


@pytest.fixture(scope="session", params=KINDS, ids=lambda kind: "-".join(kind))
def text_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Path]:
    """A task, a mechanism, and a folder with a finished run on one's own text, and its export."""
    kind, mechanism = request.param
    path = tmp_path_factory.mktemp(kind)
    if kind == "text":
        tokenizer = tiny_experiment.write_tokenizer(path / "tokenizer.json")
        data = ("--data", tiny_experiment.write_reviews(path / "own.csv"), "--tokenizer", tokenizer)
        # Of one length, so that all is compiled once; several are trained on in test_train.py.
        data += ("--experiment.buckets", str(tiny_experiment.MAX_TOKENS))
    else:
        data = ("--data", tiny_experiment.write_plays(path / "plays"))
    machine = (
        *("--experiment.mechanism", mechanism),
        *("--experiment.preset", PRESETS[mechanism]),
    )
    # These run for milliseconds: what they compile to need not be fast.
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for function in (tiny_experiment.tiny_text, tiny_experiment.tiny_decoder):
                patch.setitem(configs.EXPERIMENTS, function.__name__, function)
            out = ("--out", path / "run", "--budget.energy", "0.9")
            assert call("train", f"tiny_{kind}", *data, *machine, *out) == 0
        assert call("export", path / "run", "--out", path / "export") == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    return kind, mechanism, path


def call(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def train(out: Path, *more: str | Path, energy: str = "0.95") -> int:
    return call("train", "tiny", "--out", out, "--budget.energy", energy, *more)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int = 0) -> Any:
    """Returns the JSON that a command prints."""
    capsys.readouterr()
    assert call(*arguments, "--json") == status
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.smoke
def test_train_evaluate_export_agree(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["is_met"]
    energy = result["budget"]["energy"]
    assert energy["limit"] == 0.95
    # Dense in closed form and dense as measured are the same machine and model.
    ratio = result["trained"]["end_to_end"]["energy_ratio"]
    assert energy["reached"] == pytest.approx(ratio, rel=1e-5) and ratio < 0.95 * 1.01
    assert result["drift"]["hard_quality"] == result["trained"]["quality"]

    evaluation = answer(capsys, "evaluate", folder / "run")
    assert evaluation["trained"] == result["trained"] and evaluation["dense"] == result["dense"]
    stored = json.loads((folder / "run" / "evaluation-validation.json").read_text())
    assert stored == evaluation
    assert answer(capsys, "report", folder / "run") == result

    expected = json.loads((folder / "export" / "config.json").read_text())["expected"]
    assert expected["quality_name"] == result["trained"]["quality_name"] == "accuracy"
    assert expected["quality"] == result["trained"]["quality"]
    assert expected["end_to_end"]["energy_pj"] == result["trained"]["end_to_end"]["energy_pj"]
    assert expected["num_examples"] == result["trained"]["num_examples"]


def test_the_test_part_is_another_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = answer(capsys, "evaluate", folder / "run", "--part", "test")
    validation = json.loads((folder / "run" / "result.json").read_text())
    assert record["part"] == "test" and record["trained"] != validation["trained"]
    assert (folder / "run" / "evaluation-test.json").is_file()


def test_missed_budget_exits_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads((folder / "run" / "result.json").read_text()) | {"is_met": False}
    monkeypatch.setitem(configs.EXPERIMENTS, "tiny", tiny)
    monkeypatch.setattr(commands, "train_run", lambda *_, **__: result)
    assert train(folder / "missed") == 1
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.smoke
def test_verify_counts_every_decision(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = answer(
        capsys, "verify", folder / "export", "--run", folder / "run", "--num-examples", "40"
    )
    assert record["is_exact"]
    # 2 layers, 2 rounds, 2 heads, 16 x 16 pairs; golden images are not used again.
    assert record["golden"]["num_decisions"] == 4 * 2 * 2 * 2 * 256
    assert record["fresh"]["num_decisions"] == 40 * 2 * 2 * 2 * 256
    assert record["fresh"]["num_values"] > record["fresh"]["num_decisions"]
    assert answer(capsys, "verify", folder / "export")["fresh"] is None
    everything = answer(
        capsys, "verify", folder / "export", "--run", folder / "run", "--num-examples", "9999"
    )
    assert everything["fresh"]["num_examples"] == 359 - 4
    assert "no example" in refusal(
        capsys, "verify", folder / "export", "--run", folder / "run", "--num-examples", "0"
    )


def test_verify_names_the_first_difference(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An emulator that is off by one in one decision of the second layer is found out."""
    emulate = deploy_commands.compare_on_fresh_data.__globals__["emulator"].emulate

    def off_by_one(*arguments: Any, **options: Any) -> dict[str, np.ndarray]:
        tensors = emulate(*arguments, **options)
        tensors["keep"][1, 0, 3, 1, 2, 5] ^= True
        return tensors

    monkeypatch.setattr("codesign.hw.emulator.emulate", off_by_one)
    record = answer(
        capsys,
        "verify",
        folder / "export",
        "--run",
        folder / "run",
        "--num-examples",
        "8",
        status=1,
    )
    for found in (record["golden"], record["fresh"]):
        assert found["difference"].startswith("tensor `keep` of layer 1 at [0, 3, 1, 2, 5]")
    assert call("verify", folder / "export") == 1
    assert "DIFFERENT: tensor `keep`" in capsys.readouterr().out


@pytest.mark.smoke
def test_simulator_counts_what_the_model_counts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 40 examples: a second, partly filled chunk.
    record = answer(capsys, "simulate", folder / "run", "--num-examples", "40")
    assert record["counts_equal"] and record["num_examples"] == 40
    result = json.loads((folder / "run" / "result.json").read_text())["trained"]
    for scope in ("attention", "end_to_end"):
        energy, latency = record[scope]["energy_pj"], record[scope]["latency_cycles"]
        assert energy["largest_relative_error"] < 1e-5
        # Rows of 16 keys: one of fill and drain weighs more than at the preset's lengths.
        assert latency["largest_relative_error"] < 0.1
        assert energy["cost_model"] == pytest.approx(result[scope]["energy_pj"], rel=0.05)


def test_a_timeline_is_drawn_of_one_layer_of_one_example(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figure = tmp_path / "timeline.png"
    # In the second chunk.
    chosen = ("--num-examples", "40", "--timeline-example", "35", "--timeline-layer", "1")
    record = answer(capsys, "simulate", folder / "run", *chosen, "--timeline", figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    timeline = record["timeline"]
    assert (timeline["layer"], timeline["example"], timeline["unit"]) == (1, 35, "cycle")
    parts = {span["part"] for span in timeline["spans"]}
    assert {"dram", "host", "softmax"} <= parts
    kept = figure.read_bytes()
    again = refusal(capsys, "simulate", folder / "run", "--timeline", figure)
    assert "exists: choose another file" in again and figure.read_bytes() == kept
    other = tmp_path / "other.png"
    for option in ("--timeline-layer", "--timeline-example"):
        line = refusal(capsys, "simulate", folder / "run", "--timeline", other, option, "99")
        assert f"`{option}` must lie in [0, " in line
    assert not other.exists()


def test_export_refuses_what_it_would_overwrite(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "export" / "config.json").read_bytes()
    assert "exists" in refusal(capsys, "export", folder / "run", "--out", folder / "export")
    assert (folder / "export" / "config.json").read_bytes() == before
    other = ("export", folder / "run", "--out", folder / "other")
    assert "[1, 32], got 33" in refusal(capsys, *other, "--num-golden", "33")
    assert "is not a directory" in refusal(
        capsys, "export", folder / "run", "--out", folder / "absent" / "export"
    )
    assert not (folder / "other").exists()


def test_corrupted_checkpoint_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    last = copy / "checkpoints" / str(NUM_STEPS + 1)
    largest = max(
        (file for file in last.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-10])
    message = refusal(capsys, "evaluate", copy)
    assert "is corrupted" in message and str(last) in message
    shutil.rmtree(last)
    assert f"is not finished ({NUM_STEPS} of {NUM_STEPS} steps)" in refusal(
        capsys, "evaluate", copy
    )


def test_checkpoint_of_another_model_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    config = json.loads((copy / "config.json").read_text())
    config["experiment"]["model"]["hidden"] = 40
    (copy / "config.json").write_text(json.dumps(config))
    message = refusal(capsys, "export", copy, "--out", tmp_path / "export")
    assert "is of another model" in message and "40" in message
    assert not (tmp_path / "export").exists() and not (tmp_path / "dense").exists()


def test_interrupted_run_resumes_to_the_same_metrics(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(configs.EXPERIMENTS, "tiny", tiny)
    save = runs.RunDirectory.save

    def interrupted(self: runs.RunDirectory, step: int, tree: Any) -> None:
        save(self, step, tree)
        if step == 3:
            raise KeyboardInterrupt

    out = folder / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(runs.RunDirectory, "save", interrupted)
        assert train(out) == 130
    assert "is not finished (3 of 6 steps)" in refusal(capsys, "evaluate", out)
    assert train(out, "--resume") == 0

    def metrics(path: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    assert metrics(out) == metrics(folder / "run") and len(metrics(out)) == NUM_STEPS
    results = [json.loads((path / "result.json").read_text()) for path in (out, folder / "run")]
    assert results[0] == results[1]
    first, second = (load_run(path, cache=None, progress=False) for path in (out, folder / "run"))
    for name, knob in first.point.policy.layers.items():
        np.testing.assert_array_equal(knob, second.point.policy.layers[name])


def test_text_goes_from_the_users_file_to_a_verified_export(
    text_folder: tuple[str, str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    kind, _, folder = text_folder
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["is_met"]
    assert result["budget"]["energy"]["reached"] == pytest.approx(
        result["trained"]["end_to_end"]["energy_ratio"], rel=1e-5
    )
    trained, dense = result["trained"], result["dense"]
    assert trained["num_examples"] == NUM_VALIDATION
    if kind == "text":
        # One word decides: learned within 60 steps, and not lost.
        assert trained["quality_name"] == "accuracy"
        assert dense["quality"] > 0.9 and trained["quality"] > 0.8
    else:
        # 23 characters alike would take 4.5 bits; the training text is repeated in part.
        assert trained["quality_name"] == "bits_per_token"
        assert 0.5 < dense["quality"] < 3.5 and trained["quality"] < dense["quality"] + 0.5
    assert 0.0 < trained["kl_nats"] < 0.5 and dense["kl_nats"] < 0.05
    drift = result["drift"]
    assert drift["hard_quality"] == trained["quality"]
    assert drift["straight_through_quality"] == pytest.approx(trained["quality"], abs=0.11)

    evaluation = answer(capsys, "evaluate", folder / "run")
    assert evaluation["trained"] == trained and evaluation["dense"] == dense
    assert answer(capsys, "report", folder / "run") == result
    expected = json.loads((folder / "export" / "config.json").read_text())["expected"]
    assert expected["quality_name"] == trained["quality_name"]
    assert expected["quality"] == trained["quality"]
    assert call("report", folder / "run") == 0
    assert trained["quality_name"].replace("_", " ") in capsys.readouterr().out

    record = answer(capsys, "verify", folder / "export", "--run", folder / "run")
    assert record["is_exact"]
    golden, fresh = record["golden"], record["fresh"]
    assert golden["num_examples"] + fresh["num_examples"] == NUM_VALIDATION
    assert min(golden["num_decisions"], fresh["num_decisions"]) > 0
    assert "part 'test' of task" in refusal(capsys, "evaluate", folder / "run", "--part", "test")


def test_simulator_on_text(
    text_folder: tuple[str, str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Padded and causal rows are counted alike, and cost nearly what the simulator says."""
    _, mechanism, folder = text_folder
    record = answer(capsys, "simulate", folder / "run", "--num-examples", str(NUM_VALIDATION))
    assert record["counts_equal"]
    for scope in ("attention", "end_to_end"):
        latency, energy = (record[scope][name] for name in ("latency_cycles", "energy_pj"))
        if mechanism == "acceltran" and scope == "attention":
            # Attention of 40 cycles: a few waves of tiles, and of the energy most is leakage meanwhile.
            for one in (latency, energy):
                assert one["simulator"] == pytest.approx(one["cost_model"], rel=0.25)
            continue
        # Rows of 16 keys and fewer: fill and drain weigh more than at the preset's lengths.
        assert latency["largest_relative_error"] < 0.15
        # What SOFA's memories and scheduler draw goes with the latency, as does AccelTran's leakage.
        limit = {"sofa": 0.03, "acceltran": 0.15}.get(mechanism, 1e-5)
        assert energy["largest_relative_error"] < limit


def test_dense_models_lie_beside_the_run(tmp_path: Path) -> None:
    assert dense_folder(tmp_path / "run") == tmp_path / "dense"
    (tmp_path / "dense").mkdir()
    assert dense_folder(tmp_path / "points" / "run") == tmp_path / "dense"
    (tmp_path / "points" / "dense").mkdir(parents=True)
    assert dense_folder(tmp_path / "points" / "run") == tmp_path / "points" / "dense"


def test_quickstart_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = CurveSettings(
        budgets=(0.7,),
        uniform_thresholds=((-1.0, -1.0), (0.0, 0.0)),
        uniform_bits=((8, 8, 16), (4, 4, 8)),
        num_resamples=50,
    )
    out = tmp_path / "quickstart"

    def go(*, resume: bool) -> str:
        status = quickstart.run_quickstart(
            tiny(), settings, 0.7, out, resume=resume, overwrite=False
        )
        assert status == 0
        return capsys.readouterr().out

    text = go(resume=False)
    assert text.startswith("expected time: ")
    assert "golden vectors: " in text and "fresh data: " in text
    for name in ("curve.json", "curve.png", "export"):
        assert (out / name).exists() and str(out / name) in text
    assert go(resume=True).splitlines()[-6:] == text.splitlines()[-6:]


def test_sizes_are_trained_built_exported_and_simulated(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The machine that comes out is a file, as large as the one that went in, and what is exported runs on it."""
    run = folder / "sized"
    budget = ("--mode", "codesign", "--budget.edp", "0.7")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.EXPERIMENTS, "tiny", tiny)
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            assert call("train", "tiny", "--out", run, *budget) == 0
            trained = (run / "result.json").read_text()
            assert call("train", "tiny", "--out", run, *budget, "--resume") == 0
            assert (run / "result.json").read_text() == trained
        finally:
            jax.config.update("jax_disable_most_optimizations", False)
        assert "bound sizes, which mode `joint` does not train" in refusal(
            capsys, "train", "tiny", "--out", folder / "x", *budget[2:], "--caps.power-w", "1"
        )
        assert "below the smallest legal machine" in refusal(
            capsys, "train", "tiny", "--out", folder / "x", *budget, "--caps.area-mm2", "0.01"
        )
    result = json.loads((run / "result.json").read_text())
    sizes = result["sizes"]
    assert result["is_met"] and result["budget"]["edp"]["limit"] == 0.7
    assert sizes["built"] != sizes["file"] and sizes["relaxed"].keys() == sizes["built"].keys()
    assert sizes["area_mm2"] <= sizes["caps"]["area_mm2"] * (1.0 + 1e-6)
    machine = accelerator_from_spec(load_preset(run / "machine.json"))
    # The file that comes out has the clock as its own, and main memory's bytes in cycles of it.
    clock = sizes["built"].pop(CLOCK)
    sizes["built"]["dram.bytes_per_cycle"] /= clock
    own = accelerator_from_spec(load_preset("energon")).structure.clock_hz
    assert machine.structure.clock_hz == pytest.approx(own * clock)
    for name, value in sizes["built"].items():
        assert float(machine.sizes[name]) == pytest.approx(value, rel=1e-6), name
    finished = load_run(run, cache=folder / "dense", progress=False)
    assert finished.spec == load_preset(run / "machine.json")
    record = answer(capsys, "simulate", run, "--num-examples", "8")
    assert record["counts_equal"]
    for scope in ("attention", "end_to_end"):
        for metric in ("energy_pj", "latency_cycles"):
            assert record[scope][metric]["largest_relative_error"] < 0.2
    assert call("export", run, "--out", folder / "sized-export") == 0
    config = json.loads((folder / "sized-export" / "config.json").read_text())
    assert load_preset(run / "machine.json").model_dump(mode="json") == config["accelerator"]
