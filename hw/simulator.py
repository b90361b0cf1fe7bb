"""Row-by-row simulator of a filtering attention engine on the actual masks of a batch; NumPy only.

The independent check of the differentiable cost: same machine file, but every count comes from the
masks, every ceil is a ceil, and rows move through the stages one by one, a stage running ahead of
the next by at most the index queue. Heads follow one another; main memory streams alongside.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from codesign import units
from codesign.errors import PresetError, UnknownNameError
from codesign.hw import energy
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.spec_tables import EnergyTable, Host, Unit
from codesign.vocabulary import LINEAR_SITES, matches

BLOCK_SITES = ("qkv", "out", "up", "down")
END_SITES = tuple(site for site in LINEAR_SITES if site not in BLOCK_SITES)


class Trace(Protocol):
    """What is read of a `codesign.workload.Trace`, which needs JAX to be imported."""

    @property
    def valid(self) -> np.ndarray:
        """Tokens that exist, bool `[B, S]`."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def bits(self) -> dict[str, np.ndarray]:
        """Deployed widths by knob or site, bit."""

    @property
    def packed(self) -> np.ndarray:
        """Packed masks; the leading axis is the layers."""

    def keep(self, layer: int) -> np.ndarray:
        """Returns one layer's masks after each round, bool `[B, H, R, T, S]`."""


@dataclass(frozen=True, kw_only=True)
class GemmShape:
    """Sizes of a linear layer, out[M, N] = x[M, K] w[K, N]: `inner` K, `outer` N.

    `rows` is M; None stands for the valid tokens of each example.
    """

    inner: int
    outer: int
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What the machine did; axes B examples, L layers, E linear layers outside the blocks.

    Attributes:
      operations: Counts by `stage.kind`, heads summed, `[B, L]`.
      stream_bytes: Bytes moved by stream, `[B, L]`.
      busy_cycles: Working time by unit and `dram`, `[B, L]`.
      attention_cycles: Latency of a layer's attention, `[B, L]`.
      unit_energy_pj: Energy by unit, buffer and `dram`, `[B, L]`.
      host_cycles: Latency of a block's linear layers, `[B, L]`.
      host_energy_pj: Their energy by part of the host, `[B, L]`.
      end_cycles: Latency of embed and head, `[B, E]`.
      end_energy_pj: Their energy by part of the host, `[B, E]`.
    """

    operations: dict[str, np.ndarray]
    stream_bytes: dict[str, np.ndarray]
    busy_cycles: dict[str, np.ndarray]
    attention_cycles: np.ndarray
    unit_energy_pj: dict[str, np.ndarray]
    host_cycles: np.ndarray
    host_energy_pj: dict[str, np.ndarray]
    end_cycles: np.ndarray
    end_energy_pj: dict[str, np.ndarray]

    def latency_cycles(self, scope: str) -> np.ndarray:
        """Returns cycles per example, `[B]`, of scope `attention` or `end_to_end`."""
        cycles: np.ndarray = self.attention_cycles.sum(axis=1)
        if _has_host(scope):
            cycles = cycles + self.host_cycles.sum(axis=1) + self.end_cycles.sum(axis=1)
        return cycles

    def energy_pj(self, scope: str) -> np.ndarray:
        """Returns pJ per example, `[B]`, of scope `attention` or `end_to_end`."""
        parts = list(self.unit_energy_pj.values())
        if _has_host(scope):
            parts += [*self.host_energy_pj.values(), *self.end_energy_pj.values()]
        total = np.zeros(self.attention_cycles.shape[0])
        for part in parts:
            total = total + part.sum(axis=1)
        return total


def _has_host(scope: str) -> bool:
    if scope not in ("attention", "end_to_end"):
        raise UnknownNameError(f"unknown scope `{scope}`: use one of attention, end_to_end")
    return scope == "end_to_end"


@dataclass(frozen=True, kw_only=True)
class _Masks:
    """Facts read off the masks; axes L, B, H, T.

    `keys[r]` is the number of keys of each query row that enter round r, the last entry what
    attention runs on, `[R + 1, L, B, H, T]`; `vectors` the key vectors fetched for them,
    `[R + 1, L, B, H]`; `valid` `[B, T]`.
    """

    keys: np.ndarray
    vectors: np.ndarray
    valid: np.ndarray


def simulate(
    trace: Trace,
    spec: AcceleratorSpec,
    gemm_shapes: Mapping[str, GemmShape],
    *,
    is_causal: bool = False,
) -> Simulation:
    """Runs a batch through a machine.

    Args:
      trace: Keep decisions `[L, B, H, R, T, S]` and deployed widths: `query_bits` `[L]`, `key_bits`
        `[L, R]`, `qk_bits`, `v_bits` `[L]`, `<site>.weight_bits`, `<site>.activation_bits` `[L]`
        (`[1]` for embed and head). Without `query_bits` nothing is filtered: the attention is dense
        on the last mask.
      spec: The machine; all its row-wise units must be paced by row statistics.
      gemm_shapes: Linear layers by site.
      is_causal: Whether a token attends to itself and to those before it only; it says which pairs
        exist before anything is filtered.

    Raises:
      PresetError: If the simulator has no rules for this machine.
      UnknownNameError: If a linear site does not exist.
    """
    host, table = _check_machine(spec)
    for site in gemm_shapes:
        if site not in LINEAR_SITES:
            raise UnknownNameError(
                f"unknown linear site `{site}`: use one of {', '.join(LINEAR_SITES)}"
            )
    bits = {name: np.asarray(value, np.int64) for name, value in trace.bits.items()}
    key_bits = bits["key_bits"] if "query_bits" in bits else None
    planes = [] if key_bits is None else list(np.diff(key_bits, axis=1, prepend=0).T)
    masks = _read_masks(trace, spec, bits, len(planes), is_causal)
    operations, widths = _count_operations(masks, bits, planes, trace.head_dim)
    stream_bytes = _count_bytes(masks, bits, planes, trace.head_dim, spec)
    moved = sum(stream_bytes.values(), start=np.zeros(masks.keys.shape[1:4]))
    row_cycles = {
        name: _row_cycles(name, spec, masks, widths, trace.head_dim) for name in spec.units
    }
    dram_cycles = moved / spec.dram_bytes_per_cycle
    attention = _run_pipeline(row_cycles, dram_cycles, masks.valid, spec)

    busy = {name: _per_example(cycles) for name, cycles in row_cycles.items()}
    counts = {key: _per_example(count) for key, count in operations.items()}
    unit_energy = _operation_energy(counts, widths, spec)
    unit_energy["dram"] = _per_example(moved) * energy.dram_pj_per_byte(spec)
    tokens = masks.valid.sum(axis=1)
    block_costs, end_costs = (
        [
            _host(gemm_shapes[site], site, bits, tokens, spec, host, table)
            for site in sites
            if site in gemm_shapes
        ]
        for sites in (BLOCK_SITES, END_SITES)
    )
    none = np.zeros(attention.T.shape)
    return Simulation(
        operations=counts,
        stream_bytes={name: _per_example(value) for name, value in stream_bytes.items()},
        busy_cycles=busy | {"dram": _per_example(dram_cycles)},
        attention_cycles=attention.T,
        unit_energy_pj=unit_energy,
        host_cycles=sum((cost["cycles"] for cost in block_costs), start=none),
        host_energy_pj={
            part: sum((cost[part] for cost in block_costs), start=none) for part in HOST_PARTS
        },
        end_cycles=_side_by_side([cost["cycles"] for cost in end_costs], len(tokens)),
        end_energy_pj={
            part: _side_by_side([cost[part] for cost in end_costs], len(tokens))
            for part in HOST_PARTS
        },
    )


HOST_PARTS = ("host.mac", "host.sram", "host.dram")


def _check_machine(spec: AcceleratorSpec) -> tuple[Host, EnergyTable]:
    """Returns the host and its prices.

    Raises:
      PresetError: If the machine is not one that filters rows and leaves linear layers to a host.
    """
    pipeline, lacking = spec.pipeline, []
    if spec.host is None:
        lacking.append("`host`")
    if spec.energy_table is None:
        lacking.append("`energy_table`")
    lacking += [
        f"`pipeline.{name}`"
        for name in ("query_block", "index_queue")
        if getattr(pipeline, name) is None
    ]
    lacking += [f"`memories.{name}`" for name in ("key", "value") if name not in spec.memories]
    if lacking or spec.host is None or spec.energy_table is None or spec.processing_elements:
        reason = f"needs {', '.join(lacking)}" if lacking else "knows no `processing_elements`"
        raise PresetError(
            f"{spec.name}: the row-by-row simulator {reason}: choose a machine that filters rows "
            "beside a host, such as `energon`, or ask the cost model alone"
        )
    for name, unit in spec.units.items():
        if unit.rule != "rows":
            raise PresetError(
                f"{spec.name}: `units.{name}.rule`: the simulator moves rows, so it needs rule `rows`: "
                "change the rule"
            )
    return spec.host, spec.energy_table


def _side_by_side(parts: list[np.ndarray], batch: int) -> np.ndarray:
    return np.concatenate([np.zeros((batch, 0)), *parts], axis=1)


def _per_example(value: np.ndarray) -> np.ndarray:
    """Sums `[L, B, ...]` over all but layers and examples and returns `[B, L]`."""
    total: np.ndarray = value.reshape(*value.shape[:2], -1).sum(axis=2).T
    return total


def _read_masks(
    trace: Trace,
    spec: AcceleratorSpec,
    bits: dict[str, np.ndarray],
    num_rounds: int,
    is_causal: bool,
) -> _Masks:
    assert spec.pipeline.query_block is not None
    valid = np.asarray(trace.valid, bool)
    head_bytes = valid.sum(axis=1) * trace.head_dim / units.BITS_PER_BYTE
    block = int(spec.pipeline.query_block.value)
    keys, vectors = [], []
    for layer in range(trace.packed.shape[0]):
        keep = trace.keep(layer)
        exists = valid[:, None, :, None] & valid[:, None, None, :]
        if is_causal:
            exists = exists & np.tril(np.ones(exists.shape[2:], bool))
        rounds = [keep[:, :, index] for index in range(num_rounds)] or [keep[:, :, -1]]
        first = [np.broadcast_to(exists, rounds[0].shape)] if num_rounds else []
        entering = [*first, *(mask & exists for mask in rounds)]
        fits = (head_bytes * bits["qk_bits"][layer] <= spec.memories["key"].capacity.base) & (
            head_bytes * bits["v_bits"][layer] <= spec.memories["value"].capacity.base
        )
        keys.append([mask.sum(axis=-1) for mask in entering])
        vectors.append(
            [
                np.where(fits[:, None], _fetched(mask, mask.shape[2]), _fetched(mask, block))
                for mask in entering
            ]
        )
    return _Masks(
        keys=np.moveaxis(np.asarray(keys, np.int64), 1, 0),
        vectors=np.moveaxis(np.asarray(vectors, np.int64), 1, 0),
        valid=valid,
    )


def _fetched(mask: np.ndarray, block: int) -> np.ndarray:
    """Returns the key vectors that blocks of `block` queries fetch, `[B, H]`, of a mask `[B,H,T,S]`."""
    starts = np.arange(0, mask.shape[2], block)
    wanted = np.logical_or.reduceat(mask, starts, axis=2)
    fetched: np.ndarray = wanted.sum(axis=(2, 3))
    return fetched


def _count_operations(
    masks: _Masks, bits: dict[str, np.ndarray], planes: list[np.ndarray], head_dim: int
) -> tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Returns counts `[L, B, H]` and the widths `[L]` of both operands, by operation."""
    alive = masks.keys.sum(axis=-1)
    final = alive[-1]
    queries = np.broadcast_to(masks.valid.sum(axis=1)[None, :, None], final.shape)
    qk, value = bits["qk_bits"], bits["v_bits"]
    operations = {
        "qk.mac": final * head_dim,
        "softmax.exp": final,
        "softmax.reciprocal": queries,
        "pv.mac": final * head_dim,
        "output.multiply": queries * head_dim,
    }
    widths = {key: (qk, qk) for key in operations}
    widths |= {"pv.mac": (qk, value), "output.multiply": (qk, value)}
    for index, plane in enumerate(planes):
        for kind, factor in (("mac", head_dim), ("statistic", 1), ("compare", 1)):
            operations[f"filter{index}.{kind}"] = alive[index] * factor
            widths[f"filter{index}.{kind}"] = (bits["query_bits"], plane)
    if planes:
        one = np.ones_like(qk)
        # Of the example's own keys, whatever it is padded to.
        longest = [max(int(number - 1).bit_length(), 1) for number in masks.valid.sum(axis=1)]
        index_bits = np.asarray(longest)[None, :, None]
        operations["threshold.evaluate"] = queries * len(planes)
        operations["index.bits"] = alive[1:].sum(axis=0) * index_bits
        widths |= {"threshold.evaluate": (one, one), "index.bits": (one, one)}
    return operations, widths


def _count_bytes(
    masks: _Masks,
    bits: dict[str, np.ndarray],
    planes: list[np.ndarray],
    head_dim: int,
    spec: AcceleratorSpec,
) -> dict[str, np.ndarray]:
    """Returns bytes moved by stream, `[L, B, H]`."""
    shape = masks.vectors.shape[1:]
    queries = np.broadcast_to(masks.valid.sum(axis=1)[None, :, None], shape)
    rest = bits["qk_bits"]
    if planes and not spec.switches.separate_storage.value:
        rest = rest - bits["key_bits"][:, -1]
    moved = {
        "query": (queries, bits["qk_bits"]),
        "output": (queries, bits["out.activation_bits"]),
        "key_rest": (masks.vectors[-1], rest),
        "value": (masks.vectors[-1], bits["v_bits"]),
    }
    for index, plane in enumerate(planes):
        moved[f"key{index}"] = (masks.vectors[index], plane)
    return {
        name: vectors * head_dim * width[:, None, None] / units.BITS_PER_BYTE
        for name, (vectors, width) in moved.items()
    }


def _row_cycles(
    name: str,
    spec: AcceleratorSpec,
    masks: _Masks,
    widths: dict[str, tuple[np.ndarray, np.ndarray]],
    head_dim: int,
) -> np.ndarray:
    """Returns the cycles of each query row in a unit, `[L, B, H, T]`."""
    unit = spec.units[name]
    num_rounds = masks.keys.shape[0] - 1
    rounds = range(num_rounds) if unit.rows == "filter*" else [num_rounds]
    per_key = 1 if unit.width is None else -(-head_dim // int(unit.width.value))
    cycles = np.zeros(masks.keys.shape[1:], np.float64)
    for index in rounds:
        steps = -(-masks.keys[index] // int(unit.lanes.value)) * per_key
        for key in unit.paces:
            cycles += steps * _passes(unit, spec, widths[key.replace("*", str(index))])
    if unit.utilisation is not None:
        cycles /= unit.utilisation.value
    if unit.overhead is not None and len(rounds):
        cycles += unit.overhead.value * masks.valid[None, :, None, :]
    return cycles


def _passes(unit: Unit, spec: AcceleratorSpec, widths: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Returns passes through sliced multipliers, `[L, 1, 1, 1]`."""
    passes = np.ones(widths[0].shape)
    for width, piece in zip(widths, (unit.slice_a, unit.slice_b), strict=True):
        if piece is not None:
            passes = passes * np.ceil(width / piece.value)
            if unit.scaling == "au_scales" and spec.switches.au_scales.value:
                passes = passes * width / piece.value
    return passes[:, None, None, None]


def _run_pipeline(
    row_cycles: dict[str, np.ndarray],
    dram_cycles: np.ndarray,
    valid: np.ndarray,
    spec: AcceleratorSpec,
) -> np.ndarray:
    """Moves rows through the stages and returns the latency, `[L, B]`.

    A row enters a stage when the stage is free, the stage before has finished the row, and the row
    `index_queue` places ahead of it has entered the next stage. A row enters the first stage only
    when main memory has delivered what all rows before it needed.
    """
    num_layers, batch, num_heads = dram_cycles.shape
    # Rows that exist come first, in the order of heads and queries.
    order = np.argsort(~np.tile(valid, (1, num_heads)), axis=1, kind="stable")

    def in_order(value: np.ndarray) -> np.ndarray:
        flat = value.reshape(num_layers, batch, -1)
        ordered = np.take_along_axis(flat, order[None], axis=2)
        return np.moveaxis(ordered, 2, 0)

    stages = [
        in_order(np.max([row_cycles[name] for name in stage], axis=0))
        for stage in spec.pipeline.stages
    ]
    rows = np.maximum(valid.sum(axis=1), 1)[None, :, None, None]
    share = in_order(dram_cycles[..., None] / rows * valid[None, :, None, :])
    arrival = np.cumsum(share, axis=0) - share
    overlaps = spec.switches.memory_overlaps.value
    assert spec.pipeline.index_queue is not None
    depth = int(spec.pipeline.index_queue.value)
    num_rows = share.shape[0]
    starts = np.zeros((len(stages), num_rows, num_layers, batch))
    free = np.zeros((len(stages), num_layers, batch))
    for row in range(num_rows):
        ready = arrival[row] if overlaps else np.zeros((num_layers, batch))
        for index, cycles in enumerate(stages):
            start = np.maximum(ready, free[index])
            if index + 1 < len(stages) and row >= depth:
                start = np.maximum(start, starts[index + 1, row - depth])
            starts[index, row] = start
            ready = free[index] = start + cycles[row]
    total = dram_cycles.sum(axis=2)
    latency: np.ndarray = np.maximum(free[-1], total) if overlaps else free[-1] + total
    if spec.switches.fill_and_drain.value:
        latency = latency + spec.pipeline.drain.value
    return latency


def _operation_energy(
    counts: dict[str, np.ndarray],
    widths: dict[str, tuple[np.ndarray, np.ndarray]],
    spec: AcceleratorSpec,
) -> dict[str, np.ndarray]:
    """Returns energy by unit and by the buffer its operands come from, pJ, `[B, L]`."""
    total: dict[str, np.ndarray] = {}
    for key, count in counts.items():
        kind = key.partition(".")[2]
        if kind == "bits" and not spec.switches.index_lists_priced.value:
            continue
        name = spec.unit_of(key)
        unit = spec.units[name]
        constant, product = energy.operation_pj(spec, name, kind)
        bits_a, bits_b = widths[key]
        spent = count * (constant + product * bits_a * bits_b)[None, :]
        total[name] = total.get(name, 0.0) + spent
        if unit.reads_b is not None and matches(key, unit.paces):
            read_bytes = count * bits_b[None, :] / units.BITS_PER_BYTE
            spent = read_bytes * energy.buffer_pj_per_byte(spec, unit.reads_b)
            total[unit.reads_b] = total.get(unit.reads_b, 0.0) + spent
    return total


def _host(
    shape: GemmShape,
    site: str,
    bits: dict[str, np.ndarray],
    tokens: np.ndarray,
    spec: AcceleratorSpec,
    host: Host,
    table: EnergyTable,
) -> dict[str, np.ndarray]:
    """Returns cycles and energy of one linear layer on the host, `[B, L]` (`[B, 1]` at the ends)."""
    rows, cols = int(host.rows.value), int(host.cols.value)
    b_x = bits[f"{site}.activation_bits"][None, :]
    b_w = bits[f"{site}.weight_bits"][None, :]
    m = (tokens if shape.rows is None else np.full_like(tokens, shape.rows))[:, None]
    tiles = -(-shape.inner // rows) * -(-shape.outer // cols)
    passes = np.ceil(b_x / host.bits.value) * np.ceil(b_w / host.bits.value)
    fill = 2 * rows + cols - 2
    cycles = tiles * (fill + m) * passes - 1
    if host.prefetch_weights.value:
        cycles = tiles * m * passes + fill
    if host.scales_with_bits.value:
        cycles = cycles * b_x * b_w / (passes * host.bits.value**2)
    half_bits = host.sram.base * units.BITS_PER_BYTE / 2
    resident_rows = np.maximum(half_bits // (shape.inner * b_x), 1)
    resident_cols = np.maximum(half_bits // (shape.inner * b_w), 1)
    weights = shape.inner * shape.outer * b_w
    inputs = m * shape.inner * b_x
    moved = np.minimum(
        weights * np.maximum(np.ceil(m / resident_rows), 1) + inputs,
        weights + inputs * np.ceil(shape.outer / resident_cols),
    )
    moved_bytes = (moved + m * shape.outer * b_x) / units.BITS_PER_BYTE
    growth = np.sqrt(max(host.sram.base / table.sram_reference.base, 1.0))
    read_bytes = m * tiles * rows * b_x / units.BITS_PER_BYTE
    mac_pj = energy.multiply_pj(spec) * b_x * b_w + energy.add_pj(spec) * host.accumulator.value
    return {
        "cycles": np.maximum(cycles, moved_bytes / spec.dram_bytes_per_cycle),
        "host.mac": m * shape.inner * shape.outer * mac_pj,
        "host.sram": read_bytes * (table.sram.value * spec.energy_scale * growth),
        "host.dram": moved_bytes * energy.dram_pj_per_byte(spec),
    }
