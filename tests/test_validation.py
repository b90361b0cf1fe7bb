"""`codesign validate`: excerpts of reference results from start to end, exit statuses, faults; all files where present."""

import csv
import gzip
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codesign.experiments import validation
from codesign.experiments.cli import main
from codesign.experiments.reference_tables import ValidationRow, largest_relative, read_table

GOLDEN = Path(__file__).resolve().parent / "golden"
PRODUCTS = "dense_gemm_tools.csv"
RUNS = "acceltran_runs.csv"
TRANSCODE = ("transcode_accelerators.csv", "transcode_models.json.gz")
SHORT = {
    "scale_sim": "scalesim",
    "weight_stationary": "ws",
    "output_stationary": "os",
    "input_stationary": "is",
}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def product_rows() -> list[dict[str, Any]]:
    """The golden products as the file has them: one row for each, a column for each tool; some cells empty."""
    rows: dict[str, dict[str, Any]] = {}
    for one in json.loads((GOLDEN / "dense_gemm.json").read_text())["rows"]:
        sizes, side = one["sizes"], one["side"]
        name = "x".join(map(str, sizes))
        row = rows.setdefault(name, {"name": name, "array": f"{side}x{side}"})
        row.update(zip("MNK", sizes, strict=True))
        prefix = f"{SHORT.get(one['tool'], one['tool'])}_{SHORT[one['dataflow']]}"
        row[f"{prefix}_cycles"] = one["cycles"]
        if one["tool"] == "scale_sim":
            row[f"{prefix}_source"] = "sim"
        else:
            row[f"{prefix}_energy_pJ"] = one["energy_pj"]
    return list(rows.values())


@pytest.fixture
def only_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what needs no file, which takes seconds."""
    monkeypatch.setattr(validation, "BUILT_IN", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of excerpts under the published names."""
    write_csv(tmp_path / PRODUCTS, product_rows())
    excerpts = json.loads((GOLDEN / "acceltran_rows.json").read_text())
    del excerpts["provenance"]
    for name, rows in excerpts.items():
        write_csv(tmp_path / name, rows)
    published = json.loads((GOLDEN / "transcode_rows.json").read_text())["rows"]
    names = [f"row{index}" for index in range(len(published))]
    rows = [{"id": name, **row["machine"]} for name, row in zip(names, published, strict=True)]
    write_csv(tmp_path / TRANSCODE[0], rows)
    models = {
        name: {"model_dict": row["model"]} for name, row in zip(names, published, strict=True)
    }
    (tmp_path / TRANSCODE[1]).write_bytes(gzip.compress(json.dumps(models).encode()))
    return tmp_path


def answer(
    capsys: pytest.CaptureFixture[str], folder: Path, status: int = 0
) -> list[dict[str, Any]]:
    assert main(["validate", "--data", str(folder), "--json"]) == status
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    assert main(["validate", "--data", str(folder)]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    return line


def only(folder: Path, name: str, copy: Path) -> Path:
    """A copy of one comparison's files."""
    copy.mkdir()
    for own in TRANSCODE if name in TRANSCODE else (name,):
        shutil.copy(folder / own, copy)
    return copy


def change(path: Path, column: str, value: str, *, row: int = 0) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[row][column] = value
    write_csv(path, rows)


@pytest.mark.smoke
def test_excerpts_are_within_their_limits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, folder)
    for row in rows:
        assert list(row) == ["reference", "metric", "value", "unit", "limit", "rows"]
        assert isinstance(row["value"], float) and isinstance(row["rows"], int) and row["rows"] > 0
        assert row["limit"] is None or row["value"] <= row["limit"]
    of = {(row["reference"], row["metric"]): row for row in rows}
    simulated = of["SCALE-Sim 3.0.0, input stationary, simulated", "cycles, largest difference"]
    assert simulated["value"] == 0.0 and simulated["rows"] == 4
    assert of["ZigZag 3.9.1, output stationary", "cycles, largest error"]["value"] == 0.0
    assert of["AccelForge 1.0.467, weight stationary", "energy, largest error"]["value"] < 1e-4
    # The run in the mode `cycle` is no row of the closed form.
    assert of["AccelTran's closed form, runs", "cycles, largest difference"]["rows"] == 2
    simulated = of["AccelTran's simulator, cycle by cycle", "cycles, largest error"]
    assert simulated["value"] == 0.0 and simulated["rows"] == 1
    assert of["TransCODE", "12 energies, largest relative error"]["rows"] == 3
    assert of["AccelTran's loop orders, figure", "dynamic energy, largest error"]["value"] < 0.1


def test_table_tells_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / TRANSCODE[1]).unlink()
    (folder / "acceltran_fig_baselines_normalized.csv").write_text("group\n")
    monkeypatch.setenv("CODESIGN_VALIDATION", str(folder))
    assert main(["validate"]) == 0
    printed = capsys.readouterr().out
    assert "MISSED" not in printed.partition("\n")[2]
    assert f"{TRANSCODE[0]}: not present" in printed
    assert "acceltran_fig_breakdowns.csv: not present" in printed
    assert "acceltran_fig_baselines_normalized.csv: not compared: processors" in printed
    assert not any(row["reference"] == "TransCODE" for row in answer(capsys, folder))


@pytest.mark.usefixtures("only_files")
@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        (PRODUCTS, "scalesim_ws_cycles", "630"),
        (PRODUCTS, "accelforge_ws_energy_pJ", "486000"),
        (PRODUCTS, "zigzag_os_cycles", "290"),
        (RUNS, "cycles", "167597.0"),
        (RUNS, "E_fast_others", "212901.08"),
        (TRANSCODE[0], "area_mm2", "2148.94394"),
        ("acceltran_dataflow_runs.csv", "reuse", "881"),
    ],
)
def test_a_figure_beyond_its_limit_ends_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, column: str, value: str
) -> None:
    copy = only(folder, name, folder / "copy")
    change(copy / name, column, value)
    limited = [row for row in answer(capsys, copy, 1) if row["limit"] is not None]
    assert sum(row["value"] > row["limit"] for row in limited) == 1
    assert main(["validate", "--data", str(copy)]) == 1
    assert capsys.readouterr().out.count("MISSED") == 2  # in the title, and once


@pytest.mark.usefixtures("only_files")
def test_runs_cycle_by_cycle_have_limits_and_settings(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(column: str, value: str) -> Path:
        copy = only(folder, RUNS, folder / column)
        change(copy / RUNS, column, value, row=1)
        return copy

    for column, value in (("cycles", "75000.0"), ("E_total_nJ", "1600000.0")):
        rows = answer(capsys, changed(column, value), 1)
        (missed,) = (
            row for row in rows if row["limit"] is not None and row["value"] > row["limit"]
        )
        assert missed["limit"] == 5.0 and missed["unit"] == "%"
    for column, value, words in (
        ("mem_mode", "mb", "one of lb, hb"),
        ("non_linearity", "tanh", "gelu or relu"),
        ("model", "bert_giant", "with or without _1layer"),
        ("wgt_buf_MB", "4", "line 3: `embedding` of 4,904,000 bytes does not fit"),
    ):
        assert words in refusal(capsys, changed(column, value))
    copy = changed("simulator_mode", "slow")
    for row in (0, 2):
        change(copy / RUNS, "simulator_mode", "slow", row=row)
    assert "no run in the modes `fast` and `cycle`" in refusal(capsys, copy)


@pytest.mark.usefixtures("only_files")
def test_faulty_files_are_named(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, content: bytes | None = None, **cell: str) -> str:
        copy = only(folder, name, tmp_path_factory.mktemp("broken") / "data")
        if content is not None:
            (copy / name).write_bytes(content)
        for column, value in cell.items():
            change(copy / name, column, value)
        return refusal(capsys, copy)

    assert "is no folder: name that of the reference" in refusal(capsys, folder / "nowhere")
    (folder / "empty").mkdir()
    assert "holds none of the files dense_gemm_tools.csv" in refusal(capsys, folder / "empty")
    line = broken(PRODUCTS, b"name,M,N,K\n")
    assert PRODUCTS in line and "lacks the column `array`" in line
    line = broken(PRODUCTS, b"M,N,K,array\n64,64,64,32x32\n")
    assert "lacks the columns `scalesim_ws_cycles`, `scalesim_ws_source`" in line
    loops = "acceltran_dataflow_runs.csv"
    heading = (folder / loops).read_bytes().partition(b"\n")[0]
    assert "has no rows" in broken(loops, heading)
    assert "cannot be read" in broken(PRODUCTS, b"\xff\xfe")
    assert "cannot be read" in broken(TRANSCODE[1], b"no gzip")
    assert "is not JSON" in broken(TRANSCODE[1], gzip.compress(b"{"))
    assert "as many cells as columns" in broken(RUNS, (folder / RUNS).read_bytes() + b"1,2\r\n")
    assert "line 2: column `M` must be a whole number from 1 on" in broken(PRODUCTS, M="-4")
    assert "column `array` must be a square such as 16x16" in broken(PRODUCTS, array="16x8")
    assert "column `zigzag_ws_cycles` must be a number" in broken(PRODUCTS, zigzag_ws_cycles="?")
    assert "column `model` must be one of bert_nano" in broken(RUNS, model="bert_giant")
    assert "column `cycles` must be a number, got ''" in broken(RUNS, cycles="")
    assert "column `id` must be the name of a model" in broken(TRANSCODE[0], id="row9")
    assert "column `loop_order` must be" in broken(loops, loop_order="bij")
    assert "no folder is named" in no_folder(capsys)


def no_folder(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CODESIGN_VALIDATION", raising=False)
        assert main(["validate"]) == 2
    return capsys.readouterr().err


def test_a_comparison_is_one_line_of_the_registry(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(reference: str, count: int) -> list[ValidationRow]:
        return [
            ValidationRow(
                reference=reference, metric="m", value=0.5, unit="1", limit=None, rows=count
            )
        ]

    monkeypatch.setattr(
        validation,
        "COMPARISONS",
        {"own.csv": lambda path: row("own", len(read_table(path, ("a",))))},
    )
    monkeypatch.setattr(validation, "BUILT_IN", {"printed": lambda: row("printed", 1)})
    (folder / "own.csv").write_text("a\n1\n2\n")
    assert [(one["reference"], one["rows"]) for one in answer(capsys, folder)] == [
        ("printed", 1),
        ("own", 2),
    ]
    # Published numbers need no folder.
    monkeypatch.delenv("CODESIGN_VALIDATION", raising=False)
    assert main(["validate"]) == 0
    assert "own.csv: not present" in capsys.readouterr().out


@pytest.mark.usefixtures("only_files")
def test_a_study_of_simulators_has_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CODESIGN_VALIDATION", raising=False)
    record = {"task": "digits", "machine": "sofa", "scope": "end_to_end", "metric": "latency"}
    record |= {"num_points": 200, "mean_error": 0.013, "tau": 0.98, "least_tau": 0.93}
    study = tmp_path / "study.json"
    study.write_text(json.dumps([record]))
    assert main(["validate", "--agreement", str(study), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    own = [row for row in rows if row["reference"] == "Simulator, sofa on digits, end to end"]
    assert [(row["metric"], row["value"] <= row["limit"], row["rows"]) for row in own] == [
        ("latency, mean error", True, 200),
        ("latency, 1 - Kendall's tau", True, 200),
        ("latency, 1 - tau, most at one size", False, 200),
    ]
    assert own[0]["value"] == pytest.approx(1.3) and own[0]["unit"] == "%"
    del record["tau"]
    for text, words in (
        (json.dumps([record]), "record 0, lacks `tau`"),
        ("[]", "no list of records"),
        ("{", "is no JSON"),
    ):
        study.write_text(text)
        assert main(["validate", "--agreement", str(study)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line and "study.json" in line
    study.unlink()
    assert main(["validate", "--agreement", str(study)]) == 2
    assert "is not there" in capsys.readouterr().err


def test_trends_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(
        tmp_path / "acceltran_fig_net_sparsity_vs_accuracy.csv",
        [
            {"task": "a", "series": "s", "tau": tau, "net_sparsity_pct": sparsity}
            for tau, sparsity in ((0.2, 40), (0.1, 30), (0.3, 35))
        ],
    )
    write_csv(
        tmp_path / "acceltran_fig_netsparsity_vs_throughput_energy_berttiny_edge.csv",
        [
            {"net_sparsity_pct": 30, "norm_throughput": 1.0, "norm_energy": 1.0},
            {"net_sparsity_pct": 50, "norm_throughput": 1.5, "norm_energy": 0.8},
        ],
    )
    # The shares of the area of Edge: 9.645 of 50.196 mm2, ...
    write_csv(
        tmp_path / "acceltran_fig_breakdowns.csv",
        [
            {"figure": "pie_charts area", "component": name, "percent": percent}
            for name, percent in (("MAC lanes", 19.21), ("Softmax", 44.66), ("Sparsity", 16.09))
        ],
    )
    built_in = {row.reference for make in validation.BUILT_IN.values() for row in make()}
    rows = [row for row in answer(capsys, tmp_path) if row["reference"] not in built_in]
    assert rows and all(row["limit"] is None for row in rows)
    values = {row["metric"]: row["value"] for row in rows}
    assert values["steps of 2 against it"] == 1.0
    assert values["throughput gained, published"] == pytest.approx(50.0)
    assert values["energy saved, published"] == pytest.approx(20.0)
    assert values["throughput gained, ours"] > 0 and values["energy saved, ours"] > 0
    assert values["share, largest difference"] == pytest.approx(1.0, abs=0.01)


def test_print_hides_what_its_decimals_do() -> None:
    found, shown = np.array([2.3451, 10.0]), np.array([2.35, 10.0])
    assert largest_relative(found, shown, 0.005) == 0.0
    assert largest_relative(found, shown) == pytest.approx(0.0049 / 2.35)
    assert largest_relative(np.array([2.0]), np.array([0.0])) == 2.0


@pytest.mark.slow
def test_all_reference_results(capsys: pytest.CaptureFixture[str]) -> None:
    folder = os.environ.get("CODESIGN_VALIDATION")
    if not folder:
        pytest.skip("set CODESIGN_VALIDATION to the folder of reference results")
    rows = answer(capsys, Path(folder))
    assert {row["reference"] for row in rows}
