"""Speed of the cost model, the training step, the hard path, compilation and the simulator, each beside a baseline.

A figure and its baseline are timed by turns in the same run, after one untimed call of each; both are medians. Weights
are random and nothing is trained: no time here depends on the values.
"""

import dataclasses
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from codesign.errors import UnknownNameError
from codesign.experiments.configs import MODES, Budget, Experiment, digits
from codesign.experiments.evaluate import Point, deployment, hard_run
from codesign.experiments.exporting import TracedBatch, gemm_shapes, trace_of
from codesign.experiments.problem import Problem, calibrate, float_path, no_cost, outline
from codesign.experiments.train import BudgetedTraining, start_policy
from codesign.gates import Relaxation
from codesign.hw import emulator
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.operating_points import ModelShape, Setting, workload_from_fractions
from codesign.hw.simulator import simulate
from codesign.hw.spec import load_preset
from codesign.hw.surrogate import cost
from codesign.mechanisms import Mechanism, mechanism_by_name
from codesign.models import vit
from codesign.models.deploy import Deployment
from codesign.models.parameters import init_params
from codesign.optimize import Group, LossAux, StepFn, init_state, make_train_step
from codesign.policy import Policy
from codesign.structure import ModelStructure
from codesign.workload import Workload

Record = dict[str, Any]
DesignPoints = tuple[Workload, dict[str, Any]]
"""Workload leaves and sizes of the machine, all with a leading axis of design points."""

BERT_LAYER = ModelShape(
    num_layers=1, num_tokens=128, num_heads=12, head_dim=64, width=768, hidden=3072
)
"""One layer of BERT-Base at 128 tokens (Devlin et al., arXiv 1810.04805)."""
SIZE_SPAN = 2.0
"""Design points have sizes from 1 / SIZE_SPAN to SIZE_SPAN times the preset's."""
SMOOTHNESS = 8.0
"""Exponent of the smooth maximum under the gradient: where training starts."""
MS_PER_S = 1e3
NEVER_HARDENED = 1_000_000
"""Steps of the timed training: all timed ones are of its first stage, to which most steps of a run belong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSizes:
    """How much is measured; all are counts."""

    # Whose model, machine and optimiser are timed.
    experiment: Experiment = dataclasses.field(default_factory=digits)
    # Timed calls of each function.
    repeats: int = 5
    # Design points in a call: `num_chunks` times `chunk`, evaluated one chunk after another in one compiled call.
    num_chunks: int = 32
    chunk: int = 4096
    # Different workloads (kept fractions and bits) among them.
    num_settings: int = 256
    # Design points of the baseline, one call each.
    num_single: int = 256
    # Training steps in a timed call.
    num_steps: int = 2
    # Images in a timed call of the hard path, the emulator and the simulator.
    num_images: int = 128
    # Depths whose compilation is compared, and how often each is compiled.
    layers: tuple[int, int] = (6, 12)
    compilations: int = 1


FULL = BenchSizes()
QUICK = BenchSizes(repeats=3, num_chunks=8, num_settings=64, num_single=64, num_images=32)


def run_bench(*, names: Sequence[str] | None = None, quick: bool = False) -> list[Record]:
    """Runs benchmarks.

    Args:
      names: Keys of `BENCHMARKS`; by default `DEFAULT_NAMES`, or `QUICK_NAMES` if `quick`.
      quick: Fewer repeats and points.

    Returns:
      Records `{name, value, unit, baseline, ratio, device}`; `baseline` is `{name, value}` in the same unit, `ratio`
      the value over it.

    Raises:
      UnknownNameError: If a benchmark does not exist.
    """
    if names is None:
        names = QUICK_NAMES if quick else DEFAULT_NAMES
    for name in names:
        if name not in BENCHMARKS:
            raise UnknownNameError(
                f"benchmark `{name}` does not exist: choose from {', '.join(BENCHMARKS)}"
            )
    sizes = QUICK if quick else FULL
    where = device()
    return [record | {"device": where} for name in names for record in BENCHMARKS[name](sizes)]


def bench_table(records: Sequence[Record]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Returns title, columns and rows of records, as `codesign.experiments.tables.print_table` takes them."""
    rows: list[tuple[str, ...]] = [
        (
            str(record["name"]),
            _number(record["value"]),
            _number(record["baseline"]["value"]),
            str(record["unit"]),
            f"{record['ratio']:.2f}" if record["ratio"] < 100.0 else _number(record["ratio"]),
            str(record["baseline"]["name"]),
        )
        for record in records
    ]
    where = records[0]["device"] if records else device()
    title = f"{where['name']}, {where['num_cores']} cores, load {where['load']:.1f} before"
    return title, ("benchmark", "value", "baseline", "unit", "ratio", "baseline is"), rows


def _number(value: float) -> str:
    """Returns three digits or more: whole numbers from 100 on, with thousands set off."""
    return f"{value:,.0f}" if value >= 100.0 else f"{value:.3g}"


def device() -> dict[str, Any]:
    """Returns the device's name and backend, usable cores, and the machine's load (processes, last minute)."""
    backend = jax.default_backend()
    name = _processor() if backend == "cpu" else jax.devices()[0].device_kind
    affinity = getattr(os, "sched_getaffinity", None)
    num_cores = len(affinity(0)) if affinity else os.cpu_count()
    return {"name": name, "backend": backend, "num_cores": num_cores, "load": os.getloadavg()[0]}


def _processor() -> str:
    """Returns the processor's name."""
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text().splitlines() if listing.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def interleaved_seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Returns the median wall time of each call, s: one untimed round, then `repeats` rounds through all of them."""
    seconds: list[list[float]] = [[] for _ in calls]
    for timed in range(-1, repeats):
        for call, own in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())  # type: ignore[no-untyped-call]
            if timed >= 0:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in seconds]


def _record(name: str, value: float, unit: str, baseline: str, baseline_value: float) -> Record:
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "baseline": {"name": baseline, "value": baseline_value},
        "ratio": value / baseline_value,
    }


def _rates(
    name: str, unit: str, baseline: str, done: tuple[int, int], seconds: list[float]
) -> Record:
    """Returns what was done per second by the first and, as its baseline, the second of two calls."""
    return _record(name, done[0] / seconds[0], unit, baseline, done[1] / seconds[1])


def design_points(accelerator: Accelerator, sizes: BenchSizes) -> DesignPoints:
    """Returns random design points of `BERT_LAYER`: every size of the machine, all kept fractions and all bits vary.

    Leaves are NumPy arrays `[num_chunks, chunk, ...]`.
    """
    rng = np.random.default_rng(0)

    def setting() -> Setting:
        first = rng.uniform(0.2, 1.0)
        low = rng.uniform(2.0, 4.0)
        return Setting(
            kept=(first, first * rng.uniform(0.1, 1.0)),
            query_bits=rng.uniform(2.0, 8.0),
            key_bits=(low, low + rng.uniform(1.0, 4.0)),
            qk_bits=rng.uniform(8.0, 16.0),
            v_bits=rng.uniform(8.0, 16.0),
            weight_bits=rng.uniform(2.0, 8.0),
            activation_bits=rng.uniform(2.0, 8.0),
        )

    shape = (sizes.num_chunks, sizes.chunk)
    workloads = [workload_from_fractions(BERT_LAYER, setting()) for _ in range(sizes.num_settings)]
    chosen = rng.integers(sizes.num_settings, size=shape)
    workload = jax.tree.map(lambda *leaves: np.stack(leaves)[chosen], *workloads)
    spread = np.log(SIZE_SPAN)
    scaled = {
        name: (float(size) * np.exp(rng.uniform(-spread, spread, shape))).astype(np.float32)
        for name, size in accelerator.sizes.items()
    }
    return workload, scaled


def point_cost(
    point: DesignPoints, accelerator: Accelerator, smoothness: float | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns energy (pJ), latency (cycles) and area (mm2) of one design point, host included."""
    workload, sizes = point
    machine = accelerator.replace(sizes=sizes)  # type: ignore[attr-defined]
    price = cost(workload, machine, smoothness=smoothness)
    energy, latency = price.energy_pj("end_to_end")[0], price.latency_cycles("end_to_end")[0]
    return energy, latency, price.area_mm2("end_to_end")


def cost_functions(accelerator: Accelerator) -> dict[str, Callable[[DesignPoints], Any]]:
    """Returns what is evaluated at a design point: its cost; log(energy * latency * area) with all derivatives."""

    def objective(point: DesignPoints) -> jax.Array:
        energy, latency, area = point_cost(point, accelerator, SMOOTHNESS)
        return jnp.log(energy) + jnp.log(latency) + jnp.log(area)

    return {
        "cost": functools.partial(point_cost, accelerator=accelerator),
        "cost_gradient": jax.value_and_grad(objective),
    }


def batched(function: Callable[[DesignPoints], Any]) -> Callable[[DesignPoints], Any]:
    """Returns the compiled function of design points `[num_chunks, chunk, ...]`.

    Chunk by chunk, what passes between operations stays in the processor's cache.
    """

    def mapped(points: DesignPoints) -> Any:
        return jax.lax.map(jax.vmap(function), points)

    return jax.jit(mapped)


def bench_cost(sizes: BenchSizes) -> list[Record]:
    """Measures evaluations of the cost model per second, forward and with the gradient by sizes and workload.

    Baseline: the same function, compiled, called with one design point after the other.
    """
    accelerator = accelerator_from_spec(load_preset("energon"))
    points = design_points(accelerator, sizes)
    singles = [
        jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[0, i]), points)
        for i in range(min(sizes.num_single, sizes.chunk))
    ]
    batch = jax.tree.map(jnp.asarray, points)
    records = []
    for name, function in cost_functions(accelerator).items():
        single = jax.jit(function)

        def one_by_one(single: Callable[[DesignPoints], Any] = single) -> Any:
            return [single(point) for point in singles]

        seconds = interleaved_seconds(
            [functools.partial(batched(function), batch), one_by_one], sizes.repeats
        )
        done = (sizes.num_chunks * sizes.chunk, len(singles))
        records.append(_rates(name, "evaluation/s", "one design point per call", done, seconds))
    return records


def bench_problem(experiment: Experiment) -> tuple[Problem, Point]:
    """Returns a problem and a start point with random weights."""
    outlined = outline(experiment)
    params = init_params(outlined.config.structure, key=jax.random.key(experiment.seed))
    teacher = np.zeros((len(outlined.train), outlined.task.num_classes), np.float32)
    problem = dataclasses.replace(outlined, params=params, teacher=teacher)
    policy = start_policy(
        problem,
        linear_bits=experiment.start_linear_bits,
        attention_bits=experiment.start_attention_bits,
    )
    calibration = calibrate(params, problem.calibration_pixels, problem.config)
    return problem, Point(params=params, policy=policy, calibration=calibration)


@dataclasses.dataclass(frozen=True)
class TimedStep:
    """A training step with its arguments."""

    step: StepFn
    state: Any
    batch: Any
    constants: Any

    def steps(self, number: int) -> Callable[[], Any]:
        """Returns a function that takes `number` steps from where it last stopped and returns the last metrics."""
        held = [self.state]

        def call() -> Any:
            metrics: Any = None
            for _ in range(number):
                held[0], metrics = self.step(held[0], self.batch, self.constants)
            return metrics

        return call

    def compile_seconds(self) -> tuple[float, float]:
        """Returns processor time of tracing (lowering included) and of compiling, s."""
        start = time.process_time()
        lowered = cast(jax.stages.Wrapped, self.step).lower(self.state, self.batch, self.constants)
        traced = time.process_time()
        lowered.compile()
        return traced - start, time.process_time() - traced


def budgeted_step(
    problem: Problem, point: Point, train: tuple[Group, ...], *, has_cost: bool = True
) -> TimedStep:
    """Returns the training step on the deployed decisions, under an energy budget unless `has_cost` is False."""
    settings = dataclasses.replace(
        problem.experiment.optimize, train=train, num_steps=NEVER_HARDENED
    )
    training = BudgetedTraining(problem, settings, ("energy",) if has_cost else (), "end_to_end")
    tree = training.initial(point, Budget(energy=0.5))
    return TimedStep(training.step, tree["state"], training.batch(0), tree["constants"])


def float_step(problem: Problem, point: Point) -> TimedStep:
    """Returns the step of plain fine-tuning: cross-entropy in floating point, the same optimiser, no policy."""

    def loss_fn(
        params: Any, policy: Policy, batch: Any, constants: Any, relaxation: Relaxation
    ) -> tuple[jax.Array, LossAux]:
        del policy, constants, relaxation
        logits, _ = float_path(params, batch["pixels"], config=problem.config)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.mean(losses), LossAux(terms={}, workload=None)

    settings = dataclasses.replace(
        problem.experiment.optimize, train=("params",), num_steps=NEVER_HARDENED
    )
    state = init_state(point.params, Policy(layers={}, ends={}), settings, 1)
    first = problem.train.first(problem.experiment.batch_size)
    batch = {"pixels": first.pixels, "labels": first.labels}
    return TimedStep(make_train_step(loss_fn, no_cost, settings), state, batch, {})


def _step_records(prefix: str, steps: dict[str, TimedStep], sizes: BenchSizes) -> list[Record]:
    """Returns milliseconds per step of all but the first, whose time is the baseline."""
    taken = interleaved_seconds(
        [step.steps(sizes.num_steps) for step in steps.values()], sizes.repeats
    )
    each = [MS_PER_S * seconds / sizes.num_steps for seconds in taken]
    first, *others = steps
    return [
        _record(f"{prefix}_{name}", value, "ms/step", first, each[0])
        for name, value in zip(others, each[1:], strict=True)
    ]


def bench_training(sizes: BenchSizes) -> list[Record]:
    """Measures a training step of each mode of `codesign train`. Baseline: plain fine-tuning in floating point."""
    problem, point = bench_problem(sizes.experiment)
    steps = {"float fine-tuning": float_step(problem, point)}
    steps |= {mode: budgeted_step(problem, point, train) for mode, train in MODES.items()}
    return _step_records("train", steps, sizes)


def bench_parts(sizes: BenchSizes) -> list[Record]:
    """Measures what each part adds to the float step: quantisation, then the filter, then counts and cost.

    Baseline: plain fine-tuning in floating point.
    """
    problem, point = bench_problem(sizes.experiment)
    dense, dense_point = bench_problem(dataclasses.replace(sizes.experiment, mechanism="dense"))
    train = MODES["joint"]
    steps = {
        "float fine-tuning": float_step(problem, point),
        "quantised": budgeted_step(dense, dense_point, train, has_cost=False),
        "quantised_filtered": budgeted_step(problem, point, train, has_cost=False),
        "quantised_filtered_costed": budgeted_step(problem, point, train),
    }
    return _step_records("train", steps, sizes)


def _deployed(sizes: BenchSizes) -> tuple[Problem, Deployment, NDArray[np.int32]]:
    """Returns a problem, its integers, and the images to run."""
    problem, point = bench_problem(sizes.experiment)
    pixels = problem.task.parts["validation"].pixels[: sizes.num_images]
    return problem, deployment(problem, point), pixels


def bench_hard_path(sizes: BenchSizes) -> list[Record]:
    """Measures images per second of the integer path, costs included. Baseline: the NumPy emulator's logits."""
    problem, deployed, pixels = _deployed(sizes)
    seconds = interleaved_seconds(
        [
            functools.partial(hard_run, deployed, pixels, problem.accelerator),
            functools.partial(
                emulator.emulate,
                deployed.structure,
                deployed.layers,
                deployed.ends,
                pixels,
                tensors=("logits",),
            ),
        ],
        sizes.repeats,
    )
    done = (len(pixels), len(pixels))
    return [_rates("hard_path", "image/s", "NumPy emulator", done, seconds)]


def bench_compile(sizes: BenchSizes) -> list[Record]:
    """Measures processor seconds of compiling and of tracing the joint step of the deeper model.

    Baseline: the shallower model. Depths take turns, each time with new functions, so that nothing is cached.
    """
    problems = []
    for num_layers in sizes.layers:
        model = dataclasses.replace(sizes.experiment.model, num_layers=num_layers)
        problems.append(bench_problem(dataclasses.replace(sizes.experiment, model=model)))
    seconds = [
        [budgeted_step(*problem, MODES["joint"]).compile_seconds() for problem in problems]
        for _ in range(sizes.compilations)
    ]
    (base_trace, base_compile), (trace, compile_) = np.median(seconds, axis=0).tolist()
    shallow, deep = sizes.layers
    baseline = f"{shallow} layers"
    return [
        _record(f"compile_{deep}_layers", compile_, "CPU s", baseline, base_compile),
        _record(f"trace_{deep}_layers", trace, "CPU s", baseline, base_trace),
    ]


@functools.partial(jax.jit, static_argnames=("structure", "mechanism"))
def _traced(
    layers: dict[str, jax.Array],
    ends: dict[str, jax.Array],
    pixels: jax.Array,
    structure: ModelStructure,
    mechanism: Mechanism,
) -> tuple[dict[str, jax.Array], Workload]:
    output = vit.apply_hard(
        layers, ends, pixels, structure=structure, mechanism=mechanism, tracing=True
    )
    return output.trace, output.workload


def bench_simulator(sizes: BenchSizes) -> list[Record]:
    """Measures images per second of the cost model on counts. Baseline: the row-by-row simulator on the same masks."""
    problem, deployed, pixels = _deployed(sizes)
    structure = deployed.structure
    with jax.enable_x64(True):
        tensors, workload = jax.tree.map(
            np.asarray,
            _traced(
                *deployed.hard_arrays(),
                pixels,
                structure=structure,
                mechanism=mechanism_by_name(structure.mechanism),
            ),
        )
    trace = trace_of(deployed, TracedBatch(tensors=tensors, counts={}, costs={}))
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), workload)
    seconds = interleaved_seconds(
        [
            functools.partial(jax.jit(cost), narrow, problem.accelerator),
            lambda: simulate(trace, problem.spec, gemm_shapes(structure)),
        ],
        sizes.repeats,
    )
    done = (len(pixels), len(pixels))
    return [_rates("cost_of_counts", "image/s", "row simulator on masks", done, seconds)]


BENCHMARKS: dict[str, Callable[[BenchSizes], list[Record]]] = {
    "cost": bench_cost,
    "training": bench_training,
    "parts": bench_parts,
    "hard_path": bench_hard_path,
    "compile": bench_compile,
    "simulator": bench_simulator,
}
DEFAULT_NAMES = ("cost", "training", "hard_path", "simulator", "compile")
"""All but `parts`, which only explains `training`."""
QUICK_NAMES = ("cost", "hard_path", "simulator")
"""Those that need no training step, whose compilation takes most of a minute."""
