"""On every machine and its host: cost never falls with bits or work, latency never rises with a larger machine."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from codesign.hw.accelerator import CLOCK, accelerator_from_spec
from codesign.hw.closed_form import ModelShape, Setting
from codesign.hw.operating_points import closed_form_workload, published_setting
from codesign.hw.spec import load_preset, preset_names
from codesign.hw.surrogate import SCOPES, cost

SHAPE = ModelShape(
    num_layers=2,
    num_tokens=64,
    num_heads=2,
    head_dim=32,
    width=64,
    hidden=128,
    embed=(64, 64, 64),
    head=(64, 64, 64),
)
"""Sides of the host's products are multiples of every host drawn, twice as large too: a part-empty array may lose."""
TOKENS = (40, 48, 56)
"""Shorter examples whose counts have as many places as those of `SHAPE`."""
NUM_MACHINES = 8
MORE, ROUNDING = 1.37, 1e-9
EVERY = pytest.mark.parametrize("preset", preset_names())


def drawn_sizes(sizes: dict[str, jax.Array], rng: np.random.Generator) -> dict[str, float]:
    """Sizes of half to twice the preset's; memories and bandwidth vary more, so that they bind now and then; its clock."""
    drawn = {}
    for name, size in sizes.items():
        exponent = 0.0 if name == CLOCK else rng.uniform(-1.0, 1.0)
        if "bytes" in name:
            exponent = rng.uniform(-8.0, 4.0)
        if name == "processing_elements":
            exponent = rng.uniform(
                -6.0, 1.0
            )  # A server has a lane for every tile of so small a model.
        if name in ("host.rows", "host.cols"):
            exponent = float(rng.integers(-1, 2))
        drawn[name] = float(size) * 2.0**exponent
    return drawn


def kinds_of_more(labels: list[str]) -> dict[str, list[int]]:
    """Leaves of a workload that may grow together, by name.

    Each width and density alone; all counts of a stage; vectors of a stream. Rows of products and of attention grow with
    the tokens alone, since other counts must agree with them.
    """
    kinds: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        if label.startswith(".rows") or label.endswith("].rows"):
            continue
        is_count = label.endswith(".count")
        name = f"{label.partition('.')[2].partition('.')[0]}.count" if is_count else label
        kinds.setdefault(name, []).append(place)
    return kinds


@dataclasses.dataclass(frozen=True)
class Prices:
    """Latency and energy of both scopes, `[M, 4]`, as drawn and, by what is larger, after that."""

    base: np.ndarray
    more_work: dict[str, np.ndarray]
    fewer_tokens: list[np.ndarray]
    larger: dict[str, np.ndarray]


@functools.cache
def prices(preset: str) -> Prices:
    """Prices a workload on random machines, and again with each of its leaves and each of their sizes grown, in float64."""
    with jax.enable_x64(True):
        spec = load_preset(preset)
        accelerator = accelerator_from_spec(spec)
        # Rows of 1, 2, 4, ... keys: only of whole numbers are steps of lanes exact.
        published = published_setting(spec)
        kept = tuple(2.0 ** round(np.log2(share)) for share in published.kept)
        setting = dataclasses.replace(published, kept=kept)
        whole, *shorter = (leaves_of(preset, count, setting) for count in (64, *TOKENS))
        names, leaves = list(whole), list(whole.values())
        workload = closed_form_workload(spec, SHAPE, setting)
        kinds = kinds_of_more(names)

        @functools.partial(jax.jit, compiler_options=tiny_model.FAST_COMPILE)
        @jax.vmap
        def priced(parts: list[jax.Array], sizes: dict[str, jax.Array]) -> jax.Array:
            worked = jax.tree.unflatten(jax.tree.structure(workload), parts)
            found = cost(worked, accelerator.replace(sizes=sizes))
            return jnp.stack(
                [found.latency_cycles(scope)[0] for scope in SCOPES]
                + [found.energy_pj(scope)[0] for scope in SCOPES]
            )

        rng = np.random.default_rng(0)
        grown = [name for name in accelerator.sizes if name != CLOCK]
        points: list[tuple[list[np.ndarray], dict[str, float]]] = []
        for _ in range(NUM_MACHINES):
            sizes = drawn_sizes(accelerator.sizes, rng)
            points.append((leaves, sizes))
            for places in kinds.values():
                more = [leaf * MORE if at in places else leaf for at, leaf in enumerate(leaves)]
                points.append((more, sizes))
            points += [(list(one.values()), sizes) for one in shorter]
            points += [(leaves, sizes | {name: 2.0 * sizes[name]}) for name in grown]
        stacked: Any = jax.tree.map(lambda *parts: np.stack(parts), *points)
        found = np.asarray(priced(*stacked)).reshape(NUM_MACHINES, -1, 4)
    base, rest = found[:, 0], iter(np.moveaxis(found[:, 1:], 1, 0))
    return Prices(
        base=base,
        more_work={name: next(rest) for name in kinds},
        fewer_tokens=[next(rest) for _ in TOKENS],
        larger={name: next(rest) for name in grown},
    )


def leaves_of(preset: str, num_tokens: int, setting: Setting) -> dict[str, np.ndarray]:
    """The leaves of a workload by their path."""
    shape = dataclasses.replace(SHAPE, num_tokens=num_tokens)
    workload = closed_form_workload(load_preset(preset), shape, setting)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf, float)
        for path, leaf in jax.tree_util.tree_leaves_with_path(workload)
    }


@EVERY
def test_cost_never_falls_with_bits_or_work(preset: str) -> None:
    found = prices(preset)
    for name, more in found.more_work.items():
        assert np.all(more >= found.base * (1.0 - ROUNDING)), name
    grown = {name for name, more in found.more_work.items() if np.any(more > found.base)}
    assert "operations['pv.count" in grown
    for site in ("qkv", "out", "up", "down"):
        assert {f".block_gemms['{site}'].{bits}_bits" for bits in ("activation", "weight")} <= grown


@EVERY
def test_cost_never_falls_with_the_tokens(preset: str) -> None:
    found = prices(preset)
    steps = np.diff([*found.fewer_tokens, found.base], axis=0)
    # Where tiles wait for nothing but one another, tokens that fill up a last tile take no time.
    assert np.all(steps >= -ROUNDING * found.base)
    assert np.all(np.any(steps > 0.0, axis=(0, 1)))


@EVERY
def test_latency_never_rises_with_a_larger_machine_at_fixed_work(preset: str) -> None:
    """Lanes, widths, elements, memories, bandwidth, sides of the host; bandwidth takes no energy either.

    Not the query block: the closed form takes a last part block for a whole one, which a larger block may have and a
    smaller one not.
    """
    found = prices(preset)
    for name, larger in found.larger.items():
        if name == "query_block":
            continue
        assert np.all(larger[:, :2] <= found.base[:, :2] * (1.0 + ROUNDING)), name
    faster = found.larger["dram.bytes_per_cycle"]
    assert np.all(faster[:, 2:] <= found.base[:, 2:] * (1.0 + ROUNDING))
    shortened = {
        name
        for name, larger in found.larger.items()
        if np.any(larger[:, :2] < found.base[:, :2] * (1.0 - ROUNDING))
    }
    assert "dram.bytes_per_cycle" in shortened
    assert {name for name in ("host.rows", "host.cols") if name in found.larger} <= shortened
    assert any(name.endswith("lanes") for name in shortened)
