"""Timelines of the simulators: every busy cycle is in one, no part works twice at a time or beyond the layer's end."""

from collections import defaultdict
from collections.abc import Mapping

import lane_workloads as lanes
import mask_workloads as masks
import numpy as np
import pytest
import test_simulator as rows
import window_workloads as windows

from codesign.hw.resizing import spec_with_sizes
from codesign.hw.simulator import GemmShape, Simulation, simulate
from codesign.hw.spec import AcceleratorSpec, load_preset
from codesign.hw.timeline import DRAM, HOST, Span, Watched, spans
from codesign.workload import Trace

WATCHED = Watched(layer=1, example=1)
MACHINES = ("energon", "sofa", "lapa", "esact")
TOLERANCE = 1e-9


def workload(
    name: str, seed: int, *, is_causal: bool
) -> tuple[Trace, AcceleratorSpec, Mapping[str, GemmShape]]:
    """Random decisions, and the preset with random sizes."""
    rng = np.random.default_rng(seed)
    spec = load_preset(name)
    sizes = {
        f"{unit}.lanes": max(1.0, float(np.round(spec.units[unit].lanes.value * factor)))
        for unit in spec.units
        if (factor := rng.choice([0.25, 0.5, 1.0, 2.0]))
    }
    spec = spec_with_sizes(
        spec,
        sizes | {"dram.bytes_per_cycle": spec.dram_bytes_per_cycle * 2.0 ** rng.uniform(-4, 1)},
    )
    if name == "energon":
        return rows.random_trace(seed), spec, rows.GEMM_SHAPES
    if name == "esact":
        valid = np.arange(64) < np.array([64, 51])[:, None]
        trace = windows.random_trace(rng, valid, layers=2, is_causal=is_causal)
        return trace, spec, windows.gemm_shapes()
    valid = np.arange(64) < np.array([64, 51])[:, None]
    trace = masks.random_trace(rng, valid, name, layers=2, is_causal=is_causal)
    return trace, spec, masks.gemm_shapes()


def layer_cycles(simulation: Simulation) -> tuple[float, float]:
    """Latency of the watched layer without and with the host."""
    at = WATCHED.example, WATCHED.layer
    own = float(simulation.attention_cycles[at] + simulation.own_cycles[at])
    return own, own + float(simulation.host.cycles[at])


def check(simulation: Simulation, spec: AcceleratorSpec) -> None:
    own, whole = layer_cycles(simulation)
    by_part: dict[tuple[str, int], list[Span]] = defaultdict(list)
    for span in simulation.timeline:
        assert 0.0 <= span.start < span.end
        assert span.end <= (whole if span.part == HOST else own) * (1.0 + TOLERANCE)
        by_part[span.part, span.group].append(span)
    total: dict[str, float] = defaultdict(float)
    for (part, _), some in by_part.items():
        some.sort(key=lambda span: span.start)
        for before, after in zip(some, some[1:], strict=False):
            assert after.start >= before.end - TOLERANCE * own, (part, before, after)
        total[part] += sum(span.end - span.start for span in some)
    at = WATCHED.example, WATCHED.layer
    busy: dict[str, float] = defaultdict(float)
    for parts in (simulation.busy_cycles, simulation.own_busy_cycles):
        for name, cycles in parts.items():
            busy[name] += float(cycles[at])
    busy[HOST] = float(simulation.host.cycles[at])
    for name, cycles in busy.items():
        groups = 1.0
        if name in spec.units and spec.units[name].groups is not None:
            groups = spec.units[name].groups.value
        assert total.pop(name, 0.0) == pytest.approx(cycles * groups, rel=1e-6), name
    assert not total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MACHINES)
def test_timelines_hold_every_busy_cycle_once(name: str, seed: int) -> None:
    is_causal = seed == 1 and name != "energon"
    trace, spec, shapes = workload(name, seed, is_causal=is_causal)
    watched = simulate(trace, spec, shapes, is_causal=is_causal, watched=WATCHED)
    check(watched, spec)
    parts = {span.part for span in watched.timeline}
    assert DRAM in parts and (HOST in parts) == (spec.host is not None)
    plain = simulate(trace, spec, shapes, is_causal=is_causal)
    assert not plain.timeline
    np.testing.assert_array_equal(
        plain.latency_cycles("end_to_end"), watched.latency_cycles("end_to_end")
    )


@pytest.mark.parametrize("name", MACHINES)
def test_memory_that_does_not_overlap_comes_last(name: str) -> None:
    trace, spec, shapes = workload(name, 0, is_causal=False)
    switches = spec.switches
    off = switches.memory_overlaps.model_copy(update={"value": False})
    spec = spec.model_copy(
        update={"switches": switches.model_copy(update={"memory_overlaps": off})}
    )
    found = simulate(trace, spec, shapes, watched=WATCHED)
    check(found, spec)
    units = [span for span in found.timeline if span.part in spec.units]
    assert min(span.start for span in found.timeline if span.part == DRAM) == pytest.approx(
        max(span.end for span in units)
    )


def test_spans_of_one_name_that_follow_at_once_are_one() -> None:
    found = spans(
        "unit", ["a", "a", "b", "a", "a"], np.array([0, 2, 3, 4, 9]), np.array([2, 0, 1, 1, 1])
    )
    assert [(one.name, one.start, one.end) for one in found] == [
        ("a", 0.0, 2.0),
        ("b", 3.0, 4.0),
        ("a", 4.0, 5.0),
        ("a", 9.0, 10.0),
    ]


@pytest.mark.parametrize("preset", ["acceltran-edge", "acceltran-edge-lp"])
def test_operations_on_lanes_lie_within_the_layer_and_cover_what_they_take(preset: str) -> None:
    """Heads share lanes, so that operations of a unit may overlap; weights may come before the layer begins."""
    spec, _ = lanes.machine(preset, dram__bytes_per_cycle=64.0)
    valid = np.arange(40) < np.array([40, 27])[:, None]
    tensors = lanes.random_tensors(np.random.default_rng(0), valid)
    trace = lanes.make_trace(valid, lanes.make_bits(2), tensors)
    found = simulate(trace, spec, lanes.gemm_shapes(), watched=WATCHED)
    assert spec.storage is not None
    batch = spec.storage.batch.value
    own, _ = layer_cycles(found)
    at = WATCHED.example, WATCHED.layer
    names = {span.name.partition(" ")[0] for span in found.timeline}
    assert {"scores", "softmax", "attention", "up", "down"} <= names
    for part in {span.part for span in found.timeline}:
        some = [span for span in found.timeline if span.part == part]
        assert max(span.end for span in some) <= own * batch * (1.0 + TOLERANCE)
        covered, last = 0.0, -np.inf
        for span in sorted(some, key=lambda span: span.start):
            covered += max(0.0, span.end - max(span.start, last))
            last = max(last, span.end)
        busy = found.busy_cycles.get(part, 0.0) + found.own_busy_cycles.get(part, 0.0)
        assert covered >= float(np.asarray(busy)[at]) * batch * (1.0 - TOLERANCE), part
        assert part == DRAM or min(span.start for span in some) >= 0.0
