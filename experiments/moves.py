"""Common moves of a policy, all layers and heads alike: narrower widths, stronger thresholds."""

import jax
import numpy as np

from codesign.experiments.evaluate import Point
from codesign.experiments.start import ranges_of, with_threshold
from codesign.mechanisms.threshold_scale import ThresholdScale
from codesign.policy import ATTENTION_BITS, Policy, bits_range, deployed_bits, group, project

FILTER_WIDTHS = ("query_bits", "key_bits")
"""Widths that a common move leaves alone: they are at a few bits from the start."""


def narrowed(policy: Policy, move: float, *, activation_share: float = 1.0) -> Policy:
    """Returns the policy with its widths moved towards their lower limits: `move` of the way, 0 to 1.

    Exact attention goes first (up to a half), where narrowing costs least quality, then the linear layers, whose
    activations go `activation_share` of the way of their weights.
    """

    def inside(name: str, value: jax.Array) -> jax.Array:
        if not name.endswith("bits") or name in FILTER_WIDTHS:
            return value
        low = bits_range(name)[0]
        part = min(max(2.0 * move if name in ATTENTION_BITS else 2.0 * move - 1.0, 0.0), 1.0)
        share = activation_share if name.endswith(".activation_bits") else 1.0
        return low + (value - low) * (1.0 - share * part)

    return Policy(
        layers={name: inside(name, value) for name, value in policy.layers.items()},
        ends={name: inside(name, value) for name, value in policy.ends.items()},
    )


def with_spare(policy: Policy, spare: float) -> Policy:
    """Returns the policy with widths that far above the whole ones that are deployed, in bit; filters' widths stay."""
    deployed = deployed_bits(policy)

    def part(trained: dict[str, jax.Array], whole: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: value + spare
            if group(name) == "bits" and name not in FILTER_WIDTHS
            else trained[name]
            for name, value in whole.items()
        }

    return project(
        Policy(layers=part(policy.layers, deployed.layers), ends=part(policy.ends, deployed.ends))
    )


def raised(
    point: Point, move: float, scale: ThresholdScale | None, *, only_pairs: bool = False
) -> Policy:
    """Returns the point's policy with its thresholds, if it has any, moved part of the way to strength 1, or 0.

    Args:
      point: Where the thresholds are.
      move: That part, in [-1, 1]: 1 makes them the strongest, -1 drops next to nothing.
      scale: How strong a threshold is; None: there is none.
      only_pairs: Whether entries behind that of the pairs stay: what they drop is not pairs but whole rows and tokens.
    """
    if scale is None:
        return point.policy
    ranges = ranges_of(point.calibration)
    strength = scale.to_strength(np.asarray(point.policy.layers["threshold"], np.float64), ranges)
    moved = strength + (1.0 - strength if move > 0.0 else strength) * move
    if only_pairs and scale.pairs_entry is not None and scale.pairs_entry >= 0:
        others = slice(scale.pairs_entry + 1, None)
        moved[..., others] = strength[..., others]
    return with_threshold(point.policy, scale.from_strength(moved, ranges))
