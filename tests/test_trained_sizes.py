"""Trained sizes beside those of the file: what `codesign reproduce trained-sizes` measures."""

import dataclasses
from pathlib import Path

import pytest
from tiny_experiment import tiny

from codesign.experiments import trained_sizes
from codesign.experiments.cli import main
from codesign.experiments.configs import Experiment
from codesign.experiments.trained_sizes import sizes_table, study

BUDGET, LOWER = 0.6, 1.5


@pytest.mark.slow
def test_the_same_model_on_fitted_sizes(
    tmp_path: Path, dense_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(machine: str, task: str, seed: int, data: Path | None) -> Experiment:
        assert (machine, task, data) == ("energon", "digits", None)
        return dataclasses.replace(tiny(), seed=seed)

    monkeypatch.setattr(trained_sizes, "experiment_on", on)
    rows = list(
        study(
            ["digits"],
            ["energon"],
            [0],
            budget=BUDGET,
            lower=LOWER,
            out=tmp_path / "runs",
            cache=dense_cache,
            data=None,
            progress=False,
        )
    )
    own, fitted, trained = rows
    assert [row.sizes for row in rows] == ["file", "fitted", "trained"]
    assert own.gain == own.modelled_gain == 1.0
    # Not a decision differs, and no machine is larger than the file's.
    assert (fitted.quality, fitted.kl_nats) == (own.quality, own.kl_nats)
    assert max(fitted.area_mm2, trained.area_mm2) <= own.area_mm2 * (1.0 + 1e-6)
    # Sizes that descended on what is executed cost less, in the simulator as in the cost model.
    assert fitted.gain > 1.0 and fitted.modelled_gain > 1.0
    for row in rows:
        product = row.energy_pj * row.latency_cycles
        assert row.gain == pytest.approx(own.energy_pj * own.latency_cycles / product)
        assert row.gain == pytest.approx(row.modelled_gain, rel=0.1)
    assert (own.budget, trained.budget) == (BUDGET, BUDGET / LOWER)
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {
        "digits-energon-0-joint",
        "digits-energon-0-codesign",
    }


def test_means_over_seeds_by_hand() -> None:
    row = {
        "task": "digits",
        "machine": "energon",
        "sizes": "trained",
        "quality_name": "accuracy",
        "quality": 0.9,
        "kl_nats": 0.1,
        "area_mm2": 2.0,
        "energy_pj": 3e6,
        "latency_cycles": 4000.0,
        "gain": 1.5,
        "modelled_gain": 1.4,
    }
    other = row | {"quality": 1.0, "gain": 2.5, "energy_pj": 5e6}
    (cells,) = sizes_table([row, other]).rows
    assert cells == (
        *("digits, energon", "trained", "2", "95.0", "0.1000", "2.000", "4.00", "4,000"),
        *("2.00 [1.50, 2.50]", "1.40"),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lower", "1"), "`--lower` must be > 1, got 1: raise it"),
        (("--edp", "0"), "`budget.edp` must be > 0"),
        (("--tasks", "digits", "mnist", "--data", "x"), "`--data` is the folder of one task"),
    ],
)
def test_bad_options_are_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "trained-sizes", "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()
