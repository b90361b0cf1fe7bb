"""AccelTran's closed form, loop orders and figures against published results."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codesign.errors import CodesignError, DataError
from codesign.experiments.reference_tables import (
    PERCENT,
    Table,
    ValidationRow,
    largest_relative,
    read_json,
    read_table,
)
from codesign.hw.acceltran_estimator import (
    ENERGY_COLUMNS,
    Estimate,
    Layer,
    Machine,
    area_mm2,
    estimate,
)
from codesign.hw.loop_order import LoopOrderCost, loop_order_cost
from codesign.hw.spec import load_preset
from codesign.units import UM2_PER_MM2

MODELS = {
    # Layers, width, heads, hidden width: Turc et al., arXiv 1908.08962; Devlin et al., arXiv 1810.04805; Nano: AccelTran.
    "bert_nano": (1, 32, 2, 64),
    "bert_tiny": (2, 128, 2, 512),
    "bert_mini": (4, 256, 4, 1024),
    "bert_small": (4, 512, 8, 2048),
    "bert_medium": (8, 512, 8, 2048),
    "bert_base": (12, 768, 12, 3072),
    "bert_large": (24, 1024, 16, 4096),
}
ROUNDING = 1e-9
"""Largest relative difference between sums of the same float64 terms in another order."""
LOOP_ORDER_PERCENT = 0.1
ESTIMATOR = "AccelTran's closed form"
TRANSCODE = "TransCODE"
TRANSCODE_TOKENS, TRANSCODE_SPARSITY = 128, 0.5
"""Tokens of an example, and zeros among weights and among activations, in all runs of TransCODE."""


def bert(name: str) -> list[Layer]:
    """Returns the encoder of a model of `MODELS`."""
    layers, width, heads, hidden = MODELS[name]
    operators = (f"sa_sdp_{width // heads}",) * heads
    return [Layer(width=width, heads=operators, hidden=(hidden,))] * layers


def machine_of(row: Table, memory: str) -> Machine:
    """Returns the machine of a row."""
    return dataclasses.replace(
        Machine.from_spec(load_preset("acceltran-edge")),
        processing_elements=row.size("pe"),
        lanes=row.size("lanes_per_pe"),
        multipliers=row.size("mac_per_lane"),
        softmax_units=row.size("softmax_per_pe"),
        tile_b=row.size("tile_b"),
        tile_x=row.size("tile_x"),
        tile_y=row.size("tile_y"),
        batch=row.size("batch_size"),
        activation_mb=row.number("act_buf_MB"),
        weight_mb=row.number("wgt_buf_MB"),
        mask_mb=row.number("mask_buf_MB"),
        memory=memory,
    )


def memory_of(run: Table) -> str:
    """Returns the main memory of a run."""
    (kind,) = run.texts("mem_type")
    return "_".join([kind, *(str(run.size(name)) for name in ("banks", "ranks", "channels"))])


SIZES = (
    *("pe", "lanes_per_pe", "mac_per_lane", "softmax_per_pe", "tile_b", "tile_x", "tile_y"),
    *("batch_size", "act_buf_MB", "wgt_buf_MB", "mask_buf_MB"),
)
RUN_ENERGIES = {
    "E_fast_buffer": ("buffer",),
    "E_fast_mainmem": ("main_memory",),
    "E_mac_dyn_nJ": ("mac_dynamic",),
    "E_mac_leak_nJ": ("mac_leakage",),
    "E_softmax_dyn_nJ": ("softmax_dynamic",),
    "E_softmax_leak_nJ": ("softmax_leakage",),
    "E_ln_dyn_nJ": ("norm_dynamic",),
    "E_ln_leak_nJ": ("norm_leakage",),
    "E_fast_sparsity": ("sparsity_dynamic", "sparsity_leakage"),
    "E_fast_others": ("others_dynamic", "others_leakage"),
    "E_total_nJ": ENERGY_COLUMNS,
}
"""Columns of `acceltran_runs.csv`, and which of our energies each one adds up."""


def fast_runs(path: Path) -> list[ValidationRow]:
    """Compares every run in the simulator's `fast` mode: cycles, area and all energies, as printed; none: no rows."""
    columns = ("model", "seq", "mem_type", "banks", "ranks", "channels", "simulator_mode")
    rest = ("act_sparsity", "wgt_sparsity", "cycles", "area_mm2")
    table = read_table(path, (*columns, *rest, *SIZES, *RUN_ENERGIES))
    runs = table.where("simulator_mode", "fast")
    if not len(runs):
        return []
    found = []
    for run in runs:
        (model,) = run.texts("model")
        if model not in MODELS:
            raise run.fault(0, "model", f"one of {', '.join(MODELS)}")
        found.append(
            estimate(
                bert(model),
                machine_of(run, memory_of(run)),
                num_tokens=run.size("seq"),
                activation_sparsity=run.number("act_sparsity"),
                weight_sparsity=run.number("wgt_sparsity"),
            )
        )
    energies = {
        column: [sum(one.energy_nj[part] for part in parts) for one in found]
        for column, parts in RUN_ENERGIES.items()
    }
    return _estimates(f"{ESTIMATOR}, runs", runs, found, energies)


PUBLISHED_ENERGIES = ("E_buffer_nJ", "E_main_memory_nJ") + tuple(
    f"E_{part}_{kind}_nJ"
    for part in ("mac", "sftm", "ln", "sparsity", "others")
    for kind in ("dyn", "leak")
)
"""Columns of `transcode_accelerators.csv`, in the order of `ENERGY_COLUMNS`."""


def transcode_accelerators(path: Path) -> list[ValidationRow]:
    """Compares every accelerator and model of TransCODE; the models lie beside, in `transcode_models.json.gz`.

    Rows whose embedding does not fit the weight buffer are left out: the published runs priced another model there.
    """
    table = read_table(path, ("id", "mem_idx", "area_mm2", "cycles", *SIZES, *PUBLISHED_ENERGIES))
    models = read_json(path.with_name("transcode_models.json.gz"))
    memories = list(Machine.from_spec(load_preset("acceltran-edge")).constants.memories)
    found: list[Estimate] = []
    fits = np.ones(len(table), bool)
    for index, row in enumerate(table):
        number = int(row.number("mem_idx"))
        if not 0 <= number < len(memories):
            raise row.fault(0, "mem_idx", f"a number from 0 to {len(memories) - 1}")
        machine = machine_of(row, memories[number])
        layers = _layers(models, row)
        word = machine.constants.word.value * (1.0 - TRANSCODE_SPARSITY)
        embedding = (machine.constants.vocabulary.value + TRANSCODE_TOKENS) * layers[0].width * word
        fits[index] = embedding <= machine.weight_mb * 2.0**23
        if fits[index]:
            found.append(
                estimate(
                    layers,
                    machine,
                    num_tokens=TRANSCODE_TOKENS,
                    activation_sparsity=TRANSCODE_SPARSITY,
                    weight_sparsity=TRANSCODE_SPARSITY,
                )
            )
    if not found:
        raise DataError(f"'{path}': no embedding fits its weight buffer: give other rows")
    energies = {
        column: [one.energy_nj[name] for one in found]
        for column, name in zip(PUBLISHED_ENERGIES, ENERGY_COLUMNS, strict=True)
    }
    return _estimates(TRANSCODE, table.take(fits), found, energies, printed=False)


def _layers(models: Any, row: Table) -> list[Layer]:
    """Returns the model of a row of TransCODE."""
    (name,) = row.texts("id")
    try:
        model = models[name]["model_dict"]
        return [
            Layer(width=width, heads=tuple(heads), hidden=tuple(hidden))
            for width, heads, hidden in zip(model["h"], model["o"], model["f"], strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise row.fault(0, "id", "the name of a model in transcode_models.json.gz") from error


def _estimates(
    reference: str,
    table: Table,
    found: Sequence[Estimate],
    energies: dict[str, list[float]],
    *,
    printed: bool = True,
) -> list[ValidationRow]:
    """Returns how far cycles, area and energies are off.

    Args:
      reference: What was compared with.
      table: Its rows.
      found: Our estimates.
      energies: Our energies by column, nJ.
      printed: Whether the reference shows a few decimals, beyond which we may differ.
    """

    def largest(column: str, ours: Sequence[float]) -> float:
        half = 0.5 * 10.0 ** -table.decimals(column) if printed else 0.0
        return largest_relative(np.array(ours), table.floats(column), half)

    cycles = np.array([float(one.cycles) for one in found])
    difference = float(np.max(np.abs(cycles - table.floats("cycles"))))
    area = largest("area_mm2", [one.area_mm2 for one in found])
    energy = max(largest(column, ours) for column, ours in energies.items())
    beyond = " beyond printed digits" if printed else ""
    return [
        ValidationRow(
            reference=reference,
            metric=f"{what}, largest {kind}",
            value=value,
            unit=unit,
            limit=limit,
            rows=len(table),
        )
        for what, kind, value, unit, limit in (
            ("cycles", "difference", difference, "cycle", 0.0),
            ("area", f"relative error{beyond}", area, "1", ROUNDING),
            (f"{len(energies)} energies", f"relative error{beyond}", energy, "1", ROUNDING),
        )
    ]


def _loop_order(row: Table, shape: tuple[int, int, int]) -> LoopOrderCost:
    (order,) = row.texts("loop_order")
    try:
        return loop_order_cost(order, shape, Machine.from_spec(load_preset("acceltran-edge")))
    except CodesignError:
        raise row.fault(0, "loop_order", "the letters b, i, j, k once each") from None


SHAPE_COLUMN = "matmul_i_k_j(batch4)"


def dataflow_runs(path: Path) -> list[ValidationRow]:
    """Compares the loop-order experiment: cycles, reuse, energies."""
    table = read_table(
        path, (SHAPE_COLUMN, "loop_order", "cycles", "dyn_energy_nJ", "leak_energy_nJ", "reuse")
    )
    found = []
    for row in table:
        sizes = row.texts(SHAPE_COLUMN)[0].split("_")
        if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
            raise row.fault(0, SHAPE_COLUMN, "three sizes such as 64_64_128")
        found.append(_loop_order(row, (int(sizes[0]), int(sizes[1]), int(sizes[2]))))
    return _loop_rows(
        "AccelTran's loop orders, runs",
        table,
        {
            "cycles": ("cycles", [float(one.cycles) for one in found]),
            "reuse": ("reuse", [float(one.reuse) for one in found]),
            "dyn_energy_nJ": ("dynamic energy", [one.dynamic_nj for one in found]),
            "leak_energy_nJ": ("leakage energy", [one.leakage_nj for one in found]),
        },
    )


PANELS = {"0": (64, 64, 64), "1": (64, 64, 128), "2": (128, 64, 64)}
"""Sizes i, k, j of the figure's panels."""


def dataflow_figure(path: Path) -> list[ValidationRow]:
    """Compares the loop-order figure, read from its curves: energy, and reuse where it is not zero."""
    table = read_table(path, ("panel", "loop_order", "dynamic_energy_nJ", "reuse_instances"))
    found = []
    for row in table:
        (panel,) = row.texts("panel")
        if panel not in PANELS:
            raise row.fault(0, "panel", f"one of {', '.join(PANELS)}")
        found.append(_loop_order(row, PANELS[panel]))
    return _loop_rows(
        "AccelTran's loop orders, figure",
        table,
        {
            "dynamic_energy_nJ": ("dynamic energy", [one.dynamic_nj for one in found]),
            "reuse_instances": ("reuse", [float(one.reuse) for one in found]),
        },
    )


def _loop_rows(
    reference: str, table: Table, ours: dict[str, tuple[str, list[float]]]
) -> list[ValidationRow]:
    """Returns the largest errors of named columns, in percent; of the largest value where one is zero."""
    rows = []
    for column, (what, found) in ours.items():
        wanted = table.floats(column)
        scale = np.where(np.array(found) == 0, np.max(np.abs(wanted)), np.abs(wanted))
        error = np.abs(np.array(found) - wanted) / scale
        rows.append(
            ValidationRow(
                reference=reference,
                metric=f"{what}, largest error",
                value=PERCENT * float(np.max(error)),
                unit="%",
                limit=LOOP_ORDER_PERCENT,
                rows=len(table),
            )
        )
    return rows


# --- figures of which only the trend can be compared


def sparsity_throughput_figure(path: Path) -> list[ValidationRow]:
    """Reports gains of throughput and energy over the figure's range of net sparsity, published and ours.

    Ours: the closed form of BERT-Tiny on Edge, that sparsity in weights and activations alike.
    """
    table = read_table(path, ("net_sparsity_pct", "norm_throughput", "norm_energy"))
    sparsity = table.floats("net_sparsity_pct") / PERCENT
    for column in ("norm_throughput", "norm_energy"):
        if np.min(table.floats(column)) <= 0:
            raise table.fault(int(np.argmin(table.floats(column))), column, "above 0")
    if np.min(sparsity) < 0 or np.max(sparsity) >= 1:
        worst = int(np.argmax(np.abs(sparsity - 0.5)))
        raise table.fault(worst, "net_sparsity_pct", "in [0, 100)")
    ends = [int(np.argmin(sparsity)), int(np.argmax(sparsity))]
    low, high = (
        estimate(
            bert("bert_tiny"),
            Machine.from_spec(load_preset("acceltran-edge")),
            num_tokens=TRANSCODE_TOKENS,
            activation_sparsity=float(sparsity[end]),
            weight_sparsity=float(sparsity[end]),
        )
        for end in ends
    )
    throughput, energy = (table.floats(name)[ends] for name in ("norm_throughput", "norm_energy"))
    spent = [sum(one.energy_nj.values()) for one in (low, high)]
    gains = {
        "throughput gained, published": throughput[1] / throughput[0] - 1.0,
        "throughput gained, ours": low.cycles / high.cycles - 1.0,
        "energy saved, published": 1.0 - energy[1] / energy[0],
        "energy saved, ours": 1.0 - spent[1] / spent[0],
    }
    reference = f"AccelTran, net sparsity {sparsity[ends[0]]:.0%} to {sparsity[ends[1]]:.0%}"
    return [
        ValidationRow(
            reference=reference,
            metric=metric,
            value=PERCENT * float(gain),
            unit="%",
            limit=None,
            rows=len(table),
        )
        for metric, gain in gains.items()
    ]


AREA_FIGURE = "pie_charts area"


def breakdown_figure(path: Path) -> list[ValidationRow]:
    """Reports the largest difference between the parts' shares of the Edge machine's area, read from a pie, and ours."""
    table = read_table(path, ("figure", "component", "percent")).where("figure", AREA_FIGURE)
    if not len(table):
        return []
    machine = Machine.from_spec(load_preset("acceltran-edge"))
    area = {name: module.area.base for name, module in machine.spec.modules.items()}
    lanes = machine.processing_elements * machine.lanes
    elements = machine.processing_elements
    parts = {
        "MAC lanes": lanes * machine.lane.area.base,
        "Softmax": elements * machine.softmax_units * machine.softmax.area.base,
        "Layer-norm": elements * machine.norm.area.base,
        "Sparsity": lanes * (area["pre_sparsity"] + area["post_sparsity"]),
        "Others": lanes * area["fifo"] + elements * (area["dataflow"] + area["dma"]),
    }
    total = sum(parts.values())
    assert total <= area_mm2(machine) * UM2_PER_MM2
    known = table.take(np.array([name in parts for name in table.texts("component")], bool))
    if not len(known):
        return []
    ours = np.array([PERCENT * parts[name] / total for name in known.texts("component")])
    return [
        ValidationRow(
            reference="AccelTran, area of Edge by part",
            metric="share, largest difference",
            value=float(np.max(np.abs(ours - known.floats("percent")))),
            unit="percentage point",
            limit=None,
            rows=len(known),
        )
    ]


DENSITIES = {
    "act_sparsity_no_weight_pruning_pct": ", all weights",
    "act_sparsity_movement_pruned_pct": ", pruned weights",
}
"""Columns of activation sparsity, and what they are called in a metric."""


def _steps_against(
    reference: str, table: Table, groups: Sequence[str], order: str, sparsity: str, sign: float
) -> ValidationRow:
    """Returns at how many steps the published sparsity does not move as the mechanism's rule has it.

    Args:
      reference: What the rule is.
      table: The figure.
      groups: Columns that tell curves apart.
      order: Column along which the curves go.
      sparsity: Column of the sparsity.
      sign: 1 if it must not fall, -1 if it must not rise.
    """
    names = [table.texts(column) for column in groups]
    keys = list(zip(*names, strict=True)) if names else [()] * len(table)
    against = steps = 0
    for key in sorted(set(keys)):
        part = table.take(np.array([own == key for own in keys], bool))
        moves = np.diff(part.floats(sparsity)[np.argsort(part.floats(order), kind="stable")])
        against += int(np.sum(sign * moves < 0))
        steps += len(moves)
    return ValidationRow(
        reference=reference,
        metric=f"steps of {steps} against it{DENSITIES.get(sparsity, '')}",
        value=float(against),
        unit="1",
        limit=None,
        rows=len(table),
    )


def threshold_figure(path: Path) -> list[ValidationRow]:
    """Reports whether sparsity rises with DynaTran's threshold."""
    table = read_table(path, ("tau", *DENSITIES))
    reference = "AccelTran, sparsity rises with the threshold"
    return [_steps_against(reference, table, (), "tau", column, 1.0) for column in DENSITIES]


def topk_figure(path: Path) -> list[ValidationRow]:
    """Reports whether sparsity falls with the k of top-k."""
    table = read_table(path, ("k", *DENSITIES))
    reference = "AccelTran, sparsity falls with k"
    return [_steps_against(reference, table, (), "k", column, -1.0) for column in DENSITIES]


def net_sparsity_figure(path: Path) -> list[ValidationRow]:
    """Reports whether net sparsity rises with the threshold, on every task and model."""
    table = read_table(path, ("task", "series", "tau", "net_sparsity_pct"))
    return [
        _steps_against(
            "AccelTran, net sparsity rises with the threshold",
            table,
            ("task", "series"),
            "tau",
            "net_sparsity_pct",
            1.0,
        )
    ]
