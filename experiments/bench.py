"""The benchmarks by name, and their table.

A figure and its baseline are timed by turns in the same run, after one untimed call of each; both are medians. What each
one is: docs/performance.md.
"""

from collections.abc import Callable, Sequence

from codesign.errors import UnknownNameError
from codesign.experiments.bench_cost import bench_cost
from codesign.experiments.bench_dense import bench_dense
from codesign.experiments.bench_deployed import bench_hard_path, bench_simulator
from codesign.experiments.bench_mapper import bench_mapper
from codesign.experiments.bench_peers import bench_optuna, bench_qwix
from codesign.experiments.bench_sizes import FULL, QUICK, BenchSizes
from codesign.experiments.bench_steps import (
    bench_compile,
    bench_minilm_long,
    bench_minilm_short,
    bench_parts,
    bench_training,
)
from codesign.experiments.bench_tools import bench_tools
from codesign.experiments.timing import Record, device

BENCHMARKS: dict[str, Callable[[BenchSizes], list[Record]]] = {
    "cost": bench_cost,
    "mapper": bench_mapper,
    "training": bench_training,
    "parts": bench_parts,
    "minilm_8x128": bench_minilm_short,
    "minilm_2x512": bench_minilm_long,
    "hard_path": bench_hard_path,
    "compile": bench_compile,
    "simulator": bench_simulator,
    "qwix": bench_qwix,
    "optuna": bench_optuna,
    "tools": bench_tools,
    "dense": bench_dense,
}
DEFAULT_NAMES = tuple(name for name in BENCHMARKS if name != "parts")
"""All but `parts`, which only explains `training`."""
QUICK_NAMES = ("cost", "hard_path", "simulator")
"""Those that need no training step, whose compilation takes most of a minute."""
SECONDS = {
    "cost": 30.0,
    "mapper": 75.0,
    "training": 45.0,
    "parts": 60.0,
    "minilm_8x128": 110.0,
    "minilm_2x512": 130.0,
    "hard_path": 15.0,
    "compile": 60.0,
    "simulator": 15.0,
    "qwix": 60.0,
    "optuna": 40.0,
    "tools": 15.0,
    "dense": 40.0,
}
"""Wall time of each on two CPU cores, compilation included: rounded estimates, s, for people who plan."""


def chosen(names: Sequence[str] | None, *, quick: bool) -> Sequence[str]:
    """Returns the benchmarks to run: `names`, or else the default ones.

    Raises:
      UnknownNameError: If a benchmark does not exist.
    """
    if names is None:
        return QUICK_NAMES if quick else DEFAULT_NAMES
    for name in names:
        if name not in BENCHMARKS:
            raise UnknownNameError(
                f"benchmark `{name}` does not exist: choose from {', '.join(BENCHMARKS)}"
            )
    return names


def bench_seconds(*, names: Sequence[str] | None = None, quick: bool = False) -> float:
    """Returns the expected time of `run_bench`, s, at most."""
    return sum(SECONDS[name] for name in chosen(names, quick=quick))


def run_bench(*, names: Sequence[str] | None = None, quick: bool = False) -> list[Record]:
    """Runs benchmarks.

    Args:
      names: Keys of `BENCHMARKS`; by default `DEFAULT_NAMES`, or `QUICK_NAMES` if `quick`.
      quick: Fewer repeats and points.

    Returns:
      Records `{name, value, unit, baseline, ratio, device}`; `baseline` is `{name, value}` in the same unit, `ratio`
      the value over it.

    Raises:
      UnknownNameError: If a benchmark does not exist.
    """
    sizes = QUICK if quick else FULL
    where = device()
    return [
        record | {"device": where}
        for name in chosen(names, quick=quick)
        for record in BENCHMARKS[name](sizes)
    ]


def bench_table(records: Sequence[Record]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Returns title, columns and rows of records, as `codesign.experiments.tables.print_table` takes them."""
    rows: list[tuple[str, ...]] = [
        (
            str(record["name"]),
            _number(record["value"]),
            _number(record["baseline"]["value"]),
            str(record["unit"]),
            f"{record['ratio']:.2f}" if record["ratio"] < 100.0 else _number(record["ratio"]),
            str(record["baseline"]["name"]),
        )
        for record in records
    ]
    where = records[0]["device"] if records else device()
    title = f"{where['name']}, {where['num_cores']} cores, load {where['load']:.1f} before"
    return title, ("benchmark", "value", "baseline", "unit", "ratio", "baseline is"), rows


def _number(value: float) -> str:
    """Returns three digits or more: whole numbers from 100 on, with thousands set off."""
    return f"{value:,.0f}" if value >= 100.0 else f"{value:.3g}"
