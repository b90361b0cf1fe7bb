"""Expected times: they grow with the work, count what is done once once, and run nothing."""

import dataclasses
from pathlib import Path

import pytest

from codesign.experiments import compare_command
from codesign.experiments.cli import main
from codesign.experiments.configs import digits
from codesign.experiments.estimate import (
    DENSE_STEP,
    SECONDS_STEP,
    STEP,
    estimate_seconds,
    example_seconds,
)
from codesign.experiments.problem import outline

BUDGET = ("--budget.energy", "0.5")


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_estimate_grows_with_the_work_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("train", "digits", "--out", out, *BUDGET, "--estimate") == 0
    assert capsys.readouterr().out.startswith("expected time: ")
    assert run("curve", "digits", "--out", out, "--estimate") == 0
    assert capsys.readouterr().out.startswith("expected time: ")
    assert not out.exists()
    problem = outline(digits())
    # Set-up, 500 dense steps, 100 under a budget, one measured setting.
    assert 60.0 < estimate_seconds(problem) < 180.0
    deep = dataclasses.replace(digits().model, num_layers=6)
    deeper = outline(dataclasses.replace(digits(), model=deep))
    assert example_seconds(deeper, STEP) == pytest.approx(2.0 * example_seconds(problem, STEP))
    larger = outline(dataclasses.replace(digits(), batch_size=64))
    whole = outline(dataclasses.replace(digits(), num_calibration=1_000_000))
    (note,) = whole.notes
    assert f"more than the {len(whole.task.part('train'))} training examples: all are used" in note
    all_of_them = dataclasses.replace(digits(), num_calibration=len(whole.task.part("train")))
    assert estimate_seconds(whole) == estimate_seconds(outline(all_of_them))
    growth = estimate_seconds(larger) - estimate_seconds(problem)
    assert growth == pytest.approx(100 * 32 * example_seconds(problem, STEP))
    assert estimate_seconds(problem, num_seeds=3) == pytest.approx(3 * estimate_seconds(problem))
    # A dense model that is there is not trained again: 500 steps of 32 images in each seed.
    dense = 500 * (SECONDS_STEP + 32 * example_seconds(problem, DENSE_STEP))
    saved = estimate_seconds(problem, num_seeds=3) - estimate_seconds(
        problem, num_seeds=3, dense_is_cached=True
    )
    assert saved == pytest.approx(3 * dense)


def test_a_comparison_trains_the_dense_model_of_a_seed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[float] = []
    monkeypatch.setattr(compare_command, "announce", announced.append)
    command = ("compare", "digits", "--out", tmp_path / "run", "--estimate", "--seeds", "0", "1")
    for names in (("sofa",), ("topk",), ("sofa", "topk")):
        assert run(*command, "--mechanisms", *names) == 0
    problem = outline(digits())
    dense = estimate_seconds(problem) - estimate_seconds(problem, dense_is_cached=True)
    alone, other, both = announced
    assert both == pytest.approx(alone + other - 2 * dense)
