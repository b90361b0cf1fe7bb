"""What the dense model costs on a machine, by the length of the example: the measure of every budget."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.experiments.batches import Inputs, chunks
from codesign.experiments.configs import BudgetMetric, Metric, Scope, with_edp
from codesign.experiments.data import Examples
from codesign.experiments.evaluate import DENSE_ATTENTION_BITS, DENSE_LINEAR_BITS, costs_of
from codesign.hw.accelerator import Accelerator
from codesign.hw.surrogate import SCOPES
from codesign.mechanisms import Hooks, Mechanism
from codesign.models.counting import dense_workload
from codesign.policy import BITS_RANGE
from codesign.structure import ModelStructure, PatchInput
from codesign.vocabulary import BLOCK_SITES, SITES

CHUNK_PAIRS = 2**23
"""Most query-key pairs of all heads and examples of one call."""

Costs = dict[Scope, dict[Metric, NDArray[np.float64]]]


@functools.partial(
    jax.jit, static_argnames=("structure", "hooks", "linear_bits", "attention_bits", "is_empty")
)
def _costs(
    valid: jax.Array,
    accelerator: Accelerator,
    structure: ModelStructure,
    hooks: Hooks,
    linear_bits: float,
    attention_bits: float,
    is_empty: bool,
) -> dict[Scope, dict[Metric, jax.Array]]:
    densities = dict.fromkeys(SKIPPED, 0.0) if is_empty else {}
    workload = dense_workload(
        valid,
        structure,
        linear_bits=linear_bits,
        attention_bits=attention_bits,
        densities=densities,
        hooks=hooks,
    )
    return costs_of(workload, accelerator)


SKIPPED = (*SITES, *(f"{site}.weight" for site in BLOCK_SITES))
"""Tensors whose zeros a machine can skip."""


class DenseCost:
    """Costs of attention without a mechanism by length, computed once for every bucket.

    Args:
      structure: Sizes of the model.
      accelerator: The machine.
      mechanism: The mechanism that the machine was made for, here switched off.
      linear_bits: Bits of weights and activations of linear layers.
      attention_bits: Bits of Q, K, probabilities and V.
      is_empty: Whether all that a machine can skip is zero: the least it can cost.
    """

    def __init__(
        self,
        structure: ModelStructure,
        accelerator: Accelerator,
        mechanism: Mechanism,
        *,
        linear_bits: float = DENSE_LINEAR_BITS,
        attention_bits: float = DENSE_ATTENTION_BITS,
        is_empty: bool = False,
    ):
        self.structure = structure
        self.accelerator = accelerator
        self.hooks = mechanism.bypass
        self.settings: dict[str, Any] = {
            "linear_bits": linear_bits,
            "attention_bits": attention_bits,
            "is_empty": is_empty,
        }
        self._tables: dict[int, Costs] = {}

    def of(self, inputs: Inputs) -> Costs:
        """Returns pJ and cycles of each example of a batch, `[B]`."""
        if isinstance(self.structure.input, PatchInput):
            bucket = self.structure.max_tokens
            lengths = np.full(len(inputs["pixels"]), bucket)
        else:
            bucket = inputs["valid"].shape[1]
            lengths = np.sum(inputs["valid"], axis=1)
        table = self._table(bucket)
        return {
            scope: {metric: values[lengths] for metric, values in costs.items()}
            for scope, costs in table.items()
        }

    def mean(
        self, examples: Examples, buckets: tuple[int, ...], scope: Scope
    ) -> dict[BudgetMetric, float]:
        """Returns pJ and cycles, means over examples, and their product."""
        totals: dict[Metric, float] = {"energy": 0.0, "latency": 0.0}
        for inputs, indices in chunks(examples, lambda num_tokens: len(examples), buckets):
            for metric, values in self.of(inputs)[scope].items():
                totals[metric] += float(np.sum(values[: len(indices)]))
        return with_edp({metric: total / len(examples) for metric, total in totals.items()})

    def _table(self, bucket: int) -> Costs:
        """Returns costs by length, `[bucket + 1]`; images have one length only."""
        if bucket not in self._tables:
            is_image = isinstance(self.structure.input, PatchInput)
            lengths = np.asarray([bucket]) if is_image else np.arange(1, bucket + 1)
            heads = self.structure.num_heads
            size = min(len(lengths), max(1, CHUNK_PAIRS // (heads * bucket**2)))
            table: Costs = {
                scope: {"energy": np.zeros(bucket + 1), "latency": np.zeros(bucket + 1)}
                for scope in SCOPES
            }
            for start in range(0, len(lengths), size):
                part = np.resize(lengths[start : start + size], size)
                valid = np.arange(bucket)[None, :] < part[:, None]
                with jax.enable_x64(True):
                    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self.accelerator)
                    found = _costs(
                        jnp.asarray(valid, jnp.float64),
                        wide,
                        self.structure,
                        self.hooks,
                        **self.settings,
                    )
                for scope in SCOPES:
                    for metric, values in found[scope].items():
                        table[scope][metric][part] = np.asarray(values)
            self._tables[bucket] = table
        return self._tables[bucket]


def least_cost(
    structure: ModelStructure, accelerator: Accelerator, mechanism: Mechanism
) -> DenseCost:
    """Returns a lower bound of what any legal policy costs: narrowest operands, everything skipped that can be.

    A filter's kept pairs stand for themselves (`codesign.hw.operating_points.cheapest_setting` is tighter there).
    """
    return DenseCost(
        structure,
        accelerator,
        mechanism,
        linear_bits=BITS_RANGE["linear"][0],
        attention_bits=BITS_RANGE["attention"][0],
        is_empty=mechanism.soft.skips_zeros,
    )
