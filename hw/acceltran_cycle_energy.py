"""Energy of a batch in AccelTran's cycle-level simulator, nJ by part, slips included; no JAX.

References:
  Tuli, Jha, "AccelTran", arXiv 2302.14705; simulator of the repository jha-lab/acceltran.
"""

import math

from codesign import units
from codesign.hw.acceltran_cycle import Activity
from codesign.hw.acceltran_estimator import Machine

CYCLE_ENERGIES = (
    *(f"{part}_{kind}" for part in ("mac", "softmax", "norm") for kind in ("dynamic", "leakage")),
    *("weight_load", "mask_load", "activation_store", "mask_store"),
    *(f"{name}_buffer_leakage" for name in ("weight", "activation", "mask")),
)
"""Parts of the energy. Sparsity modules, queues, data-flow and DMA blocks and idle units cost nothing there."""


def cycle_energy_nj(
    activity: Activity, machine: Machine, *, weight_sparsity: float
) -> dict[str, float]:
    """Returns the energies of a batch by `CYCLE_ENERGIES`, nJ.

    Args:
      activity: What the batch took.
      machine: The machine that it ran on.
      weight_sparsity: Fraction of zeros in weights, in [0, 1).
    """
    # Milliwatt by megahertz is nanojoule per cycle.
    megahertz = machine.spec.clock_hz / units.HZ_PER_MHZ
    block = machine.constants.block.value
    result = {}
    for part, unit, module in (
        ("mac", "lane", machine.lane),
        ("softmax", "softmax", machine.softmax),
        ("norm", "norm", machine.norm),
    ):
        busy = activity.busy_cycles[unit]
        result[f"{part}_dynamic"] = module.dynamic.value / megahertz * busy
        result[f"{part}_leakage"] = module.leakage.value / megahertz * busy
    loaded = machine.main_memory.energy.value * activity.loaded * (1.0 - weight_sparsity) / block
    result["weight_load"] = loaded
    # The mask of a load is charged the whole load again.
    result["mask_load"] = loaded
    for name in ("activation", "mask"):
        memory, megabytes = machine.buffers[name]
        access = memory.energy.value * math.sqrt(megabytes)
        result[f"{name}_store"] = access * activity.stored / block
    for name, (memory, megabytes) in machine.buffers.items():
        assert memory.leakage is not None
        leakage = memory.leakage.value * megabytes / megahertz
        result[f"{name}_buffer_leakage"] = leakage * activity.transfer_cycles[name]
    assert set(result) == set(CYCLE_ENERGIES)
    return {name: result[name] for name in CYCLE_ENERGIES}
