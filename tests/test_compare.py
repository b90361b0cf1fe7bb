"""The common frame and comparisons: factors, prices, mixtures by hand, and a whole one on a small task."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_experiment import tiny
from tiny_model import fast_cost

from codesign.errors import CodesignError, InfeasibleBudgetError, UnknownNameError
from codesign.experiments import compare
from codesign.experiments.cli import main
from codesign.experiments.compare import (
    COMMON,
    EQUAL_MULTIPLIERS,
    OWN,
    checked_names,
    compared_mechanisms,
    framed_experiments,
    machines_of,
    reached_settings,
    run_comparison,
)
from codesign.experiments.compare_rows import comparison_rows, with_bounds
from codesign.experiments.comparison import cheapest_mixtures, resampled
from codesign.experiments.configs import digits
from codesign.experiments.curve_record import CurvePoint
from codesign.experiments.curve_settings import CurveSettings
from codesign.experiments.evaluate import Measurement, Priced
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import ModelShape, Setting
from codesign.hw.frame import AREA_MM2, common_frame, equal_multipliers, frame_factor, multipliers
from codesign.hw.operating_points import closed_form_workload, published_setting
from codesign.hw.spec import load_preset
from codesign.mechanisms import MECHANISMS

DOCS = Path(__file__).resolve().parent.parent / "docs"
FACTORS = {
    "a3": 5.58,
    "sanger": 1.30,
    "energon": 3.50,
    "spatten": 7.49,
    "fact": 0.944,
    "sofa": 1.0,
    "bitserial": 0.832,
    "esact": 0.948,
    "lapa": 1.11,
    "topk": 4.14,
    "acceltran-edge": 0.0263,
}
"""5.69 mm2 over each published area at 28 nm."""
SHAPE = ModelShape(num_layers=2, num_tokens=64, num_heads=2, head_dim=64, width=128, hidden=256)


# The frame


@pytest.mark.parametrize("name", FACTORS)
def test_machines_fill_the_area(name: str) -> None:
    spec = load_preset(name)
    # Published areas have three or four digits.
    assert frame_factor(spec, with_host=False) == pytest.approx(FACTORS[name], rel=4e-3)
    frame = common_frame(spec)
    factor = frame_factor(spec)
    assert factor < frame_factor(spec, with_host=False) or spec.host is None
    elements = spec.processing_elements
    for unit in spec.units:
        grown = frame.units[unit].lanes.value / spec.units[unit].lanes.value
        assert grown == pytest.approx(1.0 if elements is not None else factor)
    for memory in spec.memories:
        capacity = spec.memories[memory].capacity.base
        assert frame.memories[memory].capacity.base == pytest.approx(factor * capacity)
    accelerator = accelerator_from_spec(frame)
    price = fast_cost(closed_form_workload(frame, SHAPE, Setting()), accelerator)
    assert float(price.area_mm2("end_to_end")) == pytest.approx(AREA_MM2, rel=1e-5)


@pytest.mark.parametrize("name", FACTORS)
def test_a_machine_on_its_own_area_keeps_its_sizes(name: str) -> None:
    """At a factor of 1; all but the bandwidth and the clock, whose process is the frame's."""
    own, framed = (
        {key: float(size) for key, size in accelerator_from_spec(spec).sizes.items()}
        for spec in (load_preset(name), common_frame(load_preset(name), factor=1.0))
    )
    assert framed == pytest.approx(own | {"dram.bytes_per_cycle": 59.8, "clock": 1.0})


@pytest.mark.parametrize("name", ["sofa", "lapa", "topk"])
def test_a_machine_of_the_frame_keeps_its_area_and_speed(name: str) -> None:
    """At 28 nm, 1 GHz and 59.8 GB/s already; energies are those of the one table."""
    spec = load_preset(name)
    workload = closed_form_workload(spec, SHAPE, published_setting(spec))
    before, after = (
        fast_cost(workload, accelerator_from_spec(one))
        for one in (spec, common_frame(spec, factor=1.0))
    )
    for scope in ("attention", "end_to_end"):
        np.testing.assert_array_equal(after.latency_cycles(scope), before.latency_cycles(scope))
        # Published areas have three or four digits.
        np.testing.assert_allclose(after.area_mm2(scope), before.area_mm2(scope), rtol=2e-4)


def test_one_table_prices_all() -> None:
    """The same operation costs the same on every machine: 16 x 16 MAC, exponential, byte of main memory."""
    seen: dict[str, set[float]] = {"dram": set(), "clock": set(), "bandwidth": set()}
    for preset in FACTORS:
        frame = common_frame(load_preset(preset))
        table = frame.energy_table
        assert table is not None and table == common_frame(load_preset("topk")).energy_table
        assert frame.energy_factor.value == 1.0 and frame.standing_power is None
        assert frame.energy_scale == pytest.approx(1.0 / 1.9446, rel=1e-4)
        seen["dram"].add(frame.dram.energy.base)
        seen["clock"].add(frame.clock_hz)
        seen["bandwidth"].add(frame.dram.bandwidth.base)
    assert {name: len(values) for name, values in seen.items()} == dict.fromkeys(seen, 1)
    assert seen["clock"] == {1e9} and seen["bandwidth"] == {59.8e9}
    multiply = 0.2 * 16 * 16 / 64 + 0.0033 * 40
    assert multiply / 1.9446 == pytest.approx(0.478, abs=2e-3)


def test_every_product_of_a_frame_reads_its_operand() -> None:
    """No machine's operands are free: each multiplication of two activations or of a weight comes from a memory."""
    for preset in FACTORS:
        frame = common_frame(load_preset(preset))
        accelerator = accelerator_from_spec(frame)
        workload = closed_form_workload(frame, SHAPE, published_setting(frame))
        keys = [key for key in workload.operations if key.endswith((".mac", ".shift_add"))]
        keys += ["linear.mac"] if frame.storage is not None else []
        ports = [pattern for unit in frame.units.values() for pattern in unit.reads]
        assert keys
        for key in keys:
            reads = accelerator.structure.unit_of(key).reads_of(key)
            comes_by_port = "*.bytes" in ports and key in ("qk.mac", "pv.mac")
            assert len(reads) == 1 - comes_by_port, (preset, key)


def test_frames_are_files(tmp_path: Path) -> None:
    experiments = framed_experiments(digits(), {"topk": "topk", "fact": "fact"}, tmp_path)
    for name, experiment in experiments.items():
        spec = load_preset(experiment.preset)
        assert spec.mechanism == experiment.mechanism == name
        published = closed_form_workload(spec, SHAPE, published_setting(spec))
        assert (
            float(fast_cost(published, accelerator_from_spec(spec)).energy_pj("attention")[0]) > 0.0
        )


# What is compared


def test_every_mechanism_with_thresholds_is_compared() -> None:
    known = compared_mechanisms()
    assert set(known) == set(MECHANISMS) - {"dense"}
    assert known["acceltran"] == "acceltran-edge" and known["sofa"] == "sofa"
    assert checked_names(["topk", "a3"]) == {"topk": "topk", "a3": "a3"}
    with pytest.raises(UnknownNameError, match="`dense` cannot be compared: choose among a3"):
        checked_names(["dense"])
    with pytest.raises(CodesignError, match="once"):
        checked_names(["topk", "topk"])


def test_budgets_out_of_reach_are_left_out(tmp_path: Path) -> None:
    settings = CurveSettings(budgets=(0.9, 0.5, 0.01))
    experiment = framed_experiments(digits(), {"topk": "topk"}, tmp_path)["topk"]
    assert reached_settings(experiment, settings).budgets == (0.9, 0.5)
    with pytest.raises(InfeasibleBudgetError, match=r"0.01 cannot be reached"):
        reached_settings(experiment, CurveSettings(budgets=(0.01,)))


# Mixtures


def test_mixture_by_hand() -> None:
    """Of dense (no loss, 10), a (loss 0.5 of a limit of 1, 6) and b (loss 3, 2): a fifth b, the rest a."""
    lost, costs = np.array([0.0, 0.5, 3.0]), np.array([10.0, 6.0, 2.0])
    limits = np.array([1.0, 9.0, 0.0, -1.0])
    shares = cheapest_mixtures(lost - limits[:, None], np.broadcast_to(costs, (4, 3)))
    # Where all may be lost the cheapest alone; where nothing may, dense; and so where even that loses too much.
    expected = [[0.0, 0.8, 0.2], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    np.testing.assert_allclose(shares, expected, atol=1e-12)


def test_resampled_means() -> None:
    values = np.stack([np.arange(8.0), np.ones(8)], axis=1)
    means = resampled(values, num_resamples=500)
    assert means.shape == (501, 2)
    np.testing.assert_allclose(means[0], [3.5, 1.0])
    np.testing.assert_allclose(means[:, 1], 1.0)
    # The mean of eight draws: standard deviation sqrt(63 / 12 / 8) = 0.81.
    assert means[1:, 0].std() == pytest.approx(0.81, abs=0.08)


N = 4
SPEC = load_preset("topk")


def point(kind: str, quality: float, kl: float, energy_uj: float, seed: int = 0) -> CurvePoint:
    """Four examples that are all alike: half of the costs are attention's, a quarter of the time follows the bandwidth."""

    def alike(value: float) -> np.ndarray:
        return np.full(N, value)

    def priced(slower: float) -> Priced:
        costs: Any = {
            scope: {
                "energy": alike(share * energy_uj * 1e6),
                "latency": alike(share * slower * energy_uj),
            }
            for scope, share in (("attention", 0.5), ("end_to_end", 1.0))
        }
        return Priced(
            costs=costs,
            bandwidth_cycles={"end_to_end": alike(0.25 * slower * energy_uj)},
            moved_bytes={"end_to_end": alike(100.0 * energy_uj)},
        )

    measured = Measurement(
        quality_name="accuracy",
        quality=alike(quality),
        kl_nats=alike(kl),
        costs={},
        kept=np.full((1, 1), 0.5),
        macs={"attention": alike(30.0), "end_to_end": alike(30.0 + energy_uj)},
        operations={"qk.mac": 10.0 * energy_uj, "pv.mac": 20.0},
        machines={COMMON: priced(1.0), OWN: priced(3.0)},
    )
    return CurvePoint(kind, seed, None, {}, measured)


def test_rows_by_hand() -> None:
    points = [
        *(point("dense", 0.9, 0.0, 10.0, seed) for seed in (0, 1)),
        point("trained", 0.9, 0.01, 4.0, 0),
        point("trained", 0.88, 0.03, 6.0, 1),
        *(point("uniform", 0.5, 1.0, 5.0, seed) for seed in (0, 1)),
    ]
    machines = {COMMON: common_frame(SPEC), OWN: SPEC}
    rows = comparison_rows(points, "topk", machines, loss=0.01, kl_nats=0.02, num_resamples=20)
    assert len(rows) == 2 * (1 + 2 * 2)
    found = {(row["frame"], row["setting"], row["at"]): row for row in rows}
    trained = found[COMMON, "trained", "quality"]
    # Seed 0 as it is; of seed 1 half the examples dense.
    assert trained["energy_end_to_end"] == pytest.approx((4.0 + 8.0) / 2)
    assert trained["energy"] == pytest.approx((4.0 + 8.0) / 4)
    assert trained["quality"] == pytest.approx((0.9 + 0.89) / 2) and trained["seeds"] == 2
    assert trained["spread"]["energy_end_to_end"] == pytest.approx(2.0**0.5 * 2.0)
    assert trained["latency_end_to_end"] == pytest.approx(6.0 / 1e3)
    assert trained["interval"]["energy_end_to_end"] == pytest.approx([6.0, 6.0])
    assert trained["bytes"] == pytest.approx(600.0)
    assert trained["bandwidth_share"] == pytest.approx(0.25) and trained["binds"] == "area"
    assert trained["operations"] == pytest.approx({"qk": 60.0, "pv": 20.0, "host": 6.0})
    assert found[OWN, "trained", "quality"]["latency_end_to_end"] == pytest.approx(18.0 / 1e3)
    at_kl = found[COMMON, "trained", "kl"]
    assert at_kl["kl"] == pytest.approx((0.01 + 0.02) / 2)
    # Two and a half percent of the examples may run a policy that loses 0.4.
    uniform = found[COMMON, "uniform", "quality"]
    assert uniform["energy_end_to_end"] == pytest.approx(10.0 - 5.0 * 0.01 / 0.4)
    assert found[COMMON, "dense", "dense"]["energy"] == pytest.approx(5.0)


def test_intervals_over_examples() -> None:
    """A point that errs on one of four examples: in a resample without it the point is free to take, else a mixture."""
    dense, trained = point("dense", 1.0, 0.0, 10.0), point("trained", 1.0, 0.0, 4.0)
    trained.measurement.quality[0] = 0.0
    rows = comparison_rows(
        [dense, trained], "topk", {COMMON: SPEC}, loss=0.1, kl_nats=0.02, num_resamples=200
    )
    row = next(row for row in rows if row["at"] == "quality")
    assert row["energy_end_to_end"] == pytest.approx(10.0 - 6.0 * 0.1 / 0.25)
    low, high = row["interval"]["energy_end_to_end"]
    assert low == pytest.approx(4.0) and high == pytest.approx(10.0 - 6.0 * 0.1 / 0.75)


def test_costs_of_points_that_lose_less_than_they_may_are_bounds() -> None:
    def point(kind: str, quality: float, kl: float, energy: float) -> dict[str, Any]:
        costs = {"energy_pj": energy}
        return {"kind": kind, "seed": 0, "quality": quality, "kl_nats": kl, "end_to_end": costs}

    points = [point("dense", 0.9, 0.0, 9.0), point("trained", 0.8, 0.5, 5.0)]
    points.append(point("trained", 0.895, 0.03, 4.0))
    rows = [{"setting": "dense", "at": "dense"}]
    rows += [{"setting": "trained", "at": at} for at in ("quality", "kl")]
    record = {"quality_name": "accuracy", "points": points}
    found = with_bounds(rows, record, loss=None, kl_nats=0.02)
    assert [row["is_bound"] for row in found] == [False, True, False]
    assert with_bounds(rows, record, loss=0.001, kl_nats=0.05)[1:] == [
        rows[1] | {"is_bound": False},
        rows[2] | {"is_bound": True},
    ]


def test_equal_multipliers() -> None:
    """SOFA has 128 x 4 and 128 x 4, of which a host leaves 5.178 / 5.69; AccelTran Edge 64 x 16 x 16."""
    edge = load_preset("acceltran-edge")
    assert multipliers(load_preset("sofa")) == 1024.0 and multipliers(edge) == 16384.0
    equal = equal_multipliers(edge)
    wanted = 1024.0 * 5.1785 / 5.69
    assert multipliers(equal) == pytest.approx(wanted, rel=1e-3)
    assert multipliers(common_frame(edge)) < wanted / 2.0
    assert equal.area.rest is not None
    assert equal.area.rest.base == pytest.approx(216.3 * wanted / 16384.0, rel=2e-3)
    assert set(machines_of(replace(digits(), mechanism="acceltran"), "acceltran-edge")) == {
        *(COMMON, EQUAL_MULTIPLIERS, OWN)
    }


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mechanisms", "dense"], "`dense` cannot be compared"),
        (["--budgets", "0.3", "0.5"], "falling"),
        (["--kl", "0"], "kl"),
        (["--loss", "-1"], "loss"),
        (["--budgets", "0.001"], "cannot be reached"),
    ],
)
def test_bad_settings_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compare", "digits", "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


# .ci/run compares two mechanisms on digits.
@pytest.mark.slow
def test_a_comparison_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one mechanism and two uniform settings; `.ci/run` compares two on digits from the command line."""
    out = tmp_path / "out"
    settings = CurveSettings(
        budgets=(0.7, 0.01),
        uniform_bits=((8, 8, 16), (4, 4, 8)),
        uniform_thresholds=((0.5,),),
        num_selection=8,
        num_resamples=10,
    )
    lines: list[str] = []
    # Else the programs of ten mechanisms fill the memory map of the process.
    monkeypatch.setattr(compare, "forget_programs", lambda: lines.append("forgotten"))
    run: dict[str, Any] = {
        "names": ["topk"],
        "seeds": (0,),
        "part": "validation",
        "loss": None,
        "kl_nats": 0.5,
        "cache": tmp_path / "dense",
        "progress": False,
        "report": lines.append,
        "overwrite": False,
    }
    path = run_comparison(tiny(), settings, out, resume=False, **run)
    assert lines[0] == "topk on preset topk; no legal policy reaches 0.01"
    assert lines[-1] == "forgotten" and lines.count("forgotten") == 1
    assert path == out / "comparison.json" and (out / "comparison.png").stat().st_size > 0
    rows = json.loads(path.read_text())
    kinds = {(row["setting"], row["at"], row["frame"]) for row in rows}
    for kind in ("trained", "uniform_tuned"):
        assert {(kind, at, frame) for at in ("quality", "kl") for frame in (COMMON, OWN)} <= kinds
    dense = {row["frame"]: row for row in rows if row["setting"] == "dense"}
    wanted = {"quality", "kl", "kept", "latency", "latency_end_to_end", "seeds", "spread"}
    wanted |= {"interval", "bytes", "binds", "bandwidth_share", "operations"}
    for row in rows:
        assert wanted <= row.keys() and row["energy"] < row["energy_end_to_end"]
        assert row["energy_end_to_end"] <= dense[row["frame"]]["energy_end_to_end"]
        assert row["at"] != "kl" or row["kl"] <= 0.5 + 1e-6
        assert 0.0 <= row["bandwidth_share"] <= 1.0 and row["operations"]["host"] > 0.0
        low, high = row["interval"]["energy_end_to_end"]
        assert low <= high <= dense[row["frame"]]["interval"]["energy_end_to_end"][1] + 1e-9
    # Fitted to nothing and at 28 nm already, the machine costs in its own frame what the area changes.
    assert dense[COMMON]["quality"] == dense[OWN]["quality"]
    assert dense[COMMON]["latency"] < dense[OWN]["latency"]
    with pytest.raises(CodesignError, match="exists"):
        run_comparison(tiny(), settings, out, resume=False, **run)
    _check_joined(out, rows, tmp_path / "results")


def _check_joined(out: Path, rows: list[dict[str, Any]], results: Path) -> None:
    """A comparison that is joined with an older one replaces its mechanism's rows and keeps the others."""
    (results / "curves").mkdir(parents=True)
    other = [dict(row, mechanism="spatten") for row in rows[:2]]
    older = [dict(row, quality=0.0) for row in rows]
    (results / "digits-comparison.json").write_text(json.dumps(other + older))
    join = runpy.run_path(str(DOCS / "join_comparisons.py"))["join"]
    join.__globals__["RESULTS"] = results
    join("digits", [out])
    assert json.loads((results / "digits-comparison.json").read_text()) == rows + other
    curves = json.loads((results / "curves" / "digits-comparison.json").read_text())
    assert list(curves) == ["topk"] and str(out) not in json.dumps(curves)
    assert (results / "digits-comparison.png").stat().st_size > 0
    settings = json.loads((out / "config.json").read_text())
    other_part = results / "other"
    other_part.mkdir()
    (other_part / "config.json").write_text(json.dumps(settings | {"loss": 0.5}))
    with pytest.raises(SystemExit, match="other settings"):
        join("digits", [out, other_part])
