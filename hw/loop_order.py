"""What the order of a tiled product's loops costs: AccelTran's study of operand reuse in a few lanes; NumPy only.

Tile operations of out[b, i, j] += x[b, i, k] w[b, k, j] are dealt to the lanes one by one, in the order
of the loops. A lane reads both operand tiles from the activation buffer, unless it holds them still.

References:
  Tuli, Jha, "AccelTran", arXiv 2302.14705, figure on data flows; repository jha-lab/acceltran.
"""

import itertools
import math
from dataclasses import dataclass

from codesign import units
from codesign.errors import UnknownNameError
from codesign.hw.acceltran_estimator import Machine

ORDERS = tuple("".join(order) for order in itertools.permutations("bijk"))
"""All nests of the four loops, outermost first."""


@dataclass(frozen=True, kw_only=True)
class LoopOrderCost:
    """Reused operand tiles, cycles, and energies in nJ of one product."""

    reuse: int
    cycles: int
    dynamic_nj: float
    leakage_nj: float


def loop_order_cost(
    order: str,
    shape: tuple[int, int, int],
    machine: Machine,
    *,
    num_lanes: int = 4,
    activation_sparsity: float = 0.5,
) -> LoopOrderCost:
    """Returns what a batch of products takes in one order of the loops.

    Args:
      order: Nest of the loops, outermost first, as `bijk`.
      shape: Sizes (i, k, j) in elements: rows, inner size, columns.
      machine: Batch, tile, and the constants.
      num_lanes: Lanes that share the work; one more cycle than the work itself goes to each tile.
      activation_sparsity: Fraction of zeros, in [0, 1).

    Raises:
      UnknownNameError: If the order is not a nest of the four loops.
    """
    if order not in ORDERS:
        raise UnknownNameError(
            f"unknown loop order `{order}`: write the letters b, i, j, k once each, outermost first"
        )
    rows, inner, cols = shape
    counts = {
        "b": math.ceil(machine.batch / machine.tile_b),
        "i": math.ceil(rows / machine.tile_x),
        "j": math.ceil(cols / machine.tile_y),
        "k": math.ceil(inner / machine.tile_y),
    }
    place = {letter: order.index(letter) for letter in order}
    held: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = [None] * num_lanes
    reuse = 0
    nest = itertools.product(*(range(counts[letter]) for letter in order))
    for index, step in enumerate(nest):
        # The study tells the second operand's tiles apart by batch and inner index only.
        operands = tuple(
            tuple(step[place[letter]] for letter in letters) for letters in ("bik", "bk")
        )
        last = held[index % num_lanes]
        if last is not None:
            reuse += sum(new == old for new, old in zip(operands, last, strict=True))
        held[index % num_lanes] = (operands[0], operands[1])
    tiles = math.prod(counts.values())
    macs = machine.tile_b * machine.tile_x * machine.tile_y**2
    service = math.ceil(macs / machine.multipliers * (1.0 - activation_sparsity))
    storage = machine.spec.storage
    assert storage is not None and storage.activations is not None
    buffer = machine.spec.memories[storage.activations].energy.value
    blocks = machine.tile_b * machine.tile_x * machine.tile_y / machine.constants.block.value
    read_nj = buffer * math.sqrt(machine.activation_mb) * blocks
    megahertz = machine.spec.clock_hz / units.HZ_PER_MHZ
    return LoopOrderCost(
        reuse=reuse,
        cycles=math.ceil(tiles / num_lanes) * (service + 1),
        dynamic_nj=tiles * machine.lane.dynamic.value * service / megahertz
        + read_nj * (2 * tiles - reuse),
        leakage_nj=tiles * machine.lane.leakage.value * service / megahertz,
    )
