"""Random whole mappings of matrix products and convolutions, for tests of the dense cost model."""

import jax
import jax.numpy as jnp
import numpy as np

from codesign.hw.gemm.layer import Layer, widths
from codesign.hw.gemm.mapping import Mapping
from codesign.hw.gemm.names import CONVOLUTION, MATMUL

PRIMES = (2, 2, 2, 2, 3, 3)
"""Prime factors of every dimension that is not 1: its extent is 144."""


def random_points(
    num: int, *, dims: tuple[str, ...] = MATMUL, seed: int = 0
) -> tuple[Layer, Mapping]:
    """Returns `num` layers with mappings on four levels as on `gemmini`: weights stay in registers, C and K are spread."""
    rng = np.random.default_rng(seed)
    temporal = np.ones((num, 4, len(dims)))
    spatial = np.ones((num, 4, len(dims)))
    order = np.stack([[rng.permutation(len(dims)) for _ in range(4)] for _ in range(num)])
    for point in range(num):
        for dim, name in enumerate(dims):
            for prime in (3,) if name in "RS" else () if name == "N" else PRIMES:
                places = {"P": [0, 1, 2, 3], "Q": [0, 1, 2, 3]}.get(name, [1, 2, 3])
                spread = {"C": 1, "K": 2}.get(name)
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
    num: int, *, dims: tuple[str, ...] = MATMUL, seed: int = 0
) -> tuple[Layer, Mapping]:
    """Returns points whose factors are not whole, away from 1 and 2, where derivatives jump."""
    layer, mapping = random_points(num, dims=dims, seed=seed)
    rng = np.random.default_rng(seed + 1)

    def stretched(factors: jax.Array, used: np.ndarray) -> jax.Array:
        factor = np.asarray(factors) * rng.uniform(1.1, 1.4, size=factors.shape)
        return jnp.asarray(np.where(used, factor, 1.0))

    loops = np.asarray([[name in "PQN" or level for name in dims] for level in range(4)], bool)
    spread = np.asarray(
        [[(name, level) in {("C", 1), ("K", 2)} for name in dims] for level in range(4)]
    )
    temporal = stretched(mapping.temporal, loops[None])
    spatial = stretched(mapping.spatial, spread[None])
    extents = jnp.prod(temporal * spatial, axis=1)
    return (
        layer.replace(extents=extents),  # type: ignore[attr-defined]
        mapping.replace(temporal=temporal, spatial=spatial),  # type: ignore[attr-defined]
    )


MATMUL_AND_CONVOLUTION = (MATMUL, CONVOLUTION)
