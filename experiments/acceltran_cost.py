"""`codesign cost PRESET --simulator acceltran`: a batch in AccelTran's own cycle-level simulator."""

import dataclasses
from typing import Any

from codesign.errors import CodesignError
from codesign.experiments.tables import print_table
from codesign.hw.acceltran_cycle import simulate
from codesign.hw.acceltran_cycle_energy import cycle_energy_nj
from codesign.hw.acceltran_estimator import Layer, Machine, area_mm2
from codesign.hw.closed_form import ModelShape
from codesign.hw.spec import AcceleratorSpec
from codesign.units import PJ_PER_NJ, PJ_PER_UJ, US_PER_S

DEFAULT_SPARSITY = 0.5
"""Zeros among activations and among weights unless given, as in the repository jha-lab/acceltran."""


def simulated_record(
    spec: AcceleratorSpec,
    shape: ModelShape,
    *,
    batch: int | None,
    activation_sparsity: float | None,
    weight_sparsity: float | None,
) -> dict[str, Any]:
    """Returns what a batch takes: cycles, energies in pJ, utilisation of units and buffers.

    Args:
      spec: The machine.
      shape: The model; its end layers are not run, its embedding is that of BERT's vocabulary.
      batch: Examples; None: as many as the machine's file says.
      activation_sparsity: Zeros among activations, in [0, 1); None: the published default.
      weight_sparsity: Zeros among weights, likewise.

    Raises:
      CodesignError: If a value is out of range, or the simulator cannot run the model on the machine.
    """
    machine = Machine.from_spec(spec)
    if batch is not None:
        if batch < 1:
            raise CodesignError(f"`--batch` must be at least 1, got {batch}: raise it")
        machine = dataclasses.replace(machine, batch=batch)
    zeros = {
        "activation_sparsity": DEFAULT_SPARSITY
        if activation_sparsity is None
        else activation_sparsity,
        "weight_sparsity": DEFAULT_SPARSITY if weight_sparsity is None else weight_sparsity,
    }
    heads = (f"sa_sdp_{shape.head_dim}",) * shape.num_heads
    layers = [Layer(width=shape.width, heads=heads, hidden=(shape.hidden,))] * shape.num_layers
    activity = simulate(layers, machine, num_tokens=shape.num_tokens, **zeros)
    energy = cycle_energy_nj(activity, machine, weight_sparsity=zeros["weight_sparsity"])
    elements = machine.processing_elements
    units = {
        "lane": elements * machine.lanes,
        "softmax": elements * machine.softmax_units,
        "norm": elements,
    }
    return {
        "preset": spec.name,
        "clock_hz": spec.clock_hz,
        "simulator": "acceltran",
        "batch": machine.batch,
        **zeros,
        "latency_cycles": activity.cycles,
        "latency_us": activity.cycles / spec.clock_hz * US_PER_S,
        "energy_pj": PJ_PER_NJ * sum(energy.values()),
        "energy_pj_by_part": {name: PJ_PER_NJ * value for name, value in energy.items()},
        "area_mm2": area_mm2(machine),
        "utilisation_by_unit": {
            name: activity.busy_cycles[name] / (count * activity.cycles)
            for name, count in units.items()
        },
        "transfer_cycles_by_buffer": activity.transfer_cycles,
        "peak_use_by_buffer": activity.peak_use,
    }


def print_simulated(record: dict[str, Any]) -> None:
    """Prints what `simulated_record` returns."""
    energy = record["energy_pj"]
    print(
        f"{record['preset']} at {record['clock_hz'] / 1e6:g} MHz in AccelTran's simulator: a batch of "
        f"{record['batch']} takes {record['latency_cycles']:,} cycles ({record['latency_us']:.3f} µs) and "
        f"{energy / PJ_PER_UJ:,.4f} µJ ({energy / PJ_PER_UJ / record['batch']:,.4f} per example); "
        f"{record['area_mm2']:.3f} mm2; zeros: {record['activation_sparsity']:g} of activations, "
        f"{record['weight_sparsity']:g} of weights"
    )
    print_table(
        "energy of the batch by part",
        ("part", "µJ", "share"),
        [
            (name.replace("_", " "), f"{value / PJ_PER_UJ:.4f}", f"{value / energy:.1%}")
            for name, value in record["energy_pj_by_part"].items()
        ],
    )
    use = record["utilisation_by_unit"]
    print_table("units", ("unit", "busy"), [(name, f"{value:.2%}") for name, value in use.items()])
    moved, peak = record["transfer_cycles_by_buffer"], record["peak_use_by_buffer"]
    print_table(
        "buffers",
        ("buffer", "transfer, cycles", "most in use"),
        [(name, f"{moved[name]:,}", f"{peak[name]:.1%}") for name in moved],
    )
