"""Fits of machine models: known factors, groups left out, choices among models, files of measurements, faults."""

import csv
import dataclasses
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.errors import CodesignError, DataError, NonFiniteError, UnknownNameError
from codesign.experiments import calibrate_machine
from codesign.experiments.validation_rtl import MEASURED
from codesign.hw.calibrate import (
    Factor,
    FitSettings,
    cross_validate,
    errors,
    fit_factors,
    group_folds,
    nested_cross_validate,
    spearman,
)
from codesign.hw.gemmini_counts import GemminiCounts, count_commands
from codesign.hw.gemmini_mapping import parse_mappings
from codesign.hw.gemmini_rtl import FACTORS, cycles

GOLDEN = json.loads((Path(__file__).resolve().parent / "golden" / "firesim_rows.json").read_text())
QUICK = FitSettings(num_starts=3, num_steps=200)


def many_counts() -> GemminiCounts:
    """Counts of layers that various factors bind."""
    texts, strides = [], []
    for channels, filters, columns, side in itertools.product((2, 64), (2, 32), (2, 14), (1, 8)):
        head = f"L3[WIO] K{filters} Q{side} P{side} - L2[WI] N1 K16X - L1[O] "
        texts += [
            f"{head}{kernel}C{channels} Q7 P{columns} C16X - L0[W] N1" for kernel in ("", "R3 S3 ")
        ]
        strides += [1, 1]
    nests = parse_mappings(texts)
    return count_commands(nests, np.array(strides))


def rtl_total(factors: dict[str, jax.Array], counts: GemminiCounts) -> jax.Array:
    return cycles(factors, counts).total


def test_fit_recovers_known_factors():
    counts = many_counts()
    true = {factor.name: factor.start * 1.5 for factor in FACTORS}
    measured = np.asarray(rtl_total(true, counts), np.float64)
    found, predicted, loss = fit_factors(
        rtl_total, FACTORS, counts, measured, settings=FitSettings(num_starts=4, num_steps=600)
    )
    assert loss[0] < 1e-3
    np.testing.assert_allclose(predicted[0], measured, rtol=1e-2)
    for name, value in true.items():
        assert found[name][0] == pytest.approx(value, rel=0.05), name


def test_fits_ignore_rows_without_weight():
    """Two fits at once, each on rows of its own kind: the factors of either kind."""
    data = jnp.ones((10,))
    measured = np.repeat([3.0, 7.0], 5)
    weights = np.repeat([[1.0, 0.0], [0.0, 1.0]], 5, axis=1)
    scale = Factor(name="scale", unit="1", start=1.0, meaning="")
    found, predicted, _ = fit_factors(
        lambda factors, x: factors["scale"] * x,
        [scale],
        data,
        measured,
        weights=weights,
        settings=QUICK,
    )
    np.testing.assert_allclose(found["scale"], [3.0, 7.0], rtol=1e-3)
    np.testing.assert_allclose(predicted, found["scale"][:, None] * np.ones((2, 10)), rtol=1e-6)


def test_folds_hold_out_whole_groups():
    groups = [str(number % 7) for number in range(40)]
    folds = group_folds(groups, 3, 0)
    by_group = {
        group: {fold for g, fold in zip(groups, folds, strict=True) if g == group}
        for group in groups
    }
    assert all(len(found) == 1 for found in by_group.values())
    assert sorted(
        len({g for g, f in zip(groups, folds, strict=True) if f == fold}) for fold in range(3)
    ) == [2, 2, 3]
    assert np.any(folds != group_folds(groups, 3, 1))
    with pytest.raises(CodesignError, match=r"`num_folds` must lie in \[2, 7\]"):
        group_folds(groups, 8, 0)


def grouped_scale() -> tuple[list[Factor], jax.Array, np.ndarray, list[str]]:
    """Four groups, the measurement of which is 1, 2, 4 and 8 times the data."""
    groups = [name for name in "abcd" for _ in range(3)]
    measured = np.repeat([1.0, 2.0, 4.0, 8.0], 3)
    return [Factor(name="scale", unit="1", start=1.0, meaning="")], jnp.ones(12), measured, groups


def test_held_out_predictions_have_not_seen_their_group():
    factors, data, measured, groups = grouped_scale()
    found = cross_validate(
        lambda values, x: values["scale"] * x,
        factors,
        data,
        measured,
        groups,
        num_folds=4,
        assignments=(0, 1),
        settings=QUICK,
    )
    # The mean |log ratio| of three other groups is least at their median.
    expected = np.repeat([4.0, 4.0, 2.0, 2.0], 3)
    np.testing.assert_allclose(found.predicted, np.stack([expected] * 2), rtol=1e-2)
    assert found.factors["scale"].shape == (2, 4)


def test_nested_choice_sees_no_row_of_its_fold():
    """The model that is wrong on groups a to c alone is not chosen, whatever it says of the fold left out."""
    factors, data, _, groups = grouped_scale()
    measured = np.repeat([1.0, 1.0, 1.0, 8.0], 3)
    shift = jnp.asarray(np.where(np.asarray(groups) == "d", 8.0, 1.0))
    models = {
        "plain": lambda values, x: values["scale"] * x,
        "shifted": lambda values, x: values["scale"] * x * shift,
    }
    predicted, chosen = nested_cross_validate(
        models, factors, data, measured, groups, num_folds=4, num_inner=3, settings=QUICK
    )
    of_group = dict(zip(groups, group_folds(groups, 4, 0), strict=True))
    # With d left out both are alike and the first is taken; with another left out only the second fits d.
    assert chosen[of_group["d"]] == "plain"
    assert {chosen[of_group[name]] for name in "abc"} == {"shifted"}
    np.testing.assert_allclose(predicted, np.ones(12), rtol=1e-2)


def test_errors_by_hand():
    found = errors(np.array([1.1, 1.0, 4.5, 4.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert dataclasses.asdict(found) == pytest.approx(
        {"rows": 4, "mean": 0.275, "median": 0.3, "largest": 0.5, "spearman": 0.6}
    )
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(
        3**0.5 / 2
    )


def test_bad_fits_are_named():
    factors, data, measured, _ = grouped_scale()

    def scale(values: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return values["scale"] * x

    with pytest.raises(CodesignError, match="`measured` must be positive"):
        fit_factors(scale, factors, data, measured * 0.0)
    with pytest.raises(CodesignError, match="`weights` must be"):
        fit_factors(scale, factors, data, measured, weights=np.zeros((1, 12)))
    with pytest.raises(CodesignError, match="factor `scale` starts at 0"):
        fit_factors(scale, [dataclasses.replace(factors[0], start=0.0)], data, measured)
    with pytest.raises(CodesignError, match="`num_starts`"):
        fit_factors(scale, factors, data, measured, settings=FitSettings(num_starts=0))
    with pytest.raises(UnknownNameError, match="unknown loss `l2`"):
        fit_factors(scale, factors, data, measured, settings=FitSettings(loss="l2"))  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="no start has a finite loss"):
        fit_factors(lambda v, x: -v["scale"] * x, factors, data, measured, settings=QUICK)


# --- calibration of a file


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("rule", ["sum", "max"])
def test_any_columns_can_be_calibrated(
    rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Energy of 0.5 pJ per operation and 100 pJ per DRAM byte, or the longer of two times."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for layer, _ in itertools.product("abcdef", range(4)):
        operations, fetched = 10.0 ** rng.uniform(3.0, 6.0), 10.0 ** rng.uniform(1.0, 4.0)
        terms = 0.5 * operations, 100.0 * fetched
        measured = sum(terms) if rule == "sum" else (terms[0] ** 8 + terms[1] ** 8) ** 0.125
        rows.append({"layer": layer, "ops": operations, "bytes": fetched, "pj": measured})
    path = write_csv(tmp_path / "runs.csv.gz", rows)
    status = calibrate_machine.calibrate_command(
        path,
        machine=rule,
        measured="pj",
        counts=("ops", "bytes"),
        groups=("layer",),
        num_folds=3,
        as_json=True,
        settings=FitSettings(num_starts=2, num_steps=400),
    )
    found = json.loads(capsys.readouterr().out)
    assert status == 0 and (found["rows"], found["groups"]) == (24, 6)
    values = {factor["name"]: factor["value"] for factor in found["factors"]}
    assert values == pytest.approx({"ops": 0.5, "bytes": 100.0}, rel=0.02)
    assert found["held_out"][0]["mean"] < 0.02


def test_calibration_prints_factors_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_csv(tmp_path / "rows.csv.gz", [dict(row) for row in GOLDEN["rows"]])
    status = calibrate_machine.calibrate_command(
        path,
        machine="gemmini-rtl",
        measured=MEASURED,
        num_folds=2,
        settings=FitSettings(num_starts=1, num_steps=2),
    )
    printed = capsys.readouterr().out
    assert status == 0 and "pair_issue_cycles" in printed and "held out" in printed


def test_bad_files_are_named(tmp_path: Path):
    path = write_csv(tmp_path / "rows.csv.gz", [{"a": 1, "b": "x"}, {"a": -1, "b": "y"}])
    columns = calibrate_machine.read_columns(path)
    with pytest.raises(DataError, match="no column `c`: choose from a, b"):
        calibrate_machine.number_column(columns, "c")
    with pytest.raises(DataError, match="column `a`, row 2: '-1' is not a positive"):
        calibrate_machine.number_column(columns, "a")
    with pytest.raises(DataError, match="column `b`: could not convert"):
        calibrate_machine.number_column(columns, "b")
    with pytest.raises(UnknownNameError, match="unknown machine `eyeriss`"):
        calibrate_machine.machine_model(columns, "eyeriss", measured="a")
    with pytest.raises(CodesignError, match="machine `sum` needs columns"):
        calibrate_machine.machine_model(columns, "sum", measured="a")
    (tmp_path / "short.csv").write_text("a,b\n1\n")
    with pytest.raises(DataError, match="line 2: 1 values under 2 headings"):
        calibrate_machine.read_columns(tmp_path / "short.csv")
    with pytest.raises(DataError, match="give a CSV file"):
        calibrate_machine.read_columns(tmp_path / "none.csv")
