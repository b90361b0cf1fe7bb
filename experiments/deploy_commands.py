"""Commands that deploy a run and check what was deployed."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from codesign.errors import CodesignError
from codesign.experiments.commands import Json
from codesign.experiments.data import Part
from codesign.experiments.evaluate import deployment
from codesign.experiments.exporting import (
    compare_on_fresh_data,
    differing_array,
    write_run_export,
)
from codesign.experiments.figure import draw_timeline
from codesign.experiments.finished import load_run
from codesign.experiments.simulated import compare_with_simulator
from codesign.experiments.tables import print_json, print_table
from codesign.hw.export import ReplayReport, read_export, replay
from codesign.hw.surrogate import SCOPES
from codesign.hw.timeline import Watched


def export(
    run: tyro.conf.Positional[Path],
    *,
    out: Path,
    num_golden: int = 8,
    cache: Path | None = None,
) -> int:
    """Writes the hardware configuration, integer weights and golden vectors of a run (docs/export.md).

    Golden vectors are every integer tensor of the JAX path on the first validation images.

    Example: `codesign export runs/half --out runs/half-export`

    Args:
      run: Run directory, or a directory in `points` of a curve.
      out: Directory to make; its parent must exist.
      num_golden: Images in the golden vectors, 1 to 32.
      cache: Folder of the dense models; default: `dense` beside the run.
    """
    if out.exists():
        raise CodesignError(f"'{out}' exists: choose another directory for the export")
    finished = load_run(run, cache=cache, progress=True)
    config = write_run_export(finished, out, num_golden=num_golden)
    expected = config.expected
    print(
        f"{out}: {expected.quality_name} {expected.quality:.4f} on the {expected.part} part, "
        f"{expected.end_to_end.energy_pj / 1e6:.3f} µJ and {expected.end_to_end.latency_cycles:,.0f} cycles "
        "per example, end to end"
    )
    return 0


def verify(
    path: tyro.conf.Positional[Path],
    *,
    run: Path | None = None,
    part: Part = "validation",
    num_examples: int = 64,
    cache: Path | None = None,
    as_json: Json = False,
) -> int:
    """Replays an export's golden vectors in the NumPy emulator; with `--run` also compares on fresh data.

    Every integer of every tensor must agree; exits with 1 at a difference and names the first one.

    Example: `codesign verify runs/half-export --run runs/half`

    Args:
      path: Directory of the export.
      run: The run it was made from, whose JAX integer path the emulator is compared with.
      part: Part of the data with the fresh images; those in the golden vectors are left out.
      num_examples: Fresh images, >= 1.
      cache: Folder of the dense models; default: `dense` beside the run.
      as_json: Print JSON only.
    """
    record = verification(
        path,
        run=run,
        part=part,
        num_examples=num_examples,
        cache=cache,
        progress=not as_json,
    )
    if as_json:
        print_json(record)
    else:
        print_verification(record)
    return 0 if record["is_exact"] else 1


def verification(
    path: Path,
    *,
    run: Path | None,
    part: Part,
    num_examples: int,
    cache: Path | None,
    progress: bool,
) -> dict[str, Any]:
    """Returns what `codesign verify` found, of types that JSON can hold."""
    golden = replay(path)
    record: dict[str, Any] = {
        "golden": _report(golden),
        "fresh": None,
        "is_exact": golden.is_exact,
    }
    if run is None:
        return record
    finished = load_run(run, cache=cache, progress=progress)
    exported = read_export(path)
    name = differing_array(exported, deployment(finished.problem, finished.point))
    if name is not None:
        return record | {
            "is_exact": False,
            "fresh": {"difference": f"`{name}` of the export is not that of run '{run}'"},
        }
    fresh = compare_on_fresh_data(exported, finished, part, num_examples)
    return record | {
        "fresh": {"part": part, **_report(fresh)},
        "is_exact": golden.is_exact and fresh.is_exact,
    }


def check_new_png(path: Path) -> None:
    """Does nothing if a PNG can be made there.

    Raises:
      CodesignError: If it has another suffix, is there, or has no folder.
    """
    if path.suffix != ".png":
        raise CodesignError(f"'{path}' must end in `.png`: rename it")
    if path.exists():
        raise CodesignError(f"'{path}' exists: choose another file for the figure")
    if not path.parent.is_dir():
        raise CodesignError(f"'{path.parent}' does not exist: make the folder of the figure")


def _report(found: ReplayReport) -> dict[str, Any]:
    difference = None if found.difference is None else str(found.difference)
    return dataclasses.asdict(found) | {"difference": difference}


def print_verification(record: dict[str, Any]) -> None:
    """Prints what `verification` returns."""
    for name, label in (("golden", "golden vectors"), ("fresh", "fresh data")):
        found = record[name]
        if found is None:
            print(f"{label}: not compared; give the run with `--run`")
        elif found["difference"] is not None:
            print(f"{label}: DIFFERENT: {found['difference']}")
        else:
            print(
                f"{label}: {found['num_values']:,} integers of {found['num_examples']} examples agree, "
                f"{found['num_decisions']:,} keep decisions among them"
            )


def simulate_run(
    run: tyro.conf.Positional[Path],
    *,
    part: Part = "validation",
    num_examples: int = 32,
    timeline: Path | None = None,
    timeline_layer: int = 0,
    timeline_example: int = 0,
    cache: Path | None = None,
    as_json: Json = False,
) -> int:
    """Runs the masks of a run through the simulator and sets the cost model beside it.

    Exits with 1 if a count of operations differs in any example or layer.

    Example: `codesign simulate runs/half --num-examples 64 --timeline layer0.png`

    Args:
      run: Run directory, or a directory in `points` of a curve.
      part: Part of the data.
      num_examples: Images, the first ones of the part, >= 1.
      timeline: PNG to make, where none is: what units, main memory and host do in one layer of one example, cycle by cycle.
      timeline_layer: Which layer, from 0.
      timeline_example: Which of the `num_examples`, from 0.
      cache: Folder of the dense models; default: `dense` beside the run.
      as_json: Print JSON only, with the spans of the timeline if one is drawn.
    """
    watched = None
    if timeline is None and (timeline_layer or timeline_example):
        raise CodesignError(
            "`--timeline-layer` and `--timeline-example` choose what `--timeline` draws: add it, or leave them out"
        )
    if timeline is not None:
        check_new_png(timeline)
        watched = Watched(layer=timeline_layer, example=timeline_example)
    finished = load_run(run, cache=cache, progress=not as_json)
    record = compare_with_simulator(finished, part, num_examples, watched)
    if timeline is not None:
        draw_timeline(record["timeline"], timeline)
    if as_json:
        print_json(record)
        return 0 if record["counts_equal"] else 1
    rows = [
        (
            f"{scope.replace('_', ' ')}, {name}",
            f"{one['cost_model']:,.1f}",
            f"{one['simulator']:,.1f}",
            f"{100.0 * one['largest_relative_error']:.3f} %",
        )
        for scope in SCOPES
        for name, one in record[scope].items()
    ]
    print_table(
        f"{part} part, mean of {record['num_examples']} examples",
        ("cost", "cost model", "simulator", "largest error"),
        rows,
    )
    if record["counts_equal"]:
        print("all counts of operations agree")
    else:
        print(f"counts of `{record['first_differing_count']}` DIFFER")
    if timeline is not None:
        print(timeline)
    return 0 if record["counts_equal"] else 1
