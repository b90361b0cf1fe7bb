"""Dense layers per second in our model with a tool's switches, beside the tool itself.

A tool that is not installed, or does not run, is not timed: its figure is quoted, and its name in the record says so. None
of the packages is an extra of this project: AccelForge wants Python 3.12, SCALE-Sim NumPy below 2.3.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from codesign.experiments import peer_tools
from codesign.experiments.bench_sizes import BenchSizes
from codesign.experiments.peer_tools import Sizes
from codesign.experiments.timing import Record, interleaved_seconds, make_record
from codesign.hw.tool_models import TOOLS, gemm_cost

LAYER: tuple[Sizes, ...] = (
    (128, 768, 768),
    (128, 128, 64),
    (128, 64, 128),
    (128, 3072, 768),
    (128, 768, 3072),
)
"""The different products of a layer of BERT-Base at 128 tokens: projections, scores, values, and both of the dense part."""
SMALL: tuple[Sizes, ...] = ((128, 128, 64),)
"""What SCALE-Sim can be asked: its time grows with the multiplications."""
SIDE = 32
QUOTED_PER_S = {"zigzag": 0.15, "accelforge": 2.0, "scale_sim": 8.7}
"""Ours: measured with the functions below, CPU time of one thread of a two-core x86-64 machine, second call; per second
layers of `LAYER` (ZigZag with six factors) and, of SCALE-Sim, products of `SMALL`."""
MODULES = {"zigzag": "zigzag", "accelforge": "accelforge", "scale_sim": "scalesim"}


def tool_call(tool: str, folder: Path) -> Callable[[], None]:
    """Returns a function that asks the tool itself for the cost of all its products, weights stationary."""

    def call() -> None:
        for sizes in products_of(tool):
            if tool == "zigzag":
                peer_tools.zigzag_cost(sizes, SIDE, "weight_stationary", folder)
            elif tool == "accelforge":
                peer_tools.accelforge_cost(sizes, SIDE, folder)
            else:
                peer_tools.scale_sim_cycles(sizes, SIDE, "weight_stationary", folder)

    return call


def products_of(tool: str) -> tuple[Sizes, ...]:
    """Returns the products that a tool is timed on."""
    return SMALL if tool == "scale_sim" else LAYER


def bench_tools(sizes: BenchSizes) -> list[Record]:
    """Measures layers (of SCALE-Sim: products) per second with each tool's switches.

    Baseline: the tool itself, or its quoted figure. It is called `sizes.repeats` times, three at most, and once before.
    """
    records = []
    for tool, model in TOOLS.items():
        products = np.array(products_of(tool))
        sides = np.full(len(products), SIDE)
        ours = functools.partial(gemm_cost, model, products, sides, "weight_stationary")
        records.append(beside(f"{tool}_switches", tool, ours, sizes.repeats))
    return records


def beside(
    name: str, tool: str, ours: Callable[[], Any], repeats: int, *, layers: int | None = None
) -> Record:
    """Returns the record of a function of ours beside a tool, by turns; the tool's figure is quoted if it does not run.

    Args:
      name: Name of the record.
      tool: Key of `TOOLS`.
      ours: What of ours is timed.
      repeats: Timed calls, of the tool three at most.
      layers: Layers that `ours` prices in a call; None: the products that the tool is timed on.
    """
    model, is_layer = TOOLS[tool], products_of(tool) is LAYER
    done = 1 if layers is None else layers if is_layer else layers * len(LAYER)
    record = functools.partial(make_record, name, unit="layer/s" if is_layer else "product/s")
    with TemporaryDirectory() as folder:
        calls: list[Callable[[], Any]] = [ours, tool_call(tool, Path(folder))]
        try:
            own, theirs = interleaved_seconds(calls, min(repeats, 3))
        except Exception as error:  # another project's code, on versions that it may not know
            print(
                f"bench: `{MODULES[tool]}` does not run here ({error}): its figure is quoted",
                file=sys.stderr,
            )
        else:
            return record(done / own, baseline=model.name, baseline_value=1.0 / theirs)
    (own,) = interleaved_seconds([ours], repeats)
    quoted = f"{model.name}, quoted"
    return record(done / own, baseline=quoted, baseline_value=QUOTED_PER_S[tool])
