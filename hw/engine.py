"""Time, energy and area of a machine's own units and memories.

Rules: docs/cost_model.md, sections 2, 3 and 5. Arrays are `[B, L]` unless they say otherwise.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import struct

from codesign import gates, units
from codesign.hw.accelerator import Accelerator, UnitStructure
from codesign.hw.gemm.counting import ceil
from codesign.hw.rows import steps_by_portion
from codesign.vocabulary import matches
from codesign.workload import PORTIONS, Workload

OPERAND_SITES = {"qk.mac": ("query", "key"), "pv.mac": ("probabilities", "value")}
"""Tensors that enter the products of attention; their densities are those of the workload."""


@struct.dataclass
class EngineCost:
    """What work takes on the machine's own units: `cycles` of latency, and parts by name.

    Attributes:
      cycles: What the work adds to the latency.
      busy_cycles: Time by unit and memory, before any overlap.
      energy_pj: Energy by unit and memory, pJ.
    """

    cycles: jax.Array
    busy_cycles: dict[str, jax.Array]
    energy_pj: dict[str, jax.Array]


def add_to(parts: dict[str, jax.Array], name: str, value: jax.Array) -> None:
    """Adds a value to the part of a name."""
    parts[name] = parts[name] + value if name in parts else value


def lanes_of(unit: UnitStructure, sizes: dict[str, jax.Array]) -> jax.Array:
    """Returns all lanes of a unit, those of every processing element together, scalar."""
    lanes = sizes[f"{unit.name}.lanes"]
    return lanes * sizes["processing_elements"] if "processing_elements" in sizes else lanes


def _extent(unit: UnitStructure, sizes: dict[str, jax.Array]) -> jax.Array:
    """Returns the lanes of a unit, or their elements, of which each has its area and leakage, scalar."""
    lanes = lanes_of(unit, sizes)
    return lanes * sizes[f"{unit.name}.width"] if unit.is_area_per_element else lanes


def passes(bits_a: jax.Array, bits_b: jax.Array, unit: UnitStructure) -> jax.Array | float:
    """Returns the passes of an operation through sliced multipliers, of the shape of the bits."""
    result: jax.Array | float = 1.0
    for bits, width in ((bits_a, unit.slice_a), (bits_b, unit.slice_b)):
        if width is not None:
            result = result * ceil(bits / width)
            if unit.scales_with_bits:
                result = result * (bits / width)
    return result


def flat_cycles(
    unit: UnitStructure,
    count: jax.Array,
    effectual: jax.Array | float,
    sizes: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """Returns the cycles of operations of which a fraction is effectual: to execute, and to start them.

    Keys are names as in `UnitStructure.resources`; the second is there where the unit has a bound.
    """
    slots = lanes_of(unit, sizes) * unit.per_lane
    if unit.has_width:
        slots = slots * sizes[f"{unit.name}.width"]
    cycles = {unit.name: count * effectual / slots}
    if math.isfinite(unit.issue_rate):
        cycles[unit.resources[1]] = count / (slots * unit.issue_rate)
    return cycles


def unit_cycles(
    unit: UnitStructure, workload: Workload, sizes: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Returns the cycles a unit works on a layer's attention; empty where the workload feeds it nothing."""
    by_head = head_cycles(unit, workload, sizes)
    return {name: jnp.sum(value, axis=2) for name, value in by_head.items()}


def head_cycles(
    unit: UnitStructure, workload: Workload, sizes: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Returns the cycles a unit works on each head, `[B, L, H]`; empty if on none."""
    if unit.rule == "rows":
        parts = portion_cycles(unit, workload, sizes)
        return {name: jnp.sum(value, axis=3) for name, value in parts.items()}
    cycles: dict[str, jax.Array] = {}
    for key, operation in workload.operations.items():
        if not matches(key, unit.paces):
            continue
        count = operation.count
        if unit.rule == "blocks":
            count = count * _filled(workload, lanes_of(unit, sizes))
        repeats = passes(operation.bits_a, operation.bits_b, unit)
        share = effectual_share(key, unit, workload) if key in OPERAND_SITES else 1.0
        for name, value in flat_cycles(unit, count, share, sizes).items():
            add_to(cycles, name, value * repeats)
    if unit.rule == "groups" and cycles:
        longer = waiting(unit, cycles[unit.name], workload)
        cycles = {name: value * longer for name, value in cycles.items()}
    return cycles


def portion_cycles(
    unit: UnitStructure, workload: Workload, sizes: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Returns the cycles of a unit that rows pass on equal portions of a head's rows, `[B, L, H, P]`; empty if none do."""
    steps_per_key = ceil(workload.head_dim / sizes[f"{unit.name}.width"]) if unit.has_width else 1.0
    lanes = lanes_of(unit, sizes)
    cycles: dict[str, jax.Array] = {}
    queries = None
    for key, operation in workload.operations.items():
        if not matches(key, unit.paces):
            continue
        repeats = passes(operation.bits_a, operation.bits_b, unit) * jnp.ones((1, 1, 1))
        rows = workload.rows[key.partition(".")[0] if unit.rows == "filter*" else str(unit.rows)]
        steps = steps_by_portion(rows, lanes)
        add_to(cycles, unit.name, steps * (repeats * steps_per_key / unit.per_lane)[..., None])
        queries = rows.queries
    if queries is not None and unit.overhead_cycles:
        overhead = queries * (unit.overhead_cycles / PORTIONS)
        add_to(cycles, unit.name, overhead[..., None])
    return cycles


def waiting(unit: UnitStructure, cycles: jax.Array, workload: Workload) -> jax.Array:
    """Returns by how much groups of lanes take longer because some wait for the last, at least 1, `[B, L, 1]`.

    G groups that share heads take windows as they come, x each: half a window is waited for by all but the last, so that
    `1 + (1 - 1 / G) / (2 x)` of the work is time, at least one window. Else heads are dealt to groups, and the one with
    most work decides.

    Args:
      unit: Its groups.
      cycles: Work of every head, `[B, L, H]`.
      workload: Its rows.

    References:
      ESACT (arXiv 2512.02403) allocates compute to heads dynamically; both formulas are reconstructions.
    """
    heads = cycles.shape[-1]
    if unit.shares_heads:
        windows = ceil(workload.block_gemms["out"].rows / unit.group_rows)
        share = jnp.maximum(windows * (heads / unit.groups), 1.0 / unit.groups)
        behind = 1.0 + 0.5 * (1.0 - 1.0 / unit.groups) / share
        return jnp.maximum(behind, 1.0 / share)[..., None]
    groups = min(unit.groups, heads)
    number = -(-heads // groups)
    dealt = jnp.pad(cycles, ((0, 0), (0, 0), (0, number * groups - heads)))
    dealt = jnp.sum(jnp.reshape(dealt, (*cycles.shape[:2], number, groups)), axis=2)
    own = jnp.asarray([len(range(group, heads, groups)) for group in range(groups)], cycles.dtype)
    most = jnp.max(dealt / own[None, None, :], axis=-1, keepdims=True)
    mean = jnp.mean(cycles, axis=-1, keepdims=True)
    return jnp.where(mean > 0.0, most / jnp.where(mean > 0.0, mean, 1.0), 1.0)


def _filled(workload: Workload, lanes: jax.Array) -> jax.Array:
    """Returns by how much the rows of a head grow when they fill up the lanes, at least 1, `[B, L, H]`."""
    queries = jnp.maximum(workload.rows["attention"].queries, 1.0)
    return ceil(queries / lanes) * lanes / queries


def effectual_share(site: str, unit: UnitStructure, workload: Workload) -> jax.Array:
    """Returns the fraction of a product's pairs without a zero by head, `[B, L, H]`, 1 for units that do not skip any.

    Where the workload says how they lie in tiles it is their count, with the slopes of the two densities; else zeros of the
    two operands are taken as independent.

    Args:
      site: An operation of attention, or a linear layer.
      unit: The unit that multiplies.
      workload: Its densities and tiles.
    """
    one = jnp.ones((1, 1, 1))
    if not unit.skips_zeros:
        return one
    operands = OPERAND_SITES.get(site, (site, f"{site}.weight"))
    share = one
    for operand in operands:
        share = share * jnp.asarray(workload.densities.get(operand, jnp.ones((1, 1))))[..., None]
    tiles = workload.tiles.get(site.removesuffix(".mac"))
    if tiles is None:
        return share
    constant = gates.detach(share)
    return share * jnp.where(
        constant > 0.0, tiles.effectual / jnp.where(constant > 0.0, constant, 1.0), 0.0
    )


def price_pj(
    unit: UnitStructure, kind: str, bits_a: jax.Array, bits_b: jax.Array
) -> jax.Array | float:
    """Returns the energy of one operation, pJ, of the shape of the bits."""
    constant, product = unit.price(kind)
    return constant + product * (bits_a * bits_b) if product else constant


def operation_energy_pj(workload: Workload, accelerator: Accelerator) -> dict[str, jax.Array]:
    """Returns a layer's attention by unit and by the buffer its operands come from."""
    structure = accelerator.structure
    per_byte = buffer_pj_per_byte(accelerator)
    energy: dict[str, jax.Array] = {}
    for key, operation in workload.operations.items():
        kind = key.partition(".")[2]
        if kind == "bits" and not structure.prices_index_lists:
            continue
        unit = structure.unit_of(key)
        bits_a, bits_b = operation.bits_a[..., 0], operation.bits_b[..., 0]
        share = effectual_share(key, unit, workload) if key in OPERAND_SITES else 1.0
        count = jnp.sum(operation.count * share, axis=2)
        add_to(energy, unit.name, count * price_pj(unit, kind, bits_a, bits_b))
        for buffer, rows in unit.reads_of(key):
            read_bytes = count * (bits_b / (units.BITS_PER_BYTE * rows))
            add_to(energy, buffer, read_bytes * per_byte[buffer])
    return energy


def add_element_energy(
    energy_pj: dict[str, jax.Array], busy_cycles: dict[str, jax.Array], accelerator: Accelerator
) -> None:
    """Adds what the blocks beside the units draw while the unit that drives them works."""
    elements = accelerator.structure.elements
    if elements is not None and elements.driven_by in busy_cycles:
        drawn = accelerator.sizes["processing_elements"] * elements.dynamic_pj_per_cycle
        energy_pj["processing_elements"] = busy_cycles[elements.driven_by] * drawn


def buffer_bytes(accelerator: Accelerator) -> dict[str, jax.Array]:
    """Returns the capacity of every memory, byte, scalars."""
    structure, sizes = accelerator.structure, accelerator.sizes
    result = {}
    for buffer in structure.buffers:
        if buffer.is_sized:
            result[buffer.name] = sizes[f"{buffer.name}.bytes"]
        elif buffer.follows_query_block and structure.query_block is not None:
            per_row = buffer.capacity_bytes / structure.query_block
            result[buffer.name] = sizes["query_block"] * per_row
        else:
            result[buffer.name] = jnp.asarray(buffer.capacity_bytes)
    return result


def buffer_pj_per_byte(accelerator: Accelerator) -> dict[str, jax.Array]:
    """Returns the energy of a byte in and out of every memory, pJ/B, scalars."""
    capacity = buffer_bytes(accelerator)
    result = {}
    for buffer in accelerator.structure.buffers:
        result[buffer.name] = jnp.asarray(buffer.energy_pj_per_byte)
        if accelerator.structure.buffer_energy_scales:
            growth = capacity[buffer.name] / buffer.energy_at_bytes
            result[buffer.name] = result[buffer.name] * jnp.sqrt(growth)
    return result


def area_mm2(accelerator: Accelerator) -> dict[str, jax.Array]:
    """Returns the area of units, memories and processing elements, mm2, scalars."""
    structure, sizes = accelerator.structure, accelerator.sizes
    area = {}
    for unit in structure.units:
        area[unit.name] = _extent(unit, sizes) * unit.mm2
    capacity = buffer_bytes(accelerator)
    for buffer in structure.buffers:
        area[buffer.name] = capacity[buffer.name] * buffer.mm2_per_byte
    if structure.elements is not None:
        area["processing_elements"] = sizes["processing_elements"] * structure.elements.mm2
    if structure.rest_mm2:
        area["rest"] = jnp.asarray(structure.rest_mm2)
    return area


def standing_pj_per_cycle(accelerator: Accelerator) -> jax.Array | None:
    """Returns what is drawn in every cycle whether anything works or not, pJ, scalar; None if nothing."""
    structure, sizes = accelerator.structure, accelerator.sizes
    capacity = buffer_bytes(accelerator)
    parts = [
        _extent(unit, sizes) * unit.leakage_pj_per_cycle
        for unit in structure.units
        if unit.leakage_pj_per_cycle
    ]
    parts += [
        capacity[buffer.name] * buffer.leakage_pj_per_cycle
        for buffer in structure.buffers
        if buffer.leakage_pj_per_cycle
    ]
    if structure.elements is not None:
        parts.append(sizes["processing_elements"] * structure.elements.leakage_pj_per_cycle)
    if structure.standing_pj_per_cycle:
        parts.append(jnp.asarray(structure.standing_pj_per_cycle))
    return functools.reduce(jnp.add, parts) if parts else None
