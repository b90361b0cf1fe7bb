"""A policy applied to a model of one's own: what each of its layers is given, and where such a policy starts."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from codesign.calibration import Calibration
from codesign.errors import CodesignError
from codesign.gates import Relaxation
from codesign.mechanisms.dense import dense
from codesign.mechanisms.protocol import Hooks, Mechanism
from codesign.policy import BITS_RANGE, Policy, dense_knobs
from codesign.vocabulary import LINEAR_SITES


@struct.dataclass
class LayerPolicy:
    """One layer's part of an `AppliedPolicy`, which makes it; leaves without the layer axis.

    Attributes:
      knobs: Knobs by name; empty in floating point.
      ranges: Calibrated absolute maxima by tensor, scalars in its unit; empty in floating point.
      relaxation: None: floating point.
      valid: 1 for tokens that exist, `[B, T]`; None: all do.
      mechanism: Whose soft hooks run.
      calibrating: Whether absolute maxima are measured.
    """

    knobs: dict[str, jax.Array]
    ranges: dict[str, jax.Array]
    relaxation: Relaxation | None
    valid: jax.Array | None
    mechanism: Mechanism = struct.field(pytree_node=False)
    calibrating: bool = struct.field(pytree_node=False)

    @property
    def hooks(self) -> Hooks:
        """The hooks that run; in floating point those of dense attention."""
        return dense.soft if self.relaxation is None else self.mechanism.soft


@struct.dataclass
class AppliedPolicy:
    """A policy with all that running a model under it takes; without arguments plain floating point, counted as dense.

    Dense is exact attention at 16 bit and linear layers at 8 bit.

    Attributes:
      policy: The knobs (`policy_for`).
      calibration: Static ranges, from a run with `calibrating`.
      mechanism: From the registry or one's own; see `attention` for what it may hook.
      relaxation: Temperature and path; None: floating point, the policy and the mechanism ignored.
      valid: 1 for tokens that exist, `[B, T]`; None: all do.
      calibrating: Whether to measure absolute maxima; with a relaxation only those the mechanism wants besides.
    """

    policy: Policy | None = None
    calibration: Calibration | None = None
    mechanism: Mechanism = struct.field(pytree_node=False, default=dense)
    relaxation: Relaxation | None = None
    valid: jax.Array | None = None
    calibrating: bool = struct.field(pytree_node=False, default=False)

    def layer(self, index: int | jax.Array) -> LayerPolicy:
        """Returns the part of layer `index`, which may be traced (`lax.scan` over `jnp.arange(L)`).

        Raises:
          CodesignError: If something is missing, or there is no such layer.
        """
        if self.relaxation is None:
            return LayerPolicy({}, {}, None, self.valid, self.mechanism, self.calibrating)
        policy, calibration = self._quantised()
        self._check_knobs(policy)
        for name, tree in (("policy", policy.layers), ("calibration", calibration.layers)):
            least = min(len(value) for value in tree.values())
            if isinstance(index, int | np.integer) and not 0 <= index < least:
                raise CodesignError(f"layer {index} is not in `{name}`, which has {least}")
        return LayerPolicy(
            {name: value[index] for name, value in policy.layers.items()},
            {name: value[index] for name, value in calibration.layers.items()},
            self.relaxation,
            self.valid,
            self.mechanism,
            self.calibrating,
        )

    def ends(self) -> LayerPolicy:
        """Returns the part of the linear layers outside the layers, where no hooks run.

        Raises:
          CodesignError: If something is missing.
        """
        if self.relaxation is None:
            return LayerPolicy({}, {}, None, self.valid, dense, self.calibrating)
        policy, calibration = self._quantised()
        return LayerPolicy(
            policy.ends, calibration.ends, self.relaxation, self.valid, dense, self.calibrating
        )

    def _check_knobs(self, policy: Policy) -> None:
        """Raises `CodesignError` unless the policy has the knobs of every layer and of the mechanism."""
        shared = dense_knobs(1, linear_bits=8.0, attention_bits=16.0, end_sites=())
        expected = {*shared.layers, *self.mechanism.knobs(1, 1)}
        missing = sorted(expected - policy.layers.keys())
        if missing:
            raise CodesignError(
                f"the policy has no {', '.join(missing)}: start from `policy_for` of mechanism `{self.mechanism.name}`"
            )

    def _quantised(self) -> tuple[Policy, Calibration]:
        if self.policy is None or self.calibration is None:
            raise CodesignError(
                "`AppliedPolicy` with a `relaxation` needs `policy` and `calibration`: run the model once with "
                "`AppliedPolicy(calibrating=True)`, and start from `policy_for`"
            )
        return self.policy, self.calibration


def policy_for(
    calibration: Calibration,
    num_heads: int,
    mechanism: Mechanism,
    *,
    strength: float = 0.25,
    linear_bits: float = 7.5,
    attention_bits: float = 15.5,
) -> AppliedPolicy:
    """Returns where the policy of a model of one's own starts, all layers and heads alike, with its calibration.

    Args:
      calibration: The model's ranges, which say how many layers and which linear layers outside them there are.
      num_heads: H.
      mechanism: From the registry or one's own.
      strength: Of its thresholds, where they have a scale: 0 keeps nearly all, 1 drops most.
      linear_bits: Bits of weights and activations of linear layers, [2, 8]; off the integers to train.
      attention_bits: Bits of Q, K, probabilities and V, [8, 16].

    Raises:
      CodesignError: If the calibration is empty or lacks a tensor of the mechanism, the mechanism is none, or a number is
        out of its range.
    """
    if not isinstance(mechanism, Mechanism):
        raise CodesignError(
            f"`mechanism` must be a `Mechanism`, got {mechanism!r}: `codesign.mechanism_by_name(name)` gives one"
        )
    if num_heads < 1:
        raise CodesignError(f"`num_heads` must be at least 1, got {num_heads}")
    for name, bits, kind in (
        ("linear_bits", linear_bits, "linear"),
        ("attention_bits", attention_bits, "attention"),
    ):
        low, high = BITS_RANGE[kind]
        if not low <= bits <= high:
            raise CodesignError(f"`{name}` must lie in [{low:g}, {high:g}] bit, got {bits}")
    if "query" not in calibration.layers:
        raise CodesignError(
            "`calibration` is empty: take it from a run with `AppliedPolicy(calibrating=True)`"
        )
    if not 0.0 <= strength <= 1.0:
        raise CodesignError(f"`strength` must lie in [0, 1], got {strength}")
    num_layers = len(calibration.layers["query"])
    shared = dense_knobs(
        num_layers,
        linear_bits=linear_bits,
        attention_bits=attention_bits,
        end_sites=[site for site in LINEAR_SITES if site in calibration.ends],
    )
    own = mechanism.knobs(num_layers, num_heads)
    if mechanism.thresholds is not None:
        threshold = mechanism.thresholds.from_strength(
            np.full(own["threshold"].shape, strength),
            {name: np.asarray(value) for name, value in calibration.layers.items()},
        )
        own["threshold"] = jnp.asarray(threshold, own["threshold"].dtype)
    policy = Policy(layers=shared.layers | own, ends=shared.ends)
    return AppliedPolicy(policy, calibration, mechanism)
