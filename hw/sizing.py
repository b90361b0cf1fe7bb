"""Sizes of a machine as variables: legal ranges, caps on area and power, descent under them, and values that can be built.

They are those of `Accelerator.sizes`, in their own units; what moves is their logarithm, so that all stay positive.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from codesign import units
from codesign.errors import InfeasibleCapError, PresetError
from codesign.hw.accelerator import CLOCK, Accelerator, accelerator_from_spec
from codesign.hw.engine import area_mm2
from codesign.hw.file_faults import near
from codesign.hw.host import host_mm2
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.supply import clock_ratio, supply_range

Grid = Literal["whole", "power_of_two", "block", "percent", "free"]
Sizes = dict[str, jax.Array]
Bounds = dict[str, jax.Array]
Score = Callable[[Sizes], tuple[jax.Array, jax.Array]]
"""Sizes to what is minimised, scalar, and the caps' ratios `[K]`."""

LEAST, MOST = 1.0 / 16.0, 16.0
"""Range of a size over the file's own, where the file says nothing (ours)."""
BLOCK_BYTES = 64.0
"""Memories grow by blocks of main memory, 64 byte (AccelTran's constants count in them)."""
CAP_STEPS = 6
"""Newton steps that bring sizes back below the caps; area is nearly linear in each size (ours)."""
CAP_SLACK = 1e-3
"""Part of a cap that sizes keep away from it while they move, so that the last step does not end above (ours)."""
DESCENT_STEPS = 200
DESCENT_RATE = 0.05
"""Steps of `descended` and their length, octaves; falls along a cosine (ours)."""
MAX_MOVES = 400
"""Most moves of the search of `built`; each is one step of the grid in one or two sizes (ours)."""
LEAST_GAIN = 1e-5
"""What a move must lower the score by: less is rounding (ours)."""
CAP_TOLERANCE = 1e-6
"""Part of a cap by which rounding of single precision may exceed it."""


@dataclass(frozen=True, kw_only=True)
class SizeRange:
    """Smallest and largest legal value of a size, in its own unit, and the values between that can be built."""

    low: float
    high: float
    grid: Grid

    def neighbours(self, value: float) -> tuple[float, float]:
        """Returns the nearest values that can be built, at most and at least the given one."""
        match self.grid:
            case "free":
                return value, value
            case "percent":
                steps = 100.0 * value
                down, up = math.floor(steps + 1e-4) / 100.0, math.ceil(steps - 1e-4) / 100.0
            case "power_of_two":
                exponent = math.log2(value)
                down, up = 2.0 ** math.floor(exponent + 1e-6), 2.0 ** math.ceil(exponent - 1e-6)
            case "whole" | "block":
                step = 1.0 if self.grid == "whole" else BLOCK_BYTES
                steps = value / step
                down = max(1.0, math.floor(steps + 1e-4)) * step
                up = max(1.0, math.ceil(steps - 1e-4)) * step
        return max(self.low, min(down, self.high)), max(self.low, min(up, self.high))

    def next(self, value: float, direction: int) -> float:
        """Returns the next value up (1) or down (-1) that can be built, or the end of the range."""
        match self.grid:
            case "free":
                moved = value * 2.0 ** (direction / 8.0)
            case "percent":
                moved = value + direction / 100.0
            case "power_of_two":
                moved = value * 2.0**direction
            case "whole" | "block":
                moved = value + direction * (1.0 if self.grid == "whole" else BLOCK_BYTES)
        return float(max(self.low, min(moved, self.high)))


@dataclass(frozen=True, kw_only=True)
class Caps:
    """Upper bounds that sizes keep: area in mm2, host included, and mean power over the workload in watt; None: none."""

    # Area in mm2, host included; the file's own where none is given.
    area_mm2: float | None = None
    # Mean power over the workload, watt.
    power_w: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the bounds that are set."""
        return tuple(name for name in ("area_mm2", "power_w") if getattr(self, name) is not None)


def _grid(name: str) -> Grid:
    if name == CLOCK:
        return "percent"
    if name.endswith("bytes_per_cycle"):
        return "free"
    if name.endswith("bytes"):
        return "block"
    return "power_of_two" if name.endswith((".width", "query_block")) else "whole"


def size_ranges(spec: AcceleratorSpec) -> dict[str, SizeRange]:
    """Returns the legal range of every size of a machine.

    A file's table `[sizes]` gives them as factors of its own sizes. Without: a sixteenth to sixteen times, main memory
    never faster than the file's, since its interface has no area here; the clock as supplies of 0.6 to 1.1 times the file's
    allow.

    Raises:
      PresetError: If the table names no size of the machine, or a range does not hold the file's own size.
    """
    own = {name: float(value) for name, value in accelerator_from_spec(spec).sizes.items()}
    for name in spec.sizes:
        if name not in own:
            raise PresetError(f"{spec.name}: `sizes`: no size `{name}`: {near(name, own)}")
    ranges = {}
    for name, value in own.items():
        grid = _grid(name)
        given = spec.sizes.get(name)
        least, most = LEAST, 1.0 if grid == "free" else MOST
        if name == CLOCK:
            assert spec.threshold_ratio is not None
            supplies = supply_range(spec.threshold_ratio)
            least, most = (clock_ratio(supply, spec.threshold_ratio) for supply in supplies)
        if given is not None:
            if name == CLOCK and not (least <= given.least.value and given.most.value <= most):
                raise PresetError(
                    f"{spec.name}: `sizes.{CLOCK}`: supplies of {supplies[0]:.3g} to {supplies[1]:.3g} times the file's "
                    f"allow clocks of {least:.3g} to {most:.3g} times its own: keep the range inside"
                )
            least, most = given.least.value, given.most.value
        elif name == CLOCK:
            # A supply that is the least already stays, whatever rounding says.
            least = math.ceil(100.0 * least - 1e-6) / 100.0
            most = math.floor(100.0 * most + 1e-6) / 100.0
        floor = {"whole": 1.0, "power_of_two": 1.0, "block": BLOCK_BYTES}.get(grid, 0.0)
        ranges[name] = SizeRange(low=max(value * least, floor), high=value * most, grid=grid)
    return ranges


def with_sizes(accelerator: Accelerator, sizes: Mapping[str, jax.Array]) -> Accelerator:
    """Returns the machine with other sizes, those named."""
    result: Accelerator = accelerator.replace(sizes=accelerator.sizes | dict(sizes))  # type: ignore[attr-defined]
    return result


def bounds_of(ranges: Mapping[str, SizeRange]) -> Bounds:
    """Returns the ends of the ranges, `[2]` each."""
    return {name: jnp.asarray([one.low, one.high], float) for name, one in ranges.items()}


def total_area_mm2(accelerator: Accelerator) -> jax.Array:
    """Returns the area of a machine with its host, mm2, scalar."""
    parts = area_mm2(accelerator) | host_mm2(accelerator)
    return functools.reduce(jnp.add, parts.values())


def cap_ratios(
    accelerator: Accelerator, energy_pj: jax.Array, latency_cycles: jax.Array, caps: Caps
) -> jax.Array:
    """Returns what a machine takes over each cap that is set, `[K]`.

    Args:
      accelerator: The machine.
      energy_pj: Energy of a workload, pJ, scalar.
      latency_cycles: Its latency, cycles, scalar.
      caps: The caps.
    """
    taken = {
        "area_mm2": total_area_mm2(accelerator),
        "power_w": energy_pj / units.PJ_PER_J * accelerator.structure.clock_hz / latency_cycles,
    }
    return (
        jnp.stack([taken[name] / getattr(caps, name) for name in caps.names])
        if (caps.names)
        else jnp.zeros((0,))
    )


def check_caps(spec: AcceleratorSpec, caps: Caps) -> None:
    """Raises `InfeasibleCapError` if a cap is not positive, or the smallest legal machine is larger than that on area."""
    for name in caps.names:
        value = getattr(caps, name)
        if not 0.0 < value < math.inf:
            raise InfeasibleCapError(
                f"`caps.{name}` must be > 0 and finite, got {value}: change it"
            )
    if caps.area_mm2 is None:
        return
    smallest = {name: jnp.asarray(one.low) for name, one in size_ranges(spec).items()}
    least = float(total_area_mm2(with_sizes(accelerator_from_spec(spec), smallest)))
    if least > caps.area_mm2:
        raise InfeasibleCapError(
            f"`caps.area_mm2` {caps.area_mm2:g} is below the smallest legal machine of preset `{spec.name}`, {least:.4g} "
            "mm2: raise it, or widen `[sizes]` in the file"
        )


def inside(sizes: Sizes, bounds: Bounds, ratios_fn: Callable[[Sizes], jax.Array]) -> Sizes:
    """Returns sizes moved into their ranges and below the caps, by the shortest way in logarithms.

    Newton steps along the gradient of each cap's logarithm. Where ranges leave no room a cap may stay broken.

    Args:
      sizes: Scalars by name.
      bounds: Their ranges.
      ratios_fn: Sizes to what they take over each cap, `[K]`.
    """

    def clipped(values: Sizes) -> Sizes:
        return {name: jnp.clip(value, *bounds[name]) for name, value in values.items()}

    def step(values: Sizes, _: None) -> tuple[Sizes, None]:
        def excess(octaves: Sizes) -> jax.Array:
            return jnp.log(ratios_fn(_moved(values, octaves))) + CAP_SLACK

        nowhere = jax.tree.map(jnp.zeros_like, values)
        over, back = jax.vjp(excess, nowhere)
        slopes = jax.vmap(back)(jnp.eye(len(over), dtype=over.dtype))[0]
        octaves = nowhere
        for index in range(len(over)):
            slope = {}
            for name, value in values.items():
                own, (low, high) = slopes[name][index], bounds[name]
                # What is at the end of its range cannot move further.
                is_stuck = jnp.where(own > 0.0, value <= low, value >= high)
                slope[name] = jnp.where(is_stuck, 0.0, own)
            length = functools.reduce(jnp.add, [jnp.square(one) for one in slope.values()])
            share = jax.nn.relu(over[index]) / (length + 1e-12)
            octaves = {name: octaves[name] - share * slope[name] for name in values}
        return clipped(_moved(values, octaves)), None

    sizes = clipped(sizes)
    if jax.eval_shape(ratios_fn, sizes).shape[0] == 0:
        return sizes
    return jax.lax.scan(step, sizes, None, length=CAP_STEPS)[0]


def _moved(sizes: Sizes, octaves: Sizes) -> Sizes:
    return {name: value * jnp.exp2(octaves[name]) for name, value in sizes.items()}


def descended(sizes: Sizes, bounds: Bounds, score: Score) -> Sizes:
    """Returns the best sizes of a descent from given ones, caps and ranges kept at every step.

    Args:
      sizes: Where to start.
      bounds: Ranges.
      score: What is minimised, and the caps; differentiable.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(DESCENT_RATE, DESCENT_STEPS))
    nowhere = jax.tree.map(jnp.zeros_like, sizes)

    def caps(values: Sizes) -> jax.Array:
        return score(values)[1]

    def better(value: jax.Array, values: Sizes, least: jax.Array, best: Sizes) -> Sizes:
        chosen: Sizes = jax.tree.map(
            lambda new, old: jnp.where(value < least, new, old), values, best
        )
        return chosen

    # A step begins with the caps and ends with the update, so that a program holds either once.
    def step(carry: tuple[Sizes, Any, jax.Array, Sizes], _: None) -> tuple[Any, None]:
        moved, state, least, best = carry
        values = inside(moved, bounds, caps)
        value, slopes = jax.value_and_grad(lambda octaves: score(_moved(values, octaves))[0])(
            nowhere
        )
        best = better(value, values, least, best)
        updates, state = optimizer.update(slopes, state)
        return (_moved(values, updates), state, jnp.minimum(value, least), best), None

    carry = (sizes, optimizer.init(nowhere), jnp.asarray(jnp.inf, float), sizes)
    (_, _, _, best), _ = jax.lax.scan(step, carry, None, length=DESCENT_STEPS + 1)
    return best


def built(
    sizes: Mapping[str, jax.Array],
    ranges: Mapping[str, SizeRange],
    scores_fn: Score,
) -> dict[str, float]:
    """Returns sizes that can be built, near given ones: rounded down, then moved step by step while that pays.

    A move takes one or two sizes a step of their grids up or down; the best of all that keep the caps is made, until none
    lowers the score. Sizes are not moved further than the search needs: what pays nothing stays rounded down.

    Args:
      sizes: Relaxed sizes that keep the caps.
      ranges: Legal values.
      scores_fn: Sizes `[N]` each to scores `[N]` and caps' ratios `[N, K]`; N is the same in every call.

    Raises:
      InfeasibleCapError: If the caps leave no such sizes.
    """
    names = tuple(sizes)
    here = np.asarray(
        [ranges[name].neighbours(float(sizes[name]))[0] for name in names], np.float64
    )
    single = [(place, way) for place in range(len(names)) for way in (1, -1)]
    moves = [(one,) for one in single] + [
        pair for pair in itertools.combinations(single, 2) if pair[0][0] != pair[1][0]
    ]

    def moved(move: tuple[tuple[int, int], ...]) -> NDArray[np.float64]:
        there = here.copy()
        for place, way in move:
            there[place] = ranges[names[place]].next(there[place], way)
        return there

    def scored(tried: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        table = np.stack(tried)
        scores, ratios = scores_fn(
            {name: jnp.asarray(table[:, place]) for place, name in enumerate(names)}
        )
        is_legal = np.all(np.asarray(ratios) <= 1.0 + CAP_TOLERANCE, axis=-1)
        return np.where(is_legal, np.asarray(scores, np.float64), np.inf)

    for _ in range(MAX_MOVES):
        tried = [here] + [moved(move) for move in moves]
        scores = scored(tried)
        if math.isinf(scores[0]):
            raise InfeasibleCapError(
                "the trained sizes keep the caps, what can be built near them does not: raise a cap"
            )
        place = int(np.argmin(scores))
        if not scores[place] < scores[0] - LEAST_GAIN:
            break
        here = tried[place]
    return dict(zip(names, (float(value) for value in here), strict=True))
