"""Random whole mappings of matrix products and convolutions, for tests of the dense cost model."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from codesign.hw.gemm.layer import Layer, widths
from codesign.hw.gemm.machine import Machine, machine_from_file
from codesign.hw.gemm.machine_file import MACHINE_FOLDER, parse_machine
from codesign.hw.gemm.mapping import Mapping
from codesign.hw.gemm.names import MATMUL

PRIMES = (2, 2, 2, 2, 3, 3)
"""Prime factors of every dimension that is not 1: its extent is 144."""


@dataclass(frozen=True)
class Dataflow:
    """What the registers hold, which loops run inside them, and which loops run along each side of the array."""

    stationary: str
    inside: tuple[str, ...]
    below_accumulator: str
    below_scratchpad: str


DATAFLOWS = {
    "weight_stationary": Dataflow("weights", ("P", "Q", "N"), "C", "K"),
    "input_stationary": Dataflow("inputs", ("K",), "C", "P"),
    "output_stationary": Dataflow("outputs", ("C", "R", "S"), "P", "K"),
}
"""Three arrays: `gemmini`, and the same with another tensor in its registers."""


def dataflow_machine(name: str) -> Machine:
    """Returns `gemmini` with another dataflow; cycles to fill and drain it are SCALE-Sim's."""
    flow = DATAFLOWS[name]
    tiles = ", ".join(f'"{dim}"' for dim in flow.inside)
    is_summing = flow.stationary == "outputs"
    changes = {
        'holds = ["weights"]\ntiles = ["P", "Q", "N"]\nword = { value = 8': (
            f'holds = ["{flow.stationary}"]\ntiles = [{tiles}]\nword = {{ value = {32 if is_summing else 8}'
        ),
        'spreads = ["C"]': f'spreads = ["{flow.below_accumulator}"]',
        'spreads = ["K"]': f'spreads = ["{flow.below_scratchpad}"]',
        'stationary = "weights"': f'stationary = "{flow.stationary}"',
        "constant = { value = 1,": f"constant = {{ value = {0 if is_summing else 1},",
        "cycles = { side = { value = 3": f"cycles = {{ side = {{ value = {2 if is_summing else 3}",
    }
    text = (MACHINE_FOLDER / "gemmini.toml").read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return machine_from_file(parse_machine(text, origin=f"{name}.toml"))


def random_points(
    num: int,
    *,
    dims: tuple[str, ...] = MATMUL,
    dataflow: str = "weight_stationary",
    seed: int = 0,
) -> tuple[Layer, Mapping]:
    """Returns `num` layers with mappings on the four levels of `dataflow_machine`, `gemmini` unless it is given."""
    flow = DATAFLOWS[dataflow]
    sides = {flow.below_accumulator: 1, flow.below_scratchpad: 2}
    rng = np.random.default_rng(seed)
    temporal = np.ones((num, 4, len(dims)))
    spatial = np.ones((num, 4, len(dims)))
    order = np.stack([[rng.permutation(len(dims)) for _ in range(4)] for _ in range(num)])
    for point in range(num):
        for dim, name in enumerate(dims):
            for prime in (3,) if name in "RS" else () if name == "N" else PRIMES:
                places = [0, 1, 2, 3] if name in flow.inside else [1, 2, 3]
                spread = sides.get(name)
                if spread is not None and rng.random() < 0.3:
                    spatial[point, spread, dim] *= prime
                else:
                    temporal[point, rng.choice(places), dim] *= prime
    stride = rng.integers(1, 3, size=(num, 2)).astype(float)
    return (
        Layer(
            extents=jnp.asarray(np.prod(temporal * spatial, axis=1)),
            stride=jnp.asarray(stride),
            bits=widths(),
            dims=dims,
        ),
        Mapping(
            temporal=jnp.asarray(temporal),
            spatial=jnp.asarray(spatial),
            order=jnp.asarray(order, dtype=jnp.int32),
            dims=dims,
        ),
    )


def relaxed_points(
    num: int,
    *,
    dims: tuple[str, ...] = MATMUL,
    dataflow: str = "weight_stationary",
    seed: int = 0,
) -> tuple[Layer, Mapping]:
    """Returns points all of whose loops have factors that are not whole, away from 1 and 2, where derivatives jump."""
    layer, mapping = random_points(num, dims=dims, dataflow=dataflow, seed=seed)
    flow = DATAFLOWS[dataflow]
    rng = np.random.default_rng(seed + 1)

    def stretched(factors: jax.Array, used: np.ndarray) -> jax.Array:
        factor = np.asarray(factors) * rng.uniform(1.1, 1.4, size=factors.shape)
        return jnp.asarray(np.where(used, factor, 1.0))

    loops = np.asarray(
        [[name in flow.inside or level for name in dims] for level in range(4)], bool
    )
    sides = {(flow.below_accumulator, 1), (flow.below_scratchpad, 2)}
    spread = np.asarray([[(name, level) in sides for name in dims] for level in range(4)])
    temporal = stretched(mapping.temporal, loops[None])
    spatial = stretched(mapping.spatial, spread[None])
    extents = jnp.prod(temporal * spatial, axis=1)
    return (
        layer.replace(extents=extents),  # type: ignore[attr-defined]
        mapping.replace(temporal=temporal, spatial=spatial),  # type: ignore[attr-defined]
    )
