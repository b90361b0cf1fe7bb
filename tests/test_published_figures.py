"""Published figures of the baselines: counts and intervals by hand, schedules, arithmetic, and the study's command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_prediction_measures import small, untrained as without_teacher

from codesign.calibration import Calibration
from codesign.errors import CodesignError
from codesign.experiments import configs, published_cases, published_figures
from codesign.experiments.cli import main
from codesign.experiments.configs import Experiment
from codesign.experiments.problem import Problem, outline
from codesign.experiments.published_cases import CASES, case_policy, multipliers_at_one_ghz
from codesign.experiments.published_figures import (
    GPT2_MEDIUM,
    GPT2_SMALL,
    arithmetic,
    equal_quality,
    figures_experiment,
    stored_keys,
)
from codesign.experiments.published_measures import by_example, combined, measured, stacked
from codesign.experiments.published_rows import ROWS
from codesign.experiments.published_tables import published_tables
from codesign.experiments.teacher import Teacher
from codesign.hw.scaling import SYSTEMS
from codesign.hw.spec import load_preset

CHOSEN = ("sanger.0.002", "a3.conservative")
"""Settings that the command is tested at: each takes two programs."""


def untrained(experiment: Experiment, **_: Any) -> Problem:
    """A problem of random parameters, their own teacher, whose attention is not flat."""
    problem = without_teacher(experiment)
    params = jax.tree.map(lambda leaf: 2.0 * leaf, problem.params)
    return dataclasses.replace(problem, params=params, teacher=Teacher(params, problem.config))


def keep_of(rows: list[list[list[int]]]) -> np.ndarray:
    """Decisions of one layer and head, `[1, R, 1, T, S]`."""
    return np.asarray(rows, bool)[None, :, None]


def test_counts_of_worked_decisions() -> None:
    keep = keep_of([[[1, 1, 1], [0, 0, 0], [1, 0, 1]], [[1, 1, 1], [0, 0, 0], [0, 0, 0]]])
    found = measured("spatten", keep, is_causal=False)
    assert {name: (int(a[0, 0]), int(b[0, 0])) for name, (a, b) in found.items()} == {
        "reread": (1, 2)
    }
    found = measured("a3", keep[:, ::-1], is_causal=False)
    assert found["candidates"][0][0, 0] == 3 and found["kept"][0][0, 0] == 5
    # Of a decoder the first row has one key, the last three.
    found = measured("sanger", keep[:, :1], is_causal=True)
    assert found["kept"] == (3, 6)
    assert found["packed"] == (3, 32) and found["lockstep"] == (3, 48)


def test_a_figure_is_a_ratio_of_sums() -> None:
    counts = [
        {"x": (np.asarray([[1, 2]]), np.asarray([[2, 4]]))},
        {"x": (np.asarray([[3, 0]]), np.asarray([[4, 0]]))},
    ]
    ratio = stacked(counts)["x"]
    found = combined([ratio], num_resamples=200)
    assert found["mean"] == found["by_seed"][0] == 6 / 10
    # Heads: 4 of 6 and 2 of 4. Examples: 3 of 6 and 3 of 4.
    assert found["deviation"] == pytest.approx(np.std([4 / 6, 2 / 4]))
    assert found["low"] == 0.5 and found["high"] == 0.75
    other = by_example(np.asarray([0.0, 1.0]), 1.0)
    found = combined([by_example(np.asarray([1.0, 1.0]), 1.0), other], num_resamples=200)
    assert found["mean"] == 0.75 and found["by_seed"] == [1.0, 0.5]
    assert found["deviation"] is None and found["low"] < 0.75 < found["high"]


def test_stored_schedules_are_those_of_the_repository() -> None:
    """Shares are stored in whole 1/1024 and rounded there; the repository rounds numbers of keys down."""
    small_keys, medium = stored_keys(GPT2_SMALL, 1024), stored_keys(GPT2_MEDIUM, 1024)
    printed = np.asarray([921, 716, *[204] * 4, *[102] * 6])
    assert small_keys.tolist() == [922, 717, *[205] * 4, *[102] * 6]
    assert np.all(np.floor(np.asarray(GPT2_SMALL) * 1024) == printed)
    printed = np.asarray([1024, 1024, 921, *[819] * 2, *[614] * 6, *[307] * 13])
    assert np.all(np.floor(np.asarray(GPT2_MEDIUM) * 1024) == printed)
    assert np.all(np.abs(medium - printed) <= 1)
    assert stored_keys(GPT2_SMALL, 64).tolist() == [58, 45, *[13] * 4, *[7] * 6]


def test_arithmetic_by_hand() -> None:
    found = arithmetic()
    keys = (922 + 717 + 4 * 205 + 6 * 102) / 12 / 1024
    assert found["spatten.gpt2_small"] == pytest.approx(keys) == pytest.approx(0.249, abs=1e-3)
    assert found["spatten.gpt2_medium"] == pytest.approx(0.5, abs=1e-3)
    # Of 10 + 10 bits of a key and its value: 6 bits, 4 more in 7 % of the rows, and 6 of a fifth of the values.
    assert found["spatten.gpt2_small.bytes_times"] == pytest.approx(20 / (keys * 7.48))
    assert found["spatten.gpt2_small.macs_times"] == pytest.approx(2 / (keys * 1.27))
    assert found["sanger.latency"] == pytest.approx(0.822, abs=5e-4)
    assert found["sanger.latency_corrected"] == pytest.approx(0.964, abs=5e-4)
    assert found["sanger.0.02.over_a3"] == pytest.approx(2.39, abs=5e-3)
    assert found["sanger.0.02.over_spatten"] == pytest.approx(1.47, abs=5e-3)


def test_multipliers_are_those_that_the_table_scales_by() -> None:
    """Sanger's 64 x 16 run at 500 MHz."""
    for preset, name in (("a3", "A3"), ("spatten", "SpAtten"), ("sanger", "Sanger")):
        assert multipliers_at_one_ghz(load_preset(preset)) == SYSTEMS[name].multipliers


def test_settings_are_the_published_ones() -> None:
    names = [f"{case.mechanism}.{case.name}" for case in CASES]
    assert len(set(names)) == len(names)
    assert len({row.figure for row in ROWS}) == len(ROWS)
    for row in ROWS:
        known = any(row.figure.startswith(f"{name}.") for name in names)
        assert known or row.figure in arithmetic() or ".equal_quality." in row.figure, row.figure
        assert row.why and (row.source or not row.published)
    problem = outline(figures_experiment("digits", "a3", 0, None))
    by_name = {f"{case.mechanism}.{case.name}": case for case in CASES}
    calibration = Calibration(layers={}, ends={})
    # 64 keys: 32 and 8 steps, and e^-t of 5 and 10 %.
    for name, bits, share in (("conservative", 5, 0.05), ("aggressive", 3, 0.1)):
        policy = case_policy(problem, by_name[f"a3.{name}"], calibration)
        np.testing.assert_array_equal(policy.layers["search_bits"], bits)
        part = 1.0 / (1.0 + np.exp(-np.asarray(policy.layers["threshold"], np.float64)))
        np.testing.assert_allclose(np.exp(-16.0 * part), share, rtol=1e-5)


def test_equal_quality_is_read_from_a_comparison(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    rows = [
        {"mechanism": name, "frame": frame, "at": at, "setting": setting, "quality": q, "kept": k}
        for name in ("fact", "energon")
        for frame, at, setting, q, k in (
            ("common", "dense", "dense", 0.97, 1.0),
            ("common", "quality", "trained", 0.96, 0.25),
            ("common", "kl", "trained", 0.95, 0.5),
            ("own", "quality", "trained", 0.96, 0.75),
        )
    ]
    path.write_text(json.dumps(rows))
    found = equal_quality(path)
    assert found["fact.equal_quality.saved"] == {"mean": 0.75}
    assert found["energon.equal_quality.loss"]["mean"] == pytest.approx(0.01)
    path.write_text(json.dumps(rows[:4]))
    with pytest.raises(CodesignError, match="rows of `fact` and `energon`"):
        equal_quality(path)
    with pytest.raises(CodesignError, match="nowhere"):
        equal_quality(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_command_writes_published_and_measured_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = tuple(case for case in CASES if f"{case.mechanism}.{case.name}" in CHOSEN)
    monkeypatch.setitem(configs.EXPERIMENTS, "digits", small)
    monkeypatch.setattr(published_figures, "load_problem", untrained)
    for module in (published_figures, published_cases):
        monkeypatch.setattr(module, "CASES", cases)
    out = tmp_path / "study"
    command = ["reproduce", "published-figures", "--out", str(out), "--num-examples", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Sanger" in printed and "2.39" in printed and "25708.4" in printed
    record = json.loads((out / "study.json").read_text())
    (task,) = record["tasks"]
    assert task["seeds"] == [0] and task["num_examples"] == 3 and not task["is_causal"]
    figures = {name: found["mean"] for name, found in task["figures"].items()}
    assert set(CHOSEN) == {name.rpartition(".")[0] for name in figures if name.endswith(".kl")}
    assert 0.0 < figures["sanger.0.002.lockstep"] < figures["sanger.0.002.packed"] <= 1.0
    assert figures["a3.conservative.kept"] <= figures["a3.conservative.candidates"] < 1.0
    left = (figures["a3.conservative.kept"] + figures["a3.conservative.candidates"]) / 2.0
    assert figures["a3.conservative.saved"] == pytest.approx(1.0 - left)
    # 2 x 32 products of one component each row, of 2 x 64 keys of 8.
    fewer = figures["a3.conservative.saved"] - figures["a3.conservative.saved_all"]
    assert fewer == pytest.approx(64 / (2 * 64 * 8))
    assert figures["a3.conservative.bytes_times"] == pytest.approx(1.0)
    assert figures["a3.conservative.macs_times"] == pytest.approx(1.0 / left)
    assert published_tables(record)["published_scaling"].rows[0][0] == "A3"
    assert record["published"]["sanger.0.02.packed"]["values"] == [0.56, 0.74]
    assert main(command) == 2 and "`--overwrite`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "digits", "digits"), "`--tasks` must differ"),
        (("--num-examples", "3", "4"), "one number, or one for each of 1 tasks, got 2"),
        (("--num-examples", "0"), "`--num-examples` must be at least 1, got 0"),
        (("--comparison", "nowhere"), "`--comparison nowhere` is not `comparison.json`"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "study")
    assert main(["reproduce", "published-figures", *arguments, "--out", out]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_other_studies_take_no_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "prediction-claims", "--comparison", "x", "--out", str(tmp_path / "a")]
    assert main(command) == 2 and "leave out `--comparison`" in capsys.readouterr().err
