"""The dense model in plain floating point: its outputs, remembered, and the ranges of its tensors."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.calibration import Calibration, floored, merge
from codesign.experiments.batches import Inputs, chunks
from codesign.experiments.data import Examples, Part
from codesign.gates import Relaxation
from codesign.mechanisms import MECHANISMS, Mechanism
from codesign.models.config import ModelConfig
from codesign.models.model import apply
from codesign.policy import Policy
from codesign.structure import ModelStructure, PatchInput

FLOAT_PAIRS = 2**24
"""Most query-key pairs of all heads and examples of a call of the float path: an array of them takes 64 MiB."""
MEASURING = Relaxation(temperature=jnp.ones(()), smoothness=jnp.ones(()))
"""Path on which a mechanism's own ranges are measured; deployed decisions, so that no width matters."""
FLOAT_CHUNK = 256
"""Most examples of such a call."""


@functools.partial(jax.jit, static_argnames=("config", "calibrating"))
def float_path(
    params: dict[str, Any], inputs: Inputs, config: ModelConfig, calibrating: bool = False
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """Returns logits and, if `calibrating`, absolute maxima of the model in plain floating point."""
    output = apply(
        params,
        None,
        None,
        inputs,
        config=config,
        mechanism=MECHANISMS["dense"],
        relaxation=None,
        calibrating=calibrating,
    )
    return output.logits, output.observed


def float_chunk(config: ModelConfig) -> Callable[[int], int]:
    """Returns how many examples of a given number of tokens the float path takes at once."""
    heads = config.structure.num_heads
    return sized(
        config.structure,
        lambda num_tokens: max(1, min(FLOAT_CHUNK, FLOAT_PAIRS // (heads * num_tokens**2))),
    )


def sized(structure: ModelStructure, size: Callable[[int], int]) -> Callable[[int], int]:
    """Returns the rows of a chunk by the tokens of a row, which are `max_tokens` for images of any kind."""
    if isinstance(structure.input, PatchInput):
        return lambda _: size(structure.max_tokens)
    return size


def calibrate(
    params: dict[str, Any], examples: Examples, config: ModelConfig, buckets: tuple[int, ...]
) -> Calibration:
    """Returns the absolute maxima over all of `examples`, measured in plain floating point."""
    measured = []
    for inputs, _ in chunks(examples, float_chunk(config), buckets):
        observed = float_path(params, inputs, config, calibrating=True)[1]
        measured.append(Calibration(layers=observed["layers"], ends=observed["ends"]))
    return floored(functools.reduce(merge, measured))


def own_ranges(
    params: dict[str, Any],
    policy: Policy,
    calibration: Calibration,
    mechanism: Mechanism,
    examples: Examples,
    config: ModelConfig,
    buckets: tuple[int, ...],
) -> Calibration:
    """Returns the calibration with the ranges that a mechanism wants besides, measured on its training path."""

    @jax.jit
    def observed(params: dict[str, Any], inputs: Inputs) -> dict[str, jax.Array]:
        output = apply(
            params,
            policy,
            calibration,
            inputs,
            config=config,
            mechanism=mechanism,
            relaxation=MEASURING,
            calibrating=True,
        )
        return {name: output.observed["layers"][name] for name in mechanism.own_ranges}

    measured = [
        Calibration(layers=observed(params, inputs), ends={})
        for inputs, _ in chunks(examples, float_chunk(config), buckets)
    ]
    own = floored(functools.reduce(merge, measured))
    return Calibration(layers=calibration.layers | own.layers, ends=calibration.ends)


class Teacher:
    """Outputs of the dense model, computed when first asked for and then kept.

    Args:
      params: Its parameters.
      config: Its sizes.
    """

    def __init__(self, params: dict[str, Any], config: ModelConfig):
        self.params = params
        self.config = config
        self._known: dict[tuple[Any, ...], NDArray[np.float32]] = {}

    def batch_logits(self, key: tuple[Any, ...], inputs: Inputs) -> NDArray[np.float32]:
        """Returns logits of a training batch, `[B, C]` or `[B, T, C]`; `key` tells it from other batches."""
        return self._logits(("train", *key), inputs)

    def part_logits(
        self, part: Part, indices: NDArray[np.int64], inputs: Inputs
    ) -> NDArray[np.float32]:
        """Returns logits of examples of a part of the data; `indices` are their places in it."""
        length = inputs["valid"].shape[1] if "valid" in inputs else None
        return self._logits((part, length, indices.tobytes()), inputs)

    def _logits(self, key: tuple[Any, ...], inputs: Inputs) -> NDArray[np.float32]:
        if key not in self._known:
            self._known[key] = np.asarray(float_path(self.params, inputs, self.config)[0])
        return self._known[key]
