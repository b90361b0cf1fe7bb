"""What the host watches while training runs: metrics that are not finite, thresholds without a gradient."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from codesign.errors import CodesignError, NonFiniteError

# A gradient this small for this many steps is dead (learning rules, section 8).
DEAD_GRADIENT_NORM = 1e-8
DEAD_GRADIENT_STEPS = 100

GRADIENT_NORM = "gradient_norm."
"""Start of the names of a step's metrics that are gradient norms, by optimiser group."""
THRESHOLD_GRADIENT = "threshold_gradient."
"""Start of the names of those by trained knob, `[L]`."""


def check_finite(metrics: Mapping[str, Any], step: int) -> None:
    """Raises an error if a step's metrics are not all finite.

    Args:
      metrics: Metrics of one step.
      step: The step they belong to, for the message.

    Raises:
      NonFiniteError: Names the step and the first term; terms of the loss come before what is
        computed from them.
    """
    if bool(metrics["is_finite"]):
        return
    derived = ("penalty", "objective", "price", GRADIENT_NORM, THRESHOLD_GRADIENT)
    for name in sorted(metrics, key=lambda name: (name.startswith(derived), name)):
        if not np.all(np.isfinite(metrics[name])):
            raise NonFiniteError(
                f"`{name}` is {np.asarray(metrics[name])} at step {step}: lower the rates or "
                "check the data, then resume from the last checkpoint"
            )
    raise AssertionError("`is_finite` is False, yet every metric is finite")


class ThresholdWatch:
    """Counts, layer by layer, the steps in a row that a threshold had no gradient.

    Attributes:
      quiet_steps: Steps in a row below `DEAD_GRADIENT_NORM`, `[L]` for each knob.
    """

    def __init__(self) -> None:
        self.quiet_steps: dict[str, np.ndarray] = {}

    def observe(self, metrics: Mapping[str, Any], step: int) -> None:
        """Takes in one step's metrics.

        Args:
          metrics: Metrics of one step.
          step: The step they belong to, for the message.

        Raises:
          CodesignError: If a threshold has been dead for `DEAD_GRADIENT_STEPS`; names the knob
            and the layer.
        """
        for name, norms in metrics.items():
            if not name.startswith(THRESHOLD_GRADIENT):
                continue
            is_quiet = np.asarray(norms) < DEAD_GRADIENT_NORM
            quiet = np.where(is_quiet, self.quiet_steps.get(name, 0) + 1, 0)
            self.quiet_steps[name] = quiet
            if np.any(quiet >= DEAD_GRADIENT_STEPS):
                raise CodesignError(
                    f"`{name.removeprefix(THRESHOLD_GRADIENT)}` of layer {int(np.argmax(quiet))} "
                    f"had no gradient for {DEAD_GRADIENT_STEPS} steps up to step {step}: start it "
                    "at a quantile of the scores, or raise `temperature_end`"
                )
