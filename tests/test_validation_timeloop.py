"""The dense cost model against Timeloop's figures, where their file is."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from codesign.errors import DataError
from codesign.experiments.validation_timeloop import (
    FILE,
    read_points,
    spearman,
    timeloop_cost,
    validate_timeloop,
)


def folder() -> Path:
    """The folder of published figures; skips without it."""
    root = Path(os.environ.get("CODESIGN_VALIDATION", ""))
    if not (root / FILE).is_file():
        pytest.skip(f"set CODESIGN_VALIDATION to the folder that holds {FILE}")
    return root


def check(num_rows: int | None) -> None:
    rows = validate_timeloop(folder(), num_rows=num_rows)
    values = {row.metric: row.value for row in rows}
    assert sum(row.limit is not None for row in rows) == 5
    for row in rows:
        assert row.limit is None or row.value <= row.limit, row
    shares = [value for name, value in values.items() if name.startswith("points that")]
    assert sum(shares) == pytest.approx(100.0)
    # Published shares of all points: multipliers 28.5 %, accumulator 56.1 %, scratchpad 2.5 %, DRAM 12.9 %.
    for name, share in {
        "multipliers": 28.5,
        "accumulator": 56.1,
        "scratchpad": 2.5,
        "dram": 12.9,
    }.items():
        assert values[f"points that {name} bind"] == pytest.approx(share, abs=3.0)


def test_every_tenth_point():
    check(2000)


@pytest.mark.slow
def test_every_point():
    check(None)


def test_matrix_products_agree_to_the_cycle():
    points = read_points(folder(), num_rows=2000)
    result = timeloop_cost(points)
    is_product = np.prod(points.layer.extents[:, :2], axis=1) == 1.0
    errors = np.abs(result.latency_cycles / points.cycles - 1.0)[is_product]
    assert np.mean(errors == 0.0) > 0.98 and errors.max() < 3e-4
    energy = np.abs(result.total_pj / 1e6 / points.energy_uj - 1.0)[is_product]
    assert energy.mean() < 2.5e-4 and energy.max() < 5e-3


def test_switches_of_dosas_model():
    """Without whole blocks and cycles, as DOSA counts: 0.0048 % and 0.163 % are known of its equations on all points."""
    points = read_points(folder(), num_rows=2000)
    result = timeloop_cost(points, whole_blocks=False, whole_cycles=False)
    latency = 100.0 * np.abs(result.latency_cycles / points.cycles - 1.0)
    energy = 100.0 * np.abs(result.total_pj / 1e6 / points.energy_uj - 1.0)
    assert latency.mean() < 0.01 and energy.mean() == pytest.approx(0.163, rel=0.1)
    assert np.mean(energy > 1.0) == pytest.approx(0.015, abs=0.005)
    assert energy.mean() > 3.0 * np.mean(
        np.abs(100.0 * (timeloop_cost(points).total_pj / 1e6 / points.energy_uj - 1.0))
    )


def test_ranks_share_ties():
    assert spearman(
        np.asarray([1.0, 2.0, 2.0, 3.0]), np.asarray([1.0, 5.0, 5.0, 9.0])
    ) == pytest.approx(1.0)
    assert spearman(np.asarray([1.0, 2.0, 3.0]), np.asarray([3.0, 2.0, 1.0])) == pytest.approx(-1.0)


def test_missing_and_damaged_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=f"does not exist: give the folder that holds {FILE}"):
        validate_timeloop(tmp_path)
    with gzip.open(tmp_path / FILE, "wt") as file:
        file.write("prob.R,prob.S\n1,1\n")
    with pytest.raises(DataError, match=r"has no column `prob\.P`: it is another file"):
        validate_timeloop(tmp_path)
