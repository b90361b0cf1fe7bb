"""How long windows of rows take through two stages, where groups of lanes take a head of a window each.

Rules: docs/cost_model.md, section 6, ESACT. Arrays are `[B, L]`, or by head `[B, L, H]`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from codesign.hw.accelerator import Accelerator, UnitStructure
from codesign.hw.engine import flat_cycles, head_cycles, passes, waiting
from codesign.hw.gemm.counting import ceil
from codesign.hw.host import Maximum
from codesign.hw.traffic import stream_bytes
from codesign.workload import PORTIONS, Workload


@struct.dataclass
class _Array:
    """Times of the array, cycles.

    Attributes:
      total: All its work, waiting for the last group and for a head's first keys included.
      task: A head's window on the group that takes it, of the heaviest head, without keys made for others.
      first: The same of a head's first window, with the keys that it makes.
      linear: What all groups share behind the heads.
      attend: Attention without what is waited for.
    """

    total: jax.Array
    task: jax.Array
    first: jax.Array
    linear: jax.Array
    attend: jax.Array


_WITH_PAIRS = ("filter0", "select")
"""Stages of operations whose number goes with the pairs of a row that exist."""
_WITH_KEPT = ("similarity", "qk", "softmax", "pv", "fetch")
"""Stages of operations whose number goes with the keys of a row that are kept; others are alike for every row."""


def window_cycles(
    busy: dict[str, jax.Array], workload: Workload, accelerator: Accelerator, maximum: Maximum
) -> jax.Array:
    """Returns the latency of a layer, `[B, L]`.

    The second stage starts when the first window is predicted, and ends no earlier than it takes the last window after the
    first stage has ended. If keys of all tokens are needed, they are predicted before the first window.

    Args:
      busy: Time by unit and memory.
      workload: What they work on.
      accelerator: A machine whose first stage predicts and whose second is led by a unit of rule `groups`.
      maximum: Combines times that overlap.
    """
    structure = accelerator.structure
    unit = next(unit for unit in structure.units if unit.rule == "groups")
    windows = jnp.maximum(workload.block_gemms["out"].rows / structure.rows_at_once, 1.0)
    is_causal = _is_causal(workload)
    piped = {name for stage in structure.stages for name in stage}
    array = _array(unit, busy[unit.name], workload, accelerator, is_causal)
    first, chained = (
        [name for name in stage if name in busy and name != unit.name] for stage in structure.stages
    )
    # Chained units take windows in order: they start with the second when the heads of the first have ended.
    held = array.first + array.linear / windows
    rest = 1.0 - 1.0 / windows
    cycles = [maximum([array.total, *(busy[name] * rest + held for name in chained)])]
    tokens, output = (_moved(name, workload, accelerator) for name in ("tokens", "ffn_output"))
    tokens = tokens * (1.0 + is_causal * (1.0 / windows - 1.0))
    memories = [value for name, value in busy.items() if name not in piped]
    if first:
        keys = _predicted_keys(workload, accelerator) * (1.0 - is_causal)
        own = structure.unit_of("predict.shift_add").name
        after = maximum([busy[name] - keys if name == own else busy[name] for name in first])
        # Rows of a causal model grow: the last window has nearly twice the mean.
        growth = 1.0 + is_causal * (1.0 - 1.0 / windows)
        last = maximum([array.task, *(busy[name] / windows for name in chained)]) * growth
        cycles[0] = cycles[0] + keys + after / windows
        cycles.append(keys + after + last + array.linear / windows)
        # Late windows may be longer in one stage and not in the other: then neither end decides.
        work = [_by_portion(name, workload, accelerator, is_causal) for name in first]
        if own in first:
            work[first.index(own)] -= keys[..., None] / PORTIONS
        others = (array.total - array.attend)[..., None] / PORTIONS
        work.append(array.attend[..., None] * _kept_shares(workload) + others)
        work += [_by_portion(name, workload, accelerator, is_causal) for name in chained]
        both = jnp.minimum(after, array.total) / windows  # One window is in both stages.
        cycles.append(keys + _passage(work) + both)
    if structure.memory_overlaps:
        # Nothing starts before its tokens are there, and the last output follows its window.
        cycles = [one + tokens + output / windows for one in cycles]
        return maximum([*cycles, *memories]) + structure.drain_cycles
    return functools.reduce(jnp.add, memories, maximum(cycles)) + structure.drain_cycles


def _kept_shares(workload: Workload) -> jax.Array:
    """Returns the share of kept keys by portions of the rows, in order, `[B, L, P]`."""
    kept = jnp.sum(workload.rows["attention"].portions[..., 0], axis=2)
    return kept / jnp.maximum(jnp.sum(kept, axis=2, keepdims=True), 1e-9)


def _by_portion(
    name: str, workload: Workload, accelerator: Accelerator, is_causal: jax.Array
) -> jax.Array:
    """Returns the cycles of a unit on portions of the windows, in order, `[B, L, P]`."""
    unit = next(unit for unit in accelerator.structure.units if unit.name == name)
    even = jnp.full((1, 1, PORTIONS), 1.0 / PORTIONS)
    growing = (2.0 * jnp.arange(PORTIONS) + 1.0)[None, None, :] / PORTIONS**2
    with_pairs, with_kept = even + is_causal[..., None] * (growing - even), _kept_shares(workload)
    cycles = jnp.zeros((1, 1, PORTIONS))
    for key, operation in workload.operations.items():
        stage = key.partition(".")[0]
        share = with_pairs if stage in _WITH_PAIRS else with_kept if stage in _WITH_KEPT else even
        some: Workload = workload.replace(operations={key: operation})  # type: ignore[attr-defined]
        for value in head_cycles(unit, some, accelerator.sizes).values():
            cycles = cycles + jnp.sum(value, axis=2)[..., None] * share
    return cycles


def _passage(work: list[jax.Array]) -> jax.Array:
    """Returns when the last of units in order has ended all portions, of `[B, L, P]` cycles each, `[B, L]`.

    A unit starts a portion when the one before does, and ends it no earlier.
    """
    shape = jnp.broadcast_shapes(*(one.shape for one in work))
    in_order = [jnp.moveaxis(jnp.broadcast_to(one, shape), 2, 0) for one in work]

    def portion(ends: list[jax.Array], cycles: list[jax.Array]) -> tuple[list[jax.Array], None]:
        start, done = ends[0], ends[0]
        new = []
        for end, one in zip(ends, cycles, strict=True):
            start = jnp.maximum(start, end)
            done = jnp.maximum(done, start + one)
            new.append(done)
        return new, None

    ends = [jnp.zeros(shape[:2], one.dtype) for one in in_order]
    return jax.lax.scan(portion, ends, in_order)[0][-1]


def _array(
    unit: UnitStructure,
    busy: jax.Array,
    workload: Workload,
    accelerator: Accelerator,
    is_causal: jax.Array,
) -> _Array:
    """Returns the times of the array, of whose `busy` linear work is what is not attention nor the making of keys."""
    windows = jnp.maximum(workload.block_gemms["out"].rows / unit.group_rows, 1.0)
    waited = jnp.zeros(())

    def by_head(keys: tuple[str, ...]) -> jax.Array:
        """Returns the work of all groups on operations, `[B, L, H]`, and adds it with the waiting to `waited`."""
        nonlocal waited
        own = {key: value for key, value in workload.operations.items() if key in keys}
        if not own:
            return jnp.zeros((1, 1, 1))
        some: Workload = workload.replace(operations=own)  # type: ignore[attr-defined]
        cycles = head_cycles(unit, some, accelerator.sizes)[unit.name]
        waited = waited + jnp.sum(cycles, axis=2)
        return cycles / waiting(unit, cycles, workload)

    attend, make = by_head(("qk.mac", "pv.mac")), by_head(("generate.mac",))
    products = {
        site: one.rows * float(one.inner * one.outer) for site, one in workload.block_gemms.items()
    }
    linear = busy - waited
    queries = linear * products["qkv"] / functools.reduce(jnp.add, products.values())
    linear = linear - queries
    rows = workload.rows["attention"].queries
    queries = rows * (queries / jnp.maximum(jnp.sum(rows, axis=2), 1.0))[..., None]
    heads = rows.shape[-1]
    groups = unit.groups if unit.shares_heads else min(unit.groups, heads)
    rounds = max(1.0, heads / groups)
    # What a window of a head takes on one group.
    each = (attend + queries + is_causal[..., None] * make) / windows[..., None] * groups
    task = jnp.max(each, axis=2)
    work = jnp.sum(attend, axis=2)
    # Attention of a head waits for the keys that its first window makes, on one group.
    share = _first_share(workload, windows) * (1.0 - is_causal[..., None])
    first = jnp.max(make * share, axis=2) * groups * rounds
    if unit.shares_heads:
        growth = 1.0 + is_causal * (1.0 - 1.0 / windows)
        behind = 0.5 * (1.0 - 1.0 / groups) * task * growth
        # Other groups make queries and keys of one task each meanwhile, and wait.
        begun = jnp.minimum(groups / (windows * heads), 1.0) * (1.0 - is_causal)
        later = make * (1.0 - share) ** max(groups / heads, 1.0)
        made = first + jnp.sum(later, axis=2) + jnp.sum(queries, axis=2) * (1.0 - begun)
        total = jnp.maximum(work + behind, task) + made
    else:
        together = attend + queries + make
        total = jnp.sum(together * waiting(unit, together, workload), axis=2)
    task = task * rounds
    return _Array(total=total + linear, task=task, first=first + task, linear=linear, attend=work)


def _first_share(workload: Workload, windows: jax.Array) -> jax.Array:
    """Returns the share of a head's keys that its first window wants, `[B, L, H]`: the mean window's, over all made."""
    operations = workload.operations
    if "generate.mac" not in operations:
        return jnp.zeros((1, 1, 1))
    if "generate.bytes" in operations:
        wanted, mean = (operations[f"{one}.bytes"].count for one in ("generate", "fetch"))
        mean = mean / ceil(windows)[..., None]
    else:
        pair = 2.0 * workload.head_dim * workload.block_gemms["qkv"].inner
        wanted = operations["generate.mac"].count / pair
        rows = jnp.maximum(workload.rows["attention"].queries, 1.0)
        mean = operations["qk.mac"].count / workload.head_dim / rows
    return jnp.minimum(mean / jnp.maximum(wanted, 1e-9), 1.0)


def _moved(name: str, workload: Workload, accelerator: Accelerator) -> jax.Array:
    """Returns the cycles of main memory for a stream; 0 where the workload has none of the name."""
    if name not in workload.streams:
        return jnp.zeros(())
    own = {name: workload.streams[name]}
    some: Workload = workload.replace(streams=own)  # type: ignore[attr-defined]
    return stream_bytes(some, accelerator) / accelerator.sizes["dram.bytes_per_cycle"]


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
    beyond = tokens * (tokens - 1.0) / 2.0
    return jnp.clip((tokens**2 - pairs) / jnp.maximum(beyond, 1e-9), 0.0, 1.0)
