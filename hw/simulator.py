"""The simulators: an engine on the actual masks of a batch, in as much detail as its kind needs; NumPy only.

The independent check of the differentiable cost: same machine file, but every count comes from the masks and every
ceil is a ceil. Machines whose lanes share the keys of a row move row by row (`row_simulator`), machines whose lanes
take a query each move tile by tile (`tile_simulator`), machines whose groups of lanes take windows of rows move window by
window (`window_simulator`), machines of processing elements whose lanes take tiles of every product move operation by
operation (`lane_simulator`).
"""

from collections.abc import Mapping

from codesign.hw.lane_simulator import simulate_lanes
from codesign.hw.row_simulator import simulate_rows
from codesign.hw.simulation import GemmShape, Simulation, Trace
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.tile_simulator import simulate_tiles
from codesign.hw.timeline import Watched
from codesign.hw.window_simulator import simulate_windows

__all__ = ["GemmShape", "Simulation", "Trace", "simulate"]


def simulate(
    trace: Trace,
    spec: AcceleratorSpec,
    gemm_shapes: Mapping[str, GemmShape],
    *,
    is_causal: bool = False,
    watched: Watched | None = None,
) -> Simulation:
    """Runs a batch through a machine.

    Args:
      trace: Keep decisions `[L, B, H, R, T, S]` and deployed widths: `qk_bits`, `v_bits` `[L]`, `<site>.weight_bits`,
        `<site>.activation_bits` `[L]` (`[1]` outside the blocks), and the mechanism's own, without which nothing is
        filtered and the attention is dense on the last mask.
      spec: The machine; the rules of its units and its processing elements say which simulator runs.
      gemm_shapes: Linear layers by site.
      is_causal: Whether a token attends to itself and to those before it only; it says which pairs exist before
        anything is filtered.
      watched: Whose timeline to keep.

    Raises:
      PresetError: If no simulator has rules for this machine.
      UnknownNameError: If a linear site does not exist.
    """
    rules = {unit.rule for unit in spec.units.values()}
    run = (
        simulate_lanes
        if spec.processing_elements is not None
        else simulate_tiles
        if "blocks" in rules
        else simulate_windows
        if "groups" in rules
        else simulate_rows
    )
    return run(trace, spec, gemm_shapes, is_causal=is_causal, watched=watched)
