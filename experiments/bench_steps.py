"""Speed and compilation of the training step, beside plain fine-tuning in floating point: on digits, and on MiniLM.

Weights and text are random and nothing is trained: no time here depends on the values.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from codesign.experiments.bench_sizes import BenchSizes, TextShape
from codesign.experiments.configs import MODES, Budget, Experiment
from codesign.experiments.data import Examples, Task, TextInput
from codesign.experiments.evaluate import Point
from codesign.experiments.problem import Problem, no_cost, outline, task_loss
from codesign.experiments.start import measured_ranges, start_policy
from codesign.experiments.teacher import Teacher
from codesign.experiments.timing import (
    CompiledStep,
    Record,
    TimedStep,
    interleaved_seconds,
    make_record,
)
from codesign.experiments.train import BudgetedTraining
from codesign.gates import Relaxation
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.spec import load_preset
from codesign.mechanisms import MECHANISMS
from codesign.models.config import ModelConfig
from codesign.models.model import apply
from codesign.models.parameters import init_params
from codesign.optimize import Group, LossAux, init_state, make_train_step
from codesign.policy import Policy

MS_PER_S = 1e3
BYTES_PER_MB = 1e6
NEVER_HARDENED = 1_000_000
"""Steps of the timed training: all timed ones are of its first stage, to which most steps of a run belong."""
PLAIN = "float fine-tuning"
"""Baseline of every step."""
MACHINES = {
    "energon": "energon",
    "acceltran": "acceltran-edge",
    "sofa": "sofa",
    "lapa": "lapa",
    "esact": "esact",
}
"""Preset of each mechanism whose step on MiniLM is timed."""
THRESHOLDS_TIMED = ("energon", "acceltran")
"""Mechanisms of which the step that trains thresholds alone is timed too."""
THRESHOLDS_ONLY: tuple[Group, ...] = ("thresholds",)


def random_text(shape: TextShape) -> Task:
    """Returns a batch of random tokens, all of which exist, with two random classes."""
    rng = np.random.default_rng(0)
    tokens = (shape.batch_size, shape.num_tokens)
    vocabulary_size = shape.structure.end_shapes()["token"][0]
    examples = Examples(
        inputs={
            "tokens": rng.integers(vocabulary_size, size=tokens).astype(np.int32),
            "valid": np.ones(tokens, np.bool_),
        },
        labels=rng.integers(shape.structure.num_outputs, size=shape.batch_size).astype(np.int32),
    )
    return Task(
        name="random",
        parts={"train": examples},
        kind="classification",
        num_outputs=shape.structure.num_outputs,
        input=TextInput(
            vocabulary_size=vocabulary_size,
            max_tokens=shape.num_tokens,
            tokenizer="characters",
            pad_id=0,
        ),
        origin="a random generator",
    )


def text_problem(shape: TextShape, mechanism: str) -> tuple[Problem, Point]:
    """Returns a text model on random rows, and a start point with random weights."""
    spec = load_preset(MACHINES[mechanism])
    config = ModelConfig(structure=shape.structure)
    return started(
        Problem(
            experiment=Experiment(
                task="random",
                mechanism=mechanism,
                preset=MACHINES[mechanism],
                batch_size=shape.batch_size,
                num_calibration=shape.batch_size,
                reach=0,
            ),
            task=random_text(shape),
            config=config,
            mechanism=MECHANISMS[mechanism],
            spec=spec,
            accelerator=accelerator_from_spec(spec),
            params={},
            teacher=Teacher({}, config),
        )
    )


def bench_problem(experiment: Experiment) -> tuple[Problem, Point]:
    """Returns the problem of an experiment and a start point, with random weights."""
    return started(outline(experiment))


def started(outlined: Problem) -> tuple[Problem, Point]:
    """Returns a problem with random weights, and its start point with the thresholds of its mechanism."""
    experiment, config = outlined.experiment, outlined.config
    params = init_params(config.structure, key=jax.random.key(experiment.seed))
    problem = dataclasses.replace(outlined, params=params, teacher=Teacher(params, config))
    policy = start_policy(
        problem,
        linear_bits=experiment.start_linear_bits,
        attention_bits=experiment.start_attention_bits,
    )
    calibration = measured_ranges(problem, params)
    return problem, Point(params=params, policy=policy, calibration=calibration)


def budgeted_step(
    problem: Problem, point: Point, train: tuple[Group, ...], *, has_cost: bool = True
) -> TimedStep:
    """Returns the training step on the deployed decisions, under an energy budget unless `has_cost` is False."""
    settings = dataclasses.replace(
        problem.experiment.optimize, train=train, num_steps=NEVER_HARDENED
    )
    training = BudgetedTraining(problem, settings, ("energy",) if has_cost else (), "end_to_end")
    if training.sizing is not None:
        point = dataclasses.replace(point, sizes=training.sizing.start)
    tree = training.initial(point, Budget(energy=0.5))
    return TimedStep.of(training.step, tree["state"], training.batch(0), tree["constants"])


def float_step(problem: Problem, point: Point) -> TimedStep:
    """Returns the step of plain fine-tuning: cross-entropy in floating point, the same optimiser, no policy."""

    def loss_fn(
        params: Any, policy: Policy, batch: Any, constants: Any, relaxation: Relaxation
    ) -> tuple[jax.Array, LossAux]:
        del policy, constants, relaxation
        output = apply(
            params,
            None,
            None,
            batch,
            config=problem.config,
            mechanism=MECHANISMS["dense"],
            relaxation=None,
        )
        return task_loss(output.logits, batch, 0.0)[0], LossAux(terms={}, workload=None)

    settings = dataclasses.replace(
        problem.experiment.optimize, train=("params",), num_steps=NEVER_HARDENED
    )
    state = init_state(point.params, Policy(layers={}, ends={}), settings, 1)
    batches = problem.batches(problem.experiment.batch_size, problem.experiment.seed)
    return TimedStep.of(make_train_step(loss_fn, no_cost, settings), state, batches.batch(0), {})


def step_milliseconds(steps: dict[str, CompiledStep], sizes: BenchSizes) -> dict[str, float]:
    """Returns the median time of each step, ms, all taking turns."""
    taken = interleaved_seconds(
        [step.steps(sizes.num_steps) for step in steps.values()], sizes.repeats
    )
    return {
        name: MS_PER_S * seconds / sizes.num_steps
        for name, seconds in zip(steps, taken, strict=True)
    }


def beside_first(prefix: str, suffix: str, unit: str, values: dict[str, float]) -> list[Record]:
    """Returns the record of each value but the first, which is the baseline of all."""
    (baseline, first), *others = values.items()
    return [
        make_record(f"{prefix}{name}{suffix}", value, unit, baseline, first)
        for name, value in others
    ]


def _step_records(steps: dict[str, TimedStep], sizes: BenchSizes) -> list[Record]:
    compiled = {name: step.compiled() for name, step in steps.items()}
    return beside_first("train_", "", "ms/step", step_milliseconds(compiled, sizes))


def bench_training(sizes: BenchSizes) -> list[Record]:
    """Measures a training step of each mode of `codesign train`. Baseline: plain fine-tuning in floating point."""
    problem, point = bench_problem(sizes.experiment)
    steps = {PLAIN: float_step(problem, point)}
    steps |= {mode: budgeted_step(problem, point, train) for mode, train in MODES.items()}
    return _step_records(steps, sizes)


def bench_parts(sizes: BenchSizes) -> list[Record]:
    """Measures what each part adds to the float step: quantisation, then the filter, then counts and cost.

    Baseline: plain fine-tuning in floating point.
    """
    problem, point = bench_problem(sizes.experiment)
    dense, dense_point = bench_problem(dataclasses.replace(sizes.experiment, mechanism="dense"))
    train = MODES["joint"]
    steps = {
        PLAIN: float_step(problem, point),
        "quantised": budgeted_step(dense, dense_point, train, has_cost=False),
        "quantised_filtered": budgeted_step(problem, point, train, has_cost=False),
        "quantised_filtered_costed": budgeted_step(problem, point, train),
    }
    return _step_records(steps, sizes)


def bench_compile(sizes: BenchSizes) -> list[Record]:
    """Measures processor seconds of compiling and of tracing the joint step of the deeper model.

    Baseline: the shallower model. Depths take turns, each time with new functions, so that nothing is cached.
    """
    problems = []
    for num_layers in sizes.layers:
        model = dataclasses.replace(sizes.experiment.model, num_layers=num_layers)
        problems.append(bench_problem(dataclasses.replace(sizes.experiment, model=model)))
    seconds = []
    for _ in range(sizes.compilations):
        steps = [budgeted_step(*problem, MODES["joint"]).compiled() for problem in problems]
        seconds.append([(step.trace_seconds, step.compile_seconds) for step in steps])
    (base_trace, base_compile), (trace, compile_) = np.median(seconds, axis=0).tolist()
    shallow, deep = sizes.layers
    baseline = f"{shallow} layers"
    return [
        make_record(f"compile_{deep}_layers", compile_, "CPU s", baseline, base_compile),
        make_record(f"trace_{deep}_layers", trace, "CPU s", baseline, base_trace),
    ]


def text_records(shape: TextShape, name: str, sizes: BenchSizes) -> list[Record]:
    """Returns time, memory and compilation of every mechanism's joint step, and of some with thresholds alone.

    Baseline: plain fine-tuning of the same model on the same batch.

    Args:
      shape: The model and its batch.
      name: Its name in the records.
      sizes: Repeats and steps.
    """
    steps: dict[str, TimedStep] = {}
    for mechanism in MACHINES:
        problem, point = text_problem(shape, mechanism)
        steps = steps or {PLAIN: float_step(problem, point)}
        steps[f"{mechanism}_joint"] = budgeted_step(problem, point, MODES["joint"])
        if mechanism in THRESHOLDS_TIMED:
            steps[f"{mechanism}_thresholds"] = budgeted_step(problem, point, THRESHOLDS_ONLY)
    compiled = {name: step.compiled() for name, step in steps.items()}
    peaks = {name: step.peak_bytes() / BYTES_PER_MB for name, step in compiled.items()}
    compilation = {name: step.compile_seconds for name, step in compiled.items()}
    return [
        *beside_first(f"{name}_", "", "ms/step", step_milliseconds(compiled, sizes)),
        *beside_first(f"{name}_", "_memory", "MB", peaks),
        *beside_first(f"{name}_", "_compile", "CPU s", compilation),
    ]


def bench_minilm_short(sizes: BenchSizes) -> list[Record]:
    """Measures steps of MiniLM on short rows; see `text_records`."""
    return text_records(sizes.short, "minilm_8x128", sizes)


def bench_minilm_long(sizes: BenchSizes) -> list[Record]:
    """Measures steps of MiniLM on long rows; see `text_records`."""
    return text_records(sizes.long, "minilm_2x512", sizes)
