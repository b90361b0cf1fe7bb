"""Every comparison of ours with reference results that others produced, by file.

A comparison is one line of `COMPARISONS`: the file that it reads and a function from its path to rows.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codesign.errors import DataError
from codesign.experiments.published_chips import validate_chips
from codesign.experiments.reference_tables import ValidationRow
from codesign.experiments.validate_acceltran import (
    breakdown_figure,
    dataflow_figure,
    dataflow_runs,
    net_sparsity_figure,
    sparsity_throughput_figure,
    threshold_figure,
    topk_figure,
    transcode_accelerators,
)
from codesign.experiments.validate_acceltran_cycle import acceltran_runs
from codesign.experiments.validate_agreement import simulator_agreement
from codesign.experiments.validate_published import sanger_latency, sofa_scaling
from codesign.experiments.validate_tools import dense_gemm_tools
from codesign.experiments.validation_mapper import validate_mapper
from codesign.experiments.validation_rtl import validation_rows as firesim_gemmini
from codesign.experiments.validation_timeloop import validate_timeloop

COMPARISONS: dict[str, Callable[[Path], list[ValidationRow]]] = {
    "dense_gemm_tools.csv": dense_gemm_tools,
    "firesim_gemmini.csv.gz": firesim_gemmini,
    "timeloop_gemmini.csv.gz": lambda path: [
        *validate_timeloop(path.parent),
        *validate_mapper(path.parent),
    ],
    "acceltran_runs.csv": acceltran_runs,
    "transcode_accelerators.csv": transcode_accelerators,
    "acceltran_dataflow_runs.csv": dataflow_runs,
    "acceltran_fig_dataflow_energy_reuse.csv": dataflow_figure,
    "acceltran_fig_netsparsity_vs_throughput_energy_berttiny_edge.csv": sparsity_throughput_figure,
    "acceltran_fig_breakdowns.csv": breakdown_figure,
    "acceltran_fig_tau_vs_sparsity_accuracy_bertbase_sst2.csv": threshold_figure,
    "acceltran_fig_topk_vs_sparsity_accuracy_bertbase_sst2.csv": topk_figure,
    "acceltran_fig_net_sparsity_vs_accuracy.csv": net_sparsity_figure,
}
"""What reads each file; the function raises `DataError` if it cannot be read or lacks a column."""
COMPANIONS = {"transcode_accelerators.csv": ("transcode_models.json.gz",)}
"""Files that a comparison reads besides, from the same folder."""
NOT_COMPARED = {
    "acceltran_fig_acc_vs_activation_sparsity_bertbase_sst2.csv": (
        "accuracy of a fine-tuned BERT-Base; `codesign reproduce acceltran-sst2` measures the curve on MiniLM"
    ),
    "acceltran_fig_baselines_normalized.csv": (
        "processors that have no model here; `codesign compare` sets the accelerators into one frame"
    ),
    "acceltran_fig_dynatran_vs_topk_throughput_device.csv": (
        "run times of two programs on processors, one of them an interpreted loop"
    ),
}
"""Files of the same origin that no model here can be compared with, and why."""
BUILT_IN: dict[str, Callable[[], list[ValidationRow]]] = {
    "SOFA, Table II": sofa_scaling,
    "Sanger's formula": sanger_latency,
    "areas and powers of the presets": validate_chips,
}
"""Comparisons with published numbers that need no file, by name."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one comparison.

    Attributes:
      name: Its file, or its name if it needs none.
      rows: What it yielded; none if it was not made.
      reason: Why it was not made; empty if it was.
    """

    name: str
    rows: tuple[ValidationRow, ...] = ()
    reason: str = ""


def validate_all(folder: Path | None, agreement: Path | None = None) -> list[Outcome]:
    """Returns the outcome of every comparison, absent files among them.

    Args:
      folder: Folder of reference results; None: only comparisons that need no file.
      agreement: A study of cost model and simulators (`validate_agreement`); None: none.

    Raises:
      DataError: If the folder holds none of the files, or one cannot be read or lacks columns.
    """
    if folder is not None and not folder.is_dir():
        raise DataError(f"'{folder}' is no folder: name that of the reference results by `--data`")
    present = [name for name in COMPARISONS if folder is not None and _is_there(folder, name)]
    if not present and (folder is not None or not (BUILT_IN or agreement)):
        where = (
            f"'{folder}' holds none" if folder is not None else "no folder is named that holds any"
        )
        raise DataError(
            f"{where} of the files {', '.join(list(COMPARISONS)[:3])}, ...: "
            "name the folder of reference results by `--data` or $CODESIGN_VALIDATION"
        )
    # Files first: a faulty one is named before anything is computed.
    outcomes = []
    if agreement is not None:
        rows = tuple(simulator_agreement(agreement))
        outcomes.append(Outcome(name=agreement.name, rows=rows))
    compared = [
        Outcome(name=name, rows=tuple(compare(folder / name)))
        if folder is not None and name in present
        else Outcome(name=name, reason="not present")
        for name, compare in COMPARISONS.items()
    ]
    outcomes += [Outcome(name=name, rows=tuple(make())) for name, make in BUILT_IN.items()]
    outcomes += compared
    for name, reason in NOT_COMPARED.items():
        if folder is not None and (folder / name).is_file():
            outcomes.append(Outcome(name=name, reason=f"not compared: {reason}"))
    return outcomes


def _is_there(folder: Path, name: str) -> bool:
    return all((folder / part).is_file() for part in (name, *COMPANIONS.get(name, ())))


def records(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Returns the rows of all outcomes as JSON has them: reference, metric, value, unit, limit, rows."""
    return [asdict(row) for outcome in outcomes for row in outcome.rows]
