"""What a curve holds: budgets, the uniform grid, and the kinds of its points."""

import dataclasses
import itertools
import math

from codesign.experiments.configs import Budget, BudgetMetric, Scope, require, require_at_least
from codesign.optimize import Group
from codesign.policy import BITS_RANGE

TRAINED_KINDS: dict[str, tuple[Group, ...]] = {
    "trained": ("params", "thresholds", "bits", "clips"),
    "uniform_tuned": ("params", "clips"),
    "bits_only": ("params", "bits", "clips"),
    "thresholds_only": ("params", "thresholds", "clips"),
}
"""What each kind of point trains. The ablations start from the uniform setting of their budget."""
COMPARED_KINDS = ("trained", "uniform_tuned")
"""The kinds that are no ablation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurveSettings:
    """What a curve holds."""

    # Budgets as fractions of the dense cost, falling, > 0; each point starts from the one before.
    budgets: tuple[float, ...] = (0.7, 0.6, 0.5, 0.4, 0.35, 0.3)
    # The cost under the budget, and whether linear layers count.
    metric: BudgetMetric = "energy"
    scope: Scope = "end_to_end"
    # Whether to add the two ablations.
    ablations: bool = False
    # The uniform grid: thresholds alike for all layers and heads, in the units of the mechanism's settings; none: its own.
    uniform_thresholds: tuple[tuple[float, ...], ...] = ()
    # The uniform grid: bits of all weights [2, 8], all activations [2, 8], and exact attention [8, 16].
    uniform_bits: tuple[tuple[int, int, int], ...] = (
        (8, 8, 16),
        (8, 8, 8),
        (6, 6, 12),
        (6, 6, 8),
        (5, 6, 8),
        (5, 5, 8),
        (4, 6, 8),
        (4, 5, 8),
        (4, 4, 8),
        (4, 3, 8),
        (3, 6, 8),
        (3, 5, 8),
        (3, 4, 8),
        (3, 3, 8),
        (3, 2, 8),
        (2, 6, 8),
        (2, 5, 8),
        (2, 4, 8),
        (2, 3, 8),
        (2, 2, 8),
    )
    # Validation images on which the uniform setting of each budget is chosen, >= 1.
    num_selection: int = 128
    # Resamples of the bootstrap, >= 1.
    num_resamples: int = 2000

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
          CodesignError: If a field is outside its range; names it.
        """
        falling = (math.inf, *self.budgets, 0.0)
        require(
            bool(self.budgets) and all(a > b for a, b in itertools.pairwise(falling)),
            "budgets",
            "be falling fractions of dense, > 0, e.g. 0.7 0.5 0.3",
            self.budgets,
        )
        for thresholds in self.uniform_thresholds:
            require(
                bool(thresholds) and all(math.isfinite(value) for value in thresholds),
                "curve.uniform_thresholds",
                "hold finite numbers",
                thresholds,
            )
        for bits in self.uniform_bits:
            ranges = [BITS_RANGE[kind] for kind in ("linear", "linear", "attention")]
            require(
                all(low <= b <= high for b, (low, high) in zip(bits, ranges, strict=True)),
                "curve.uniform_bits",
                "lie in [2, 8], [2, 8] and [8, 16] bit",
                bits,
            )
        require(bool(self.uniform_bits), "curve.uniform_bits", "hold at least one entry", ())
        require_at_least(self, "curve", 1, "num_selection", "num_resamples")

    @property
    def trained_kinds(self) -> tuple[str, ...]:
        """Kinds of points that are trained, in order."""
        return tuple(TRAINED_KINDS) if self.ablations else COMPARED_KINDS

    @property
    def num_points(self) -> int:
        """Points trained with one seed."""
        return len(self.trained_kinds) * len(self.budgets)

    def num_tried(self, num_thresholds: int) -> int:
        """Returns the settings of the uniform grid, over the mechanism's thresholds and bits."""
        return (len(self.uniform_thresholds) or num_thresholds) * len(self.uniform_bits)

    @property
    def num_measured(self) -> int:
        """Points measured with one seed: dense, uniform and trained ones."""
        return 1 + len(self.budgets) + self.num_points

    def budget(self, fraction: float) -> Budget:
        """Returns the budget of one point."""
        bound: dict[str, float] = {self.metric: fraction}
        return Budget(scope=self.scope, **bound)
