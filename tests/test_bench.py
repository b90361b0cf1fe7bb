"""The benchmarks measure what they name: points that vary, steps that train what they say, records of one shape."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.errors import UnknownNameError
from codesign.experiments import (
    bench,
    bench_cost,
    bench_mapper,
    bench_sizes,
    bench_steps,
    timing,
)
from codesign.experiments.configs import MODES, Experiment, ModelSettings, digits
from codesign.experiments.evaluate import Point
from codesign.experiments.problem import Problem
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.gemm.layer import Layer
from codesign.hw.gemm.machine import Machine
from codesign.hw.gemm.mapper import MappedLayers
from codesign.hw.spec import load_preset
from codesign.structure import ModelStructure, TokenInput

TEXT = bench_sizes.TextShape(
    structure=ModelStructure(
        num_layers=1,
        num_heads=1,
        head_dim=4,
        width=8,
        hidden=8,
        input=TokenInput(vocabulary_size=16, max_tokens=8),
        num_outputs=2,
    ),
    batch_size=2,
    num_tokens=4,
)
TINY = bench_sizes.BenchSizes(
    experiment=Experiment(
        model=ModelSettings(
            num_layers=1,
            num_heads=1,
            head_dim=4,
            width=8,
            hidden=8,
            patch_size=4,
            stride=4,
            padding=0,
        ),
        batch_size=4,
        num_calibration=8,
    ),
    repeats=2,
    num_chunks=2,
    chunk=3,
    num_settings=6,
    num_single=2,
    num_steps=3,
    num_images=4,
    layers=(1, 2),
    compilations=3,
    short=TEXT,
    long=TEXT,
    small=TEXT,
    num_trials=2,
    num_gradients=2,
)
ACCELERATOR = accelerator_from_spec(load_preset("energon"))


@pytest.fixture(scope="module")
def started() -> tuple[Problem, Point]:
    # Without a filter, which takes most of the time of compiling.
    return bench_steps.bench_problem(dataclasses.replace(TINY.experiment, mechanism="dense"))


def check_records(records: list[timing.Record]) -> None:
    for record in records:
        assert record.keys() == {"name", "value", "unit", "baseline", "ratio"}
        assert record["baseline"].keys() == {"name", "value"}
        assert record["value"] > 0.0
        assert record["ratio"] == record["value"] / record["baseline"]["value"]
    json.dumps(records, allow_nan=False)


class FakeStep:
    """Stands for a step, compiled or not, whose compilation a test does not need."""

    def __init__(self, trace_seconds: float = 1.0, compile_seconds: float = 1.0):
        self.taken = 0
        self.trace_seconds = trace_seconds
        self.compile_seconds = compile_seconds

    def compiled(self) -> Any:
        return self

    def steps(self, number: int) -> Any:
        def call() -> None:
            self.taken += number

        return call


def test_design_points_are_bert_layers_that_all_differ() -> None:
    workload, sizes = bench_cost.design_points(ACCELERATOR, TINY)
    assert workload.head_dim == 64
    assert workload.block_gemms["up"].outer == 3072
    assert np.all(workload.rows["attention"].queries == 12 * 128)
    assert workload.rows["filter0"].segments.shape == (2, 3, 1, 1, 1, 8)
    assert sizes.keys() == ACCELERATOR.sizes.keys()
    assert bench_sizes.FULL.num_chunks * bench_sizes.FULL.chunk >= 100_000

    def num_values(leaf: np.ndarray) -> int:
        assert leaf.shape[:2] == (2, 3)
        return len(np.unique(leaf.reshape(6, -1)[:, 0]))

    operations = workload.operations
    for leaf in [
        *sizes.values(),
        operations["qk.mac"].count,
        operations["qk.mac"].bits_a,
        operations["pv.mac"].bits_b,
        operations["filter1.mac"].count,
        operations["filter1.mac"].bits_a,
        operations["filter1.mac"].bits_b,
        workload.streams["value"].vectors,
        workload.block_gemms["qkv"].weight_bits,
        workload.block_gemms["qkv"].activation_bits,
    ]:
        assert num_values(leaf) > 2


def test_batched_cost_is_that_of_each_point() -> None:
    points = jax.tree.map(jnp.asarray, bench_cost.design_points(ACCELERATOR, TINY))
    function = bench_cost.cost_functions(ACCELERATOR)["cost"]
    together = bench_cost.batched(function)(points)
    single = jax.jit(function)
    for chunk, index in ((0, 0), (1, 2)):
        alone = single(jax.tree.map(lambda leaf, at=(chunk, index): leaf[at], points))
        for energy_latency_area, expected in zip(together, alone, strict=True):
            # float32, summed in another order.
            assert energy_latency_area[chunk, index] == pytest.approx(float(expected), rel=1e-5)


def test_gradient_is_by_every_size_and_workload_leaf() -> None:
    points = bench_cost.design_points(ACCELERATOR, TINY)
    point = jax.tree.map(lambda leaf: jnp.asarray(leaf[0, 0]), points)
    function = bench_cost.cost_functions(ACCELERATOR)["cost_gradient"]
    value, gradient = jax.eval_shape(function, point)
    assert value.shape == ()
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, point)


def changed(before: Any, after: Any) -> bool:
    return any(
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def test_float_step_trains_weights_without_a_policy(started: tuple[Problem, Point]) -> None:
    timed = bench_steps.float_step(*started)
    assert not jax.tree.leaves(timed.state.policy)
    before = jax.tree.map(np.array, timed.state.params)
    state, metrics = timed.step(timed.state, timed.batch, timed.constants)
    assert changed(before, state.params)
    assert "cross_entropy" not in metrics and not changed(metrics["ratio"], np.ones(1))


def test_budgeted_step_trains_what_its_mode_names(started: tuple[Problem, Point]) -> None:
    timed = bench_steps.budgeted_step(*started, ("clips",))
    before = jax.tree.map(np.array, (timed.state.params, timed.state.policy))
    state, metrics = timed.step(timed.state, timed.batch, timed.constants)
    assert not changed(before[0], state.params) and changed(before[1], state.policy)
    assert 0.0 < float(metrics["ratio"][0]) != 1.0  # the cost is computed
    assert timed.batch["pixels"].shape[0] == TINY.experiment.batch_size


def test_step_of_the_mode_codesign_trains_the_machines_sizes(
    started: tuple[Problem, Point],
) -> None:
    timed = bench_steps.budgeted_step(*started, ("clips", "sizes"))
    before = jax.tree.map(np.array, timed.state.sizes)
    state, _ = timed.step(timed.state, timed.batch, timed.constants)
    assert before.keys() == started[0].accelerator.sizes.keys() and changed(before, state.sizes)


def test_steps_go_on_from_the_last_one() -> None:
    step = jax.jit(lambda state, batch, constants: (state + batch * constants, state))
    timed = timing.TimedStep(step, jnp.zeros(()), jnp.ones(()), jnp.ones(()))
    call = timed.compiled().steps(3)
    assert [float(call()), float(call())] == [2.0, 5.0]


def test_compilation_tells_its_time_and_memory() -> None:
    def compiled(size: int) -> timing.CompiledStep:
        step = jax.jit(lambda state, batch, constants: (state * batch, constants))
        return timing.TimedStep(step, jnp.ones(size), jnp.ones(size), jnp.ones(())).compiled()

    step = compiled(1024)
    assert step.trace_seconds > 0.0 and step.compile_seconds > 0.0
    # Two arrays of 1024 float32 and a scalar; a product needs no temporary array.
    assert step.peak_bytes() == 2 * 1024 * 4 + 4
    cube = jax.jit(lambda state, batch, constants: (state @ (state @ state), batch * constants))
    matrix = timing.TimedStep(cube, jnp.ones((64, 64)), jnp.ones(()), jnp.ones(())).compiled()
    assert matrix.peak_bytes() >= 2 * 64 * 64 * 4  # the matrix, and its square


@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param(name, marks=() if name in ("sofa", "lapa") else pytest.mark.slow)
        for name in bench_steps.MACHINES
    ],
)
def test_text_step_trains_under_a_budget(mechanism: str) -> None:
    problem, point = bench_steps.text_problem(TEXT, mechanism)
    timed = bench_steps.budgeted_step(problem, point, bench_steps.THRESHOLDS_ONLY)
    assert timed.batch["tokens"].shape == timed.batch["valid"].shape == (2, 4)
    assert np.all(timed.batch["valid"])
    assert timed.batch["tokens"].max() < 16 and len(np.unique(timed.batch["tokens"])) > 1
    state, metrics = jax.eval_shape(timed.step, timed.state, timed.batch, timed.constants)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, timed.state)
    assert {name for name in metrics if name.startswith("gradient_norm")} == {
        "gradient_norm.thresholds"
    }
    assert metrics["ratio"].shape == (1,)


def test_text_records_put_every_step_beside_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Step(FakeStep):
        def peak_bytes(self) -> int:
            return 3_000_000 * (len(asked) + 1)

    def budgeted(problem: Problem, point: Point, train: Any) -> Step:
        asked.append((problem.mechanism.name, train))
        return Step(compile_seconds=5.0)

    monkeypatch.setattr(bench_steps, "float_step", lambda *problem: Step(compile_seconds=2.0))
    monkeypatch.setattr(bench_steps, "budgeted_step", budgeted)
    monkeypatch.setattr(bench_steps, "measured_ranges", lambda *model: None)
    records = bench_steps.text_records(TEXT, "text", TINY)
    check_records(records)
    kinds = (
        *("energon_joint", "energon_thresholds", "acceltran_joint", "acceltran_thresholds"),
        *("sofa_joint", "lapa_joint", "esact_joint"),
    )
    assert [record["name"] for record in records] == [
        f"text_{kind}{quantity}" for quantity in ("", "_memory", "_compile") for kind in kinds
    ]
    assert asked == [
        (name, train)
        for name in ("energon", "acceltran")
        for train in (MODES["joint"], ("thresholds",))
    ] + [(name, MODES["joint"]) for name in ("sofa", "lapa", "esact")]
    assert {record["ratio"] for record in records[-7:]} == {2.5}
    assert {record["unit"] for record in records[7:14]} == {"MB"}


def test_training_compares_every_mode_with_the_float_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, asked = FakeStep(), []
    monkeypatch.setattr(bench_steps, "measured_ranges", lambda *model: None)

    def budgeted(problem: Problem, point: Point, train: Any, *, has_cost: bool = True) -> FakeStep:
        step = FakeStep()
        asked.append((problem.mechanism.name, train, has_cost, step))
        return step

    monkeypatch.setattr(bench_steps, "float_step", lambda *problem: plain)
    monkeypatch.setattr(bench_steps, "budgeted_step", budgeted)
    records = bench_steps.bench_training(TINY)
    check_records(records)
    assert [record["name"] for record in records] == [f"train_{mode}" for mode in MODES]
    assert [call[:3] for call in asked] == [("energon", train, True) for train in MODES.values()]
    # One untimed call and `repeats` timed ones.
    taken = TINY.num_steps * (TINY.repeats + 1)
    assert plain.taken == taken and all(call[3].taken == taken for call in asked)

    asked.clear()
    records = bench_steps.bench_parts(TINY)
    check_records(records)
    assert [call[:3] for call in asked] == [
        ("dense", MODES["joint"], False),
        ("energon", MODES["joint"], False),
        ("energon", MODES["joint"], True),
    ]


def test_compile_takes_medians_of_both_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([(1.0, 10.0), (2.0, 30.0), (9.0, 11.0), (3.0, 22.0), (3.0, 90.0), (7.0, 21.0)])
    depths = []
    monkeypatch.setattr(bench_steps, "measured_ranges", lambda *model: None)

    def budgeted(problem: Problem, point: Point, train: Any) -> FakeStep:
        depths.append(problem.config.structure.num_layers)
        return FakeStep(*next(seconds))

    monkeypatch.setattr(bench_steps, "budgeted_step", budgeted)
    compiled, traced = bench_steps.bench_compile(TINY)
    check_records([compiled, traced])
    assert depths == [1, 2] * 3
    assert (compiled["value"], compiled["baseline"]["value"]) == (22.0, 11.0)
    assert (traced["value"], traced["baseline"]["value"]) == (3.0, 3.0)
    assert compiled["baseline"]["name"] == "1 layers"


@pytest.mark.parametrize("name", ["hard_path", "simulator"])
def test_records_of_deployed_benchmarks(name: str) -> None:
    records = bench.BENCHMARKS[name](TINY)
    check_records(records)
    assert [record["unit"] for record in records] == ["image/s"]


def test_mapper_maps_the_same_products_at_once_and_by_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []

    def fake(layer: Layer, machine: Machine, *, key: jax.Array) -> MappedLayers:
        given.append((layer.extents, machine.sizes["side"]))
        return MappedLayers(mapping=None, cost=None, rounded=key, reached=key)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_mapper, "map_layers", fake)
    records = bench_mapper.bench_mapper(TINY)
    check_records(records)
    assert [record["unit"] for record in records] == ["layer/s"]
    together, *singles = given[: 1 + TINY.num_single]
    for whole, parts in zip(together, zip(*singles, strict=True), strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_calls_take_turns_after_an_untimed_round() -> None:
    order = []
    medians = timing.interleaved_seconds(
        [lambda: order.append("a"), lambda: order.append("b")], repeats=3
    )
    assert order == ["a", "b"] * 4
    assert len(medians) == 2 and all(median > 0.0 for median in medians)


def test_run_bench_picks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fake(name: str) -> Any:
        def measure(sizes: bench_sizes.BenchSizes) -> list[timing.Record]:
            seen.append((name, sizes))
            return [timing.make_record(name, 3.0, "ms", "other", 2.0)]

        return measure

    monkeypatch.setattr(bench, "BENCHMARKS", {name: fake(name) for name in bench.BENCHMARKS})
    assert [record["name"] for record in bench.run_bench()] == list(bench.DEFAULT_NAMES)
    assert {sizes for _, sizes in seen} == {bench_sizes.FULL}
    seen.clear()
    assert [record["name"] for record in bench.run_bench(quick=True)] == list(bench.QUICK_NAMES)
    assert {sizes for _, sizes in seen} == {bench_sizes.QUICK}
    (record,) = bench.run_bench(names=["parts"])
    assert record["ratio"] == 1.5
    assert record["device"].keys() == {"name", "backend", "num_cores", "load"}
    assert record["device"]["num_cores"] >= 1


def test_unknown_benchmark_is_named() -> None:
    with pytest.raises(UnknownNameError, match="benchmark `speed` does not exist.*hard_path"):
        bench.run_bench(names=["speed"])


def test_table_has_a_row_per_record() -> None:
    record = timing.make_record("cost", 1_234_567.0, "evaluation/s", "loop", 1_000.0)
    title, columns, rows = bench.bench_table([record | {"device": timing.device()}])
    assert "cores" in title
    assert rows == [("cost", "1,234,567", "1,000", "evaluation/s", "1,235", "loop")]
    assert len(columns) == len(rows[0])


def test_defaults_are_the_digits_experiment() -> None:
    assert bench_sizes.FULL.experiment == digits()
    assert bench_sizes.FULL.layers == (6, 12)
    assert set(bench.DEFAULT_NAMES) | {"parts"} == set(bench.BENCHMARKS)
    assert bench.SECONDS.keys() == bench.BENCHMARKS.keys()
    assert 0.0 < bench.bench_seconds(quick=True) < bench.bench_seconds()
