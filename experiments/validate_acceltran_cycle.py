"""AccelTran's runs against our reproduction of its simulator: cycle by cycle here, its mode `fast` next door."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from codesign.errors import CodesignError, DataError
from codesign.experiments.reference_tables import (
    PERCENT,
    Table,
    ValidationRow,
    largest_relative,
    read_table,
)
from codesign.experiments.validate_acceltran import (
    MODELS,
    SIZES,
    bert,
    fast_runs,
    machine_of,
    memory_of,
)
from codesign.hw.acceltran_cycle import Activity, simulate
from codesign.hw.acceltran_cycle_energy import cycle_energy_nj
from codesign.hw.acceltran_estimator import Layer, Machine, area_mm2

SIMULATOR = "AccelTran's simulator, cycle by cycle"
LIMIT_PERCENT = 5.0
ONE_LAYER = "_1layer"
"""End of the name of a model of which the first layer is run."""
CYCLE_COLUMNS = {
    "E_mac_dyn_nJ": "mac_dynamic",
    "E_mac_leak_nJ": "mac_leakage",
    "E_softmax_dyn_nJ": "softmax_dynamic",
    "E_softmax_leak_nJ": "softmax_leakage",
    "E_ln_dyn_nJ": "norm_dynamic",
    "E_ln_leak_nJ": "norm_leakage",
    "E_wgt_load_dyn_nJ": "weight_load",
    "E_mask_load_dyn_nJ": "mask_load",
    "E_act_store_dyn_nJ": "activation_store",
    "E_mask_store_dyn_nJ": "mask_store",
    "E_wgt_buf_leak_nJ": "weight_buffer_leakage",
    "E_act_buf_leak_nJ": "activation_buffer_leakage",
    "E_mask_buf_leak_nJ": "mask_buffer_leakage",
}
"""Energies of a run, and ours."""
MODES = {"lb": "dram_32_2_1", "hb": "rram_32_2_1"}
"""Bandwidths of main memory (low, high), and a memory that has each."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, ours beside it: what took place, and its energies in nJ by `CYCLE_ENERGIES`."""

    activity: Activity
    energy_nj: dict[str, float]
    area_mm2: float


def acceltran_runs(path: Path) -> list[ValidationRow]:
    """Compares every run, in either mode of AccelTran's simulator.

    Raises:
      DataError: If the file has a run of neither.
    """
    rows = [*fast_runs(path), *cycle_runs(path)]
    if not rows:
        raise DataError(f"'{path}' has no run in the modes `fast` and `cycle`: give at least one")
    return rows


def cycle_runs(path: Path) -> list[ValidationRow]:
    """Compares every run in the mode `cycle`: cycles, area, and energies, in all and by part."""
    table = read_table(
        path,
        (
            *("model", "seq", "mem_type", "mem_mode", "banks", "ranks", "channels", "issue_batch"),
            *("non_linearity", "bits_total", "act_sparsity", "wgt_sparsity", "simulator_mode"),
            *("cycles", "area_mm2", "E_total_nJ"),
            *SIZES,
            *CYCLE_COLUMNS,
        ),
    )
    runs = table.where("simulator_mode", "cycle")
    if not len(runs):
        return []
    found = [simulated(run) for run in runs]

    def row(metric: str, column: str, ours: list[float], limit: float | None) -> ValidationRow:
        error = largest_relative(np.array(ours), runs.floats(column))
        return ValidationRow(
            reference=SIMULATOR,
            metric=f"{metric}, largest error",
            value=PERCENT * error,
            unit="%",
            limit=limit,
            rows=len(runs),
        )

    cycles = [float(one.activity.cycles) for one in found]
    total = [sum(one.energy_nj.values()) for one in found]
    exact = float(np.mean(np.array(cycles) == runs.floats("cycles")))
    return [
        row("cycles", "cycles", cycles, LIMIT_PERCENT),
        ValidationRow(
            reference=SIMULATOR,
            metric="runs equal to the cycle",
            value=PERCENT * exact,
            unit="%",
            limit=None,
            rows=len(runs),
        ),
        row("total energy", "E_total_nJ", total, LIMIT_PERCENT),
        *(
            row(
                f"energy, {part.replace('_', ' ')}",
                column,
                [one.energy_nj[part] for one in found],
                None,
            )
            for column, part in CYCLE_COLUMNS.items()
        ),
        row("area", "area_mm2", [one.area_mm2 for one in found], None),
    ]


def simulated(run: Table) -> Run:
    """Returns our run with the settings of a row.

    Raises:
      DataError: If a setting is none of the published ones, or the run cannot end.
    """
    layers, machine = _layers(run), _machine(run)
    weight_sparsity = run.number("wgt_sparsity")
    try:
        activity = simulate(
            layers,
            machine,
            num_tokens=run.size("seq"),
            activation_sparsity=run.number("act_sparsity"),
            weight_sparsity=weight_sparsity,
            word_bits=run.number("bits_total"),
        )
    except CodesignError as error:
        raise DataError(f"'{run.path}', line {run.lines[0]}: {error}") from error
    energy = cycle_energy_nj(activity, machine, weight_sparsity=weight_sparsity)
    return Run(activity=activity, energy_nj=energy, area_mm2=area_mm2(machine))


def _layers(run: Table) -> list[Layer]:
    (name,) = run.texts("model")
    base = name.removesuffix(ONE_LAYER)
    if base not in MODELS:
        raise run.fault(0, "model", f"one of {', '.join(MODELS)}, with or without {ONE_LAYER}")
    layers = bert(base)
    return layers[:1] if name.endswith(ONE_LAYER) else layers


def _machine(run: Table) -> Machine:
    machine = machine_of(run, memory_of(run))
    (mode,), (kind,) = run.texts("mem_mode"), run.texts("non_linearity")
    if mode not in MODES:
        raise run.fault(0, "mem_mode", f"one of {', '.join(MODES)}")
    if kind not in ("gelu", "relu"):
        raise run.fault(0, "non_linearity", "gelu or relu")
    non_linearity: Literal["gelu", "relu"] = "relu" if kind == "relu" else "gelu"
    return dataclasses.replace(
        machine,
        issue_group=run.size("issue_batch"),
        non_linearity=non_linearity,
        bandwidth=machine.constants.memories[MODES[mode]].bandwidth.value,
    )
