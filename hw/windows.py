"""How long windows of rows take through two stages, where groups of lanes take a head of a window each.

Rules: docs/cost_model.md, section 6, ESACT. Arrays are `[B, L]`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from codesign.hw.accelerator import Accelerator, UnitStructure
from codesign.hw.engine import flat_cycles, head_cycles, passes, waiting
from codesign.hw.host import Maximum, ceil
from codesign.workload import Workload


def window_cycles(
    busy: dict[str, jax.Array], workload: Workload, accelerator: Accelerator, maximum: Maximum
) -> jax.Array:
    """Returns the latency of a layer, `[B, L]`.

    Args:
      busy: Time by unit and memory.
      workload: What they work on.
      accelerator: A machine whose first stage predicts and whose second is led by a unit of rule `groups`.
      maximum: Combines times that overlap.
    """
    structure = accelerator.structure
    unit = next(unit for unit in structure.units if unit.rule == "groups")
    windows = jnp.maximum(workload.block_gemms["out"].rows / structure.rows_at_once, 1.0)
    last_window, is_causal = 1.0 / windows, _is_causal(workload)
    piped = {name for stage in structure.stages for name in stage}
    first, second = (
        [name for name in stage if name in busy and name != unit.name] for stage in structure.stages
    )
    array = _array(unit, workload, accelerator)
    chained = [busy[name] for name in second]
    linear = busy[unit.name] - array.waited
    taken = array.attend + jnp.maximum(array.make + linear * array.query_part, array.first)
    taken = maximum([taken + linear * (1.0 - array.query_part), *chained])
    # The last window: a head on one group, then what all groups share.
    growth = 1.0 + is_causal * (1.0 - last_window)
    left = maximum([array.task, *(one * last_window for one in chained)]) * growth + linear * last_window
    fill, predicted = jnp.zeros(()), []
    if first:
        keys = _predicted_keys(workload, accelerator) * (1.0 - is_causal)
        own = accelerator.structure.unit_of("predict.shift_add").name
        rest = maximum([busy[name] - keys if name == own else busy[name] for name in first])
        fill = keys + rest * last_window
        predicted = [keys + rest + left]
    memories = [value for name, value in busy.items() if name not in piped]
    if structure.memory_overlaps:
        cycles = maximum([taken + fill, *predicted, *memories])
    else:
        cycles = functools.reduce(jnp.add, memories, maximum([taken + fill, *predicted]))
    return cycles + structure.drain_cycles


@struct.dataclass
class _Array:
    """Times of the groups, cycles.

    Attributes:
      waited: What `busy` has of attention and of making keys and values, waiting included.
      attend: Attention, waiting included.
      make: Making keys and values, on all groups.
      first: The same of a head's first window, on the group that takes it.
      task: Attention of a head's window on the group that takes it.
      query_part: Part of the linear work that makes queries.
    """

    waited: jax.Array
    attend: jax.Array
    make: jax.Array
    first: jax.Array
    task: jax.Array
    query_part: jax.Array


def _array(unit: UnitStructure, workload: Workload, accelerator: Accelerator) -> _Array:
    sizes, structure = accelerator.sizes, accelerator.structure

    def cycles(keys: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
        """Returns the cycles of operations on every head, `[B, L, H]`, and those of all, waiting included."""
        own = {key: value for key, value in workload.operations.items() if key in keys}
        if not own:
            return jnp.zeros((1, 1, 1)), jnp.zeros(())
        some: Workload = workload.replace(operations=own)  # type: ignore[attr-defined]
        by_head = head_cycles(unit, some, sizes)[unit.name]
        return by_head / waiting(unit, by_head, workload), jnp.sum(by_head, axis=2)

    work, attend_waited = cycles(("qk.mac", "pv.mac"))
    made, make_waited = cycles(("generate.mac",))
    heads = workload.operations["qk.mac"].count.shape[-1]
    windows = ceil(workload.block_gemms["out"].rows / structure.rows_at_once)
    groups = float(unit.groups if unit.shares_heads else min(unit.groups, heads))
    rounds = max(1.0, heads / groups)
    task = jnp.max(work, axis=2) * groups / windows * rounds
    attend, make, first = attend_waited, make_waited, jnp.zeros(())
    if unit.shares_heads:
        attend = jnp.maximum(jnp.sum(work, axis=2) + 0.5 * (1.0 - 1.0 / groups) * task, task)
        make = jnp.sum(made, axis=2)
        if "generate.bytes" in workload.operations:
            fetched, wanted = (
                workload.operations[f"{name}.bytes"].count for name in ("fetch", "generate")
            )
            part = jnp.minimum(fetched / windows[..., None] / jnp.maximum(wanted, 1e-9), 1.0)
            part = part + _is_causal(workload)[..., None] * (1.0 / windows[..., None] - part)
            first = jnp.max(made * part, axis=2) * groups * rounds
    gemms = workload.block_gemms
    products = {site: one.rows * float(one.inner * one.outer) for site, one in gemms.items()}
    total = functools.reduce(jnp.add, products.values())
    return _Array(
        waited=attend_waited + make_waited,
        attend=attend,
        make=make,
        first=first,
        task=task,
        query_part=products["qkv"] / jnp.maximum(total, 1.0),
    )


def _predicted_keys(workload: Workload, accelerator: Accelerator) -> jax.Array:
    """Returns the cycles of predicting the keys of all tokens: half of the products with weights."""
    operation = workload.operations["predict.shift_add"]
    unit = accelerator.structure.unit_of("predict.shift_add")
    cycles = flat_cycles(unit, jnp.sum(operation.count, axis=2) / 2.0, 1.0, accelerator.sizes)
    return cycles[unit.name] * passes(operation.bits_a[..., 0], operation.bits_b[..., 0], unit)


def _is_causal(workload: Workload) -> jax.Array:
    """Returns 1 where a token attends to itself and those before it only, 0 where to all, read off the existing pairs."""
    operations = workload.operations
    key = "filter0.shift_add" if "filter0.shift_add" in operations else "qk.mac"
    heads = operations[key].count.shape[-1]
    tokens = workload.block_gemms["out"].rows
    pairs = jnp.sum(operations[key].count, axis=2) / (heads * workload.head_dim)
    full, half = tokens**2, tokens * (tokens + 1.0) / 2.0
    return jnp.clip((full - pairs) / jnp.maximum(full - half, 1e-9), 0.0, 1.0)
