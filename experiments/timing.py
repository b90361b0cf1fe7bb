"""Measuring: calls by turns, a training step with its compilation and memory, the device, and the record of a figure."""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from codesign.errors import CodesignError
from codesign.optimize import StepFn, TrainStep

Record = dict[str, Any]
"""`{name, value, unit, baseline, ratio}`; `baseline` is `{name, value}` in the same unit, `ratio` the value over it."""


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


def make_record(name: str, value: float, unit: str, baseline: str, baseline_value: float) -> Record:
    """Returns the record of a figure beside its baseline in the same unit."""
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "baseline": {"name": baseline, "value": baseline_value},
        "ratio": value / baseline_value,
    }


def rate_record(
    name: str, unit: str, baseline: str, done: tuple[int, int], seconds: Sequence[float]
) -> Record:
    """Returns what was done per second by the first and, as its baseline, the second of two calls."""
    return make_record(name, done[0] / seconds[0], unit, baseline, done[1] / seconds[1])


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


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled training step with its arguments; it consumes the buffers of `state`.

    `trace_seconds` (lowering included) and `compile_seconds` are processor time.
    """

    run: jax.stages.Compiled
    state: Any
    batch: Any
    constants: Any
    trace_seconds: float
    compile_seconds: float

    def peak_bytes(self) -> int:
        """Returns what the compiler says that arguments and temporary arrays take together.

        Raises:
          CodesignError: If the compiler of this device does not say.
        """
        memory = self.run.memory_analysis()
        if memory is None:
            backend = jax.default_backend()
            raise CodesignError(
                f"`{backend}` tells no memory of a compiled step: measure on another"
            )
        total: int = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return total

    def steps(self, number: int) -> Callable[[], Any]:
        """Returns a function that takes `number` steps from where it last stopped and returns the last metrics."""
        held = [self.state]

        def call() -> Any:
            metrics: Any = None
            for _ in range(number):
                held[0], metrics = self.run(held[0], self.batch, self.constants)
            return metrics

        return call


@dataclasses.dataclass(frozen=True)
class TimedStep:
    """A jitted training step `(state, batch, constants) -> (state, metrics)` with its arguments."""

    step: jax.stages.Wrapped
    state: Any
    batch: Any
    constants: Any

    @classmethod
    def of(cls, step: StepFn, state: Any, batch: Any, constants: Any) -> "TimedStep":
        """Returns a step of `make_train_step` without the rounding where its hardened stage begins."""
        assert isinstance(step, TrainStep)
        return cls(step.compiled, state, batch, constants)

    def compiled(self) -> CompiledStep:
        """Compiles the step."""
        start = time.process_time()
        lowered = self.step.lower(self.state, self.batch, self.constants)
        traced = time.process_time()
        executable = lowered.compile()
        compiled = time.process_time()
        return CompiledStep(
            run=executable,
            state=self.state,
            batch=self.batch,
            constants=self.constants,
            trace_seconds=traced - start,
            compile_seconds=compiled - traced,
        )
