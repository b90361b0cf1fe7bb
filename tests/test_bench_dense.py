"""Layers per second of the dense model: whole mappings that all differ, derivatives by all of them, records."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.experiments import bench, bench_dense, bench_sizes, peer_tools
from codesign.experiments.bench_cost import batched
from codesign.experiments.bench_tools import LAYER, QUOTED_PER_S
from codesign.hw.gemm.cost import cost
from codesign.hw.gemm.machine import machine_from_file, with_sizes
from codesign.hw.gemm.machine_file import load_machine
from codesign.hw.gemm.mapping import Mapping
from codesign.hw.gemm.names import MATMUL
from codesign.hw.tool_models import TOOLS

TINY = bench_sizes.BenchSizes(repeats=1, num_chunks=2, chunk=3, num_single=2)
MACHINE = machine_from_file(load_machine("gemmini"))


def test_design_points_are_whole_mappings_that_all_differ() -> None:
    point, order = bench_dense.design_points(MACHINE, bench_sizes.BenchSizes(num_chunks=1))
    assert order.shape == (16, 256, 5, 4, 3) == point.spatial.shape
    assert np.all(np.sort(order, axis=-1) == np.arange(3))
    temporal, spatial = np.exp2(point.temporal), np.exp2(point.spatial)
    extents = np.asarray([[rows, inner, outer] for rows, outer, inner in LAYER], float)
    left = extents / (temporal.prod(-2) * spatial.prod(-2))
    for factors in (temporal, spatial, left):
        assert np.all(factors >= 1.0) and np.all(factors % 1.0 == 0.0)
    # Weights stay in the registers; C runs along the rows of the array and K along its columns, at most 32 of each.
    assert np.all(temporal[..., 0, 1:] == 1.0) and spatial.max() == 32.0
    used = spatial.reshape(-1, 4, 3).max(axis=0) > 1.0
    assert np.argwhere(used).tolist() == [[1, MATMUL.index("C")], [2, MATMUL.index("K")]]
    assert len(np.unique(temporal.reshape(-1, 5 * 3 * 3), axis=0)) > 4000
    for name, size in point.sizes.items():
        ratio = np.exp2(size) / float(MACHINE.sizes[name])
        assert 0.5 <= ratio.min() < 0.51 and 1.9 < ratio.max() <= 2.0 + 1e-6


def test_batched_cost_is_that_of_each_layer() -> None:
    given = jax.tree.map(jnp.asarray, bench_dense.design_points(MACHINE, TINY))
    together = batched(bench_dense.edp_functions(MACHINE)["dense"])(given)
    point, order = jax.tree.map(lambda leaf: leaf[1, 2], given)
    layer, inner = bench_dense.products(), jnp.exp2(point.temporal)
    spatial = jnp.exp2(point.spatial)
    outermost = layer.extents / (jnp.prod(inner, axis=1) * jnp.prod(spatial, axis=1))
    temporal = jnp.concatenate([inner, outermost[:, None]], axis=1)
    mapping = Mapping(temporal=temporal, spatial=spatial, order=order, dims=MATMUL)
    sized = with_sizes(MACHINE, {name: jnp.exp2(size) for name, size in point.sizes.items()})
    alone = cost(layer, mapping, sized)
    expected = np.log(float(alone.total_pj.sum()) * float(alone.latency_cycles.sum()))
    assert float(together[1, 2]) == pytest.approx(expected, rel=1e-5)


def test_gradient_is_by_every_factor_and_size() -> None:
    given = jax.tree.map(jnp.asarray, bench_dense.design_points(MACHINE, TINY))
    value, slopes = batched(bench_dense.edp_functions(MACHINE)["dense_gradient"])(given)
    assert value.shape == (2, 3)
    assert jax.tree.map(jnp.shape, slopes) == jax.tree.map(jnp.shape, given[0])
    assert all(np.any(np.asarray(slope) != 0.0) for slope in jax.tree.leaves(slopes))


def test_records_name_what_ours_is_beside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"no {name}")

    monkeypatch.setattr(peer_tools, "tool_module", absent)
    records = {record["name"]: record for record in bench_dense.bench_dense(TINY)}
    assert len(capsys.readouterr().err.splitlines()) == len(TOOLS)
    tools = {f"dense_{tool}": (f"{TOOLS[tool].name}, quoted", QUOTED_PER_S[tool]) for tool in TOOLS}
    for name, (baseline, value) in (tools | bench_dense.QUOTED_LAYERS_PER_S).items():
        record = records.pop(name)
        assert record["baseline"] == {"name": baseline, "value": value}
        assert record["unit"] == ("product/s" if "scale_sim" in name else "layer/s")
        assert record["ratio"] == record["value"] / value > 0.0
    assert set(records) == {"dense", "dense_gradient"}
    assert all("one design point" in one["baseline"]["name"] for one in records.values())
    assert bench.BENCHMARKS["dense"] is bench_dense.bench_dense
