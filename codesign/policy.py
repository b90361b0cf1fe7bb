"""The trainable knobs of a mechanism on a model, as one pytree that is optimised, frozen, hardened and exported alone."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from codesign.errors import UnknownNameError
from codesign.vocabulary import BLOCK_SITES

GROUPS = ("thresholds", "bits", "clips")
"""Optimiser groups of a policy's leaves."""

BITS_RANGE = {"linear": (2.0, 8.0), "attention": (8.0, 16.0), "filter": (2.0, 8.0)}
"""Legal widths in bit, inclusive: linear layers and filter planes 2 to 8, exact attention 8 to 16 (Energon section 3)."""

PLANE_RANGE = (4.0, 12.0)
"""Legal numbers of key planes that arrive bit by bit, the knob `plane_bits` (BitStopper, arXiv 2512.06457: 12)."""

ATTENTION_BITS = ("qk_bits", "v_bits")


@struct.dataclass
class Policy:
    """Knobs by name.

    `layers` have a leading axis L: `<site>.weight_bits`, `<site>.activation_bits`, `<site>.weight_clip` and
    `<site>.activation_clip` `[L]` for the sites of a block, `qk_bits` (Q, K and probabilities) and `v_bits` `[L]`, and the
    mechanism's own, e.g. `threshold` `[L, H, R]`. `ends` are the scalars of the model's `end_sites`. Bits are fractional
    while they train. A clip is the natural logarithm of the factor on a range: the calibrated one of an activation, the
    largest magnitude of a weight. Thresholds are unconstrained variables (alpha = tanh v for Energon).
    """

    layers: dict[str, jax.Array]
    ends: dict[str, jax.Array]


def group(name: str) -> str:
    """Returns the optimiser group of a knob by its name.

    Raises:
      UnknownNameError: If the name ends in none of `bits`, `clip`, `threshold`, `keep`.
    """
    leaf = name.rpartition(".")[2]
    if leaf.endswith("bits"):
        return "bits"
    if leaf.endswith("clip"):
        return "clips"
    if leaf.endswith(("threshold", "keep")):
        return "thresholds"
    raise UnknownNameError(
        f"knob `{name}` has no optimiser group: let its name end in bits, clip, threshold or keep"
    )


def is_filter_width(name: str) -> bool:
    """Returns whether a knob in group `bits` is a width of the filter, on which depends what it keeps."""
    return name not in ATTENTION_BITS and not name.endswith(("weight_bits", "activation_bits"))


def bits_range(name: str) -> tuple[float, float]:
    """Returns the legal range, in bit, of a knob in group `bits`."""
    if name == "plane_bits":
        return PLANE_RANGE
    if is_filter_width(name):
        return BITS_RANGE["filter"]
    return BITS_RANGE["attention" if name in ATTENTION_BITS else "linear"]


def dense_knobs(
    num_layers: int, *, linear_bits: float, attention_bits: float, end_sites: Sequence[str]
) -> Policy:
    """Returns the knobs every mechanism shares, all layers alike, ranges unclipped.

    Args:
      num_layers: L.
      linear_bits: Bits of weights and activations of linear layers, [2, 8].
      attention_bits: Bits of Q, K, probabilities and V, [8, 16].
      end_sites: Linear layers outside the blocks (`ModelStructure.end_sites`).
    """
    layers = {name: jnp.full((num_layers,), float(attention_bits)) for name in ATTENTION_BITS}
    for site in BLOCK_SITES:
        layers[f"{site}.weight_bits"] = jnp.full((num_layers,), float(linear_bits))
        layers[f"{site}.activation_bits"] = jnp.full((num_layers,), float(linear_bits))
        layers[f"{site}.weight_clip"] = jnp.zeros((num_layers,))
        layers[f"{site}.activation_clip"] = jnp.zeros((num_layers,))
    ends = {}
    for site in end_sites:
        ends[f"{site}.weight_bits"] = jnp.asarray(float(linear_bits))
        ends[f"{site}.activation_bits"] = jnp.asarray(float(linear_bits))
        ends[f"{site}.weight_clip"] = jnp.asarray(0.0)
        ends[f"{site}.activation_clip"] = jnp.asarray(0.0)
    return Policy(layers=layers, ends=ends)


def project(policy: Policy) -> Policy:
    """Returns the policy with every width moved into its legal range.

    Projection after the optimiser's step instead of a clip in the forward pass: a clip has no gradient at its rails
    (learning rules, section 3). Key widths rise by at least one bit from round to round, so that of R rounds round r has
    at least r bits above the lower limit and leaves R - 1 - r below the upper one.
    """

    def inside(name: str, value: jax.Array) -> jax.Array:
        if group(name) != "bits":
            return value
        low, high = bits_range(name)
        if name != "key_bits":
            return jnp.clip(value, low, high)
        rounds: list[jax.Array] = []
        for index in range(value.shape[-1]):
            least = rounds[-1] + 1.0 if rounds else low
            most = high - (value.shape[-1] - 1 - index)
            rounds.append(jnp.clip(value[..., index], least, most))
        return jnp.stack(rounds, axis=-1)

    return Policy(
        layers={name: inside(name, value) for name, value in policy.layers.items()},
        ends={name: inside(name, value) for name, value in policy.ends.items()},
    )


def has_whole_bits(policy: Policy) -> bool:
    """Returns whether every width is a whole number of bits."""
    return all(
        bool(np.all(np.asarray(value) % 1.0 == 0.0))
        for knobs in (policy.layers, policy.ends)
        for name, value in knobs.items()
        if group(name) == "bits"
    )


def deployed_bits(policy: Policy, *, offset: float | jax.Array = 0.0) -> Policy:
    """Returns the policy with integer widths, floor(b + 0.5 - offset), in range.

    Widths of the filter take no offset: thresholds were trained for the planes that the nearest widths give, and one bit
    more or less changes what they keep.

    Args:
      policy: A policy whose widths may be fractional.
      offset: Raises (positive) the threshold of rounding, in bit, so that a budget survives it (FracBits).
    """

    def rounded(name: str, value: jax.Array) -> jax.Array:
        if group(name) != "bits":
            return value
        return jnp.floor(value + 0.5 - (0.0 if is_filter_width(name) else offset))

    return project(
        Policy(
            layers={name: rounded(name, value) for name, value in policy.layers.items()},
            ends={name: rounded(name, value) for name, value in policy.ends.items()},
        )
    )
