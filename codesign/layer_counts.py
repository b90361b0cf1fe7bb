"""What the layers of a model of one's own count, added up call by call and collected into a workload."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from codesign.calibration import Calibration, floored
from codesign.errors import CodesignError, UnknownNameError
from codesign.mechanisms.protocol import Counts
from codesign.vocabulary import BLOCK_SITES, SITES, check_key
from codesign.workload import Gemm, Workload, layers_second


@struct.dataclass
class LayerCounts:
    """What calls of one layer count, and the maxima they measure; `+` adds up a layer.

    Products of one site (separate projections of Q, K and V, a gated non-linearity's two) become one wider product.

    Attributes:
      counts: Counts of the hooks; its `observed` are absolute maxima by tensor.
      gemms: Dense products by site.
      head_dim: Width of a head; 0 where there is no attention.
    """

    counts: Counts = struct.field(default_factory=Counts)
    gemms: dict[str, Gemm] = struct.field(default_factory=dict)
    head_dim: int = struct.field(pytree_node=False, default=0)

    def __add__(self, other: "LayerCounts") -> "LayerCounts":
        """Returns the counts of both.

        Raises:
          CodesignError: If both hold an attention, or products of one site with different inputs.
        """
        mine, theirs = self.counts, other.counts
        shared = self.gemms.keys() & other.gemms.keys()
        gemms, densities = self.gemms | other.gemms, mine.densities | theirs.densities
        for site in shared:
            ours, others = self.gemms[site], other.gemms[site]
            if ours.inner != others.inner:
                raise CodesignError(
                    f"two products of site `{site}` have inputs of {ours.inner} and {others.inner} elements: only products "
                    "of one input share a site"
                )
            outer = ours.outer + others.outer
            gemms[site] = Gemm(ours.rows, ours.activation_bits, ours.weight_bits, ours.inner, outer)
            for name in {site, f"{site}.weight"} & mine.densities.keys() & theirs.densities.keys():
                part = ours.outer / outer
                densities[name] = (
                    part * mine.densities[name] + (1.0 - part) * theirs.densities[name]
                )
        for kind in ("operations", "rows", "streams"):
            twice = sorted(vars(mine)[kind].keys() & vars(theirs)[kind].keys())
            if twice:
                raise CodesignError(
                    f"`{twice[0]}` is counted twice in one layer: give every attention a layer of its own in the policy"
                )
        observed = mine.observed | theirs.observed
        for name in mine.observed.keys() & theirs.observed.keys():
            observed[name] = jnp.maximum(mine.observed[name], theirs.observed[name])
        counts = Counts(
            operations=mine.operations | theirs.operations,
            rows=mine.rows | theirs.rows,
            streams=mine.streams | theirs.streams,
            densities=densities,
            observed=observed,
        )
        return LayerCounts(counts, gemms, self.head_dim or other.head_dim)


def collect(
    layers: Sequence[LayerCounts] | LayerCounts, ends: LayerCounts | None = None
) -> tuple[Workload, Calibration]:
    """Returns what a model's layers counted, for a cost model, and the ranges they measured, empty unless calibrating.

    Args:
      layers: Counts of each layer, or those that `lax.scan` stacked, `[L, B, ...]`.
      ends: Counts of linear layers outside the layers.

    Raises:
      CodesignError: If there are no layers, they count different things, or none holds an attention.
    """
    if not isinstance(layers, LayerCounts):
        layers = _stacked(layers)
    counts = layers.counts
    if not layers.head_dim:
        raise CodesignError("no layer holds an attention: add the counts of `codesign.attention`")
    for name in counts.operations:
        check_key(name)
    stored = {f"{site}.weight" for site in BLOCK_SITES}
    unknown = sorted(counts.densities.keys() - set(SITES) - stored)
    if unknown:
        raise UnknownNameError(f"density of `{unknown[0]}`: use one of {', '.join(SITES)}")
    stacked = Workload(
        operations=counts.operations,
        rows=counts.rows,
        streams=counts.streams,
        block_gemms=layers.gemms,
        end_gemms={},
        head_dim=layers.head_dim,
        densities=counts.densities,
    )
    ends = ends or LayerCounts()
    workload: Workload = layers_second(stacked).replace(  # type: ignore[attr-defined]
        end_gemms=jax.tree.map(lambda leaf: leaf[:, None], ends.gemms)
    )
    return workload, floored(Calibration(layers=counts.observed, ends=ends.counts.observed))


def _stacked(layers: Sequence[LayerCounts]) -> LayerCounts:
    """Returns the counts of all layers with the layer axis in front."""
    if not layers:
        raise CodesignError("`layers` is empty: give the counts of every layer")

    def shapes(layer: LayerCounts) -> tuple[object, list[tuple[int, ...]]]:
        return jax.tree.structure(layer), [leaf.shape for leaf in jax.tree.leaves(layer)]

    for index, layer in enumerate(layers):
        if shapes(layer) != shapes(layers[0]):
            raise CodesignError(
                f"layer {index} counts something else than layer 0: all layers must make the same calls on the same sizes"
            )
    result: LayerCounts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return result
