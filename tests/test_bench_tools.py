"""Other tools' layers per second: timed where the tool runs, else quoted with a line that says so."""

from pathlib import Path

import pytest

from codesign.experiments import bench, bench_sizes, bench_tools, peer_tools
from codesign.hw.tool_models import TOOLS

TINY = bench_sizes.BenchSizes(repeats=1)


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tools, "LAYER", ((8, 8, 8), (8, 16, 8)))
    monkeypatch.setattr(bench_tools, "SMALL", ((8, 8, 8),))


def test_tools_that_are_not_there_are_quoted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"no {name}")

    monkeypatch.setattr(peer_tools, "tool_module", absent)
    records = bench_tools.bench_tools(TINY)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(TOOLS) and all("its figure is quoted" in line for line in lines)
    for record, tool in zip(records, TOOLS, strict=True):
        assert record["baseline"]["name"] == f"{TOOLS[tool].name}, quoted"
        assert record["baseline"]["value"] == bench_tools.QUOTED_PER_S[tool]
        assert record["value"] > 0
    assert bench.BENCHMARKS["tools"] is bench_tools.bench_tools


def test_tools_that_run_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def cost(sizes: tuple[int, int, int], side: int, *rest: object) -> tuple[float, float]:
        asked.append((sizes, side, isinstance(rest[-1], Path)))
        return 1.0, 1.0

    for name in ("zigzag_cost", "accelforge_cost", "scale_sim_cycles"):
        monkeypatch.setattr(peer_tools, name, cost)
    records = bench_tools.bench_tools(TINY)
    assert not capsys.readouterr().err
    assert {record["baseline"]["name"] for record in records} == {
        model.name for model in TOOLS.values()
    }
    # Once untimed and once timed, each of the products.
    assert len(asked) == 2 * (1 + 2 + 2)
    assert all(side == 32 and has_folder for _, side, has_folder in asked)
