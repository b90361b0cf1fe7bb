"""Schema of `config.json`, the readable part of an exported hardware configuration.

The format is described in `docs/export.md`. Imports no JAX.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from codesign.errors import ExportError
from codesign.hw.emulator import limit
from codesign.hw.spec import AcceleratorSpec
from codesign.structure import ModelStructure
from codesign.vocabulary import LINEAR_SITES

Array = npt.NDArray[Any]

SCHEMA_VERSION = 1

_END_SITES = ("embed", "head")

PositiveFloat = Annotated[float, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    """A frozen model that refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class IntegerPolicy(_Strict):
    """The trained knobs as the hardware holds them; lists go by layer."""

    thresholds: list[list[list[int]]]
    """Codes of alpha with 7 fraction bits, -128 for off, `[L][H][R]`."""
    query_bits: list[int]
    """Top bits of the query that enter the filter, `[L]`; empty without a filter."""
    key_bits: list[list[int]]
    """Top bits of the key in every round, `[L][R]`; empty without a filter."""
    qk_bits: list[int]
    """Bits of query, key and probabilities in exact attention, `[L]`."""
    v_bits: list[int]
    """Bits of the values, `[L]`."""
    weight_bits: dict[str, list[int]]
    """Bits of the weights by linear site, `[L]`; one entry for `embed` and `head`."""
    activation_bits: dict[str, list[int]]
    """Bits of the activations that enter a linear site; as `weight_bits`."""

    @classmethod
    def from_arrays(
        cls,
        layers: Mapping[str, Array],
        ends: Mapping[str, Array],
        weight_bits: Mapping[str, list[int]],
    ) -> Self:
        """Returns the policy that a deployment holds; the bits of its weights have to be given."""
        return cls(
            thresholds=layers["threshold"].tolist() if "threshold" in layers else [],
            query_bits=layers["query_bits"].tolist() if "query_bits" in layers else [],
            key_bits=layers["key_bits"].tolist() if "key_bits" in layers else [],
            qk_bits=layers["qk_bits"].tolist(),
            v_bits=layers["v_bits"].tolist(),
            weight_bits=dict(weight_bits),
            activation_bits={
                site: np.atleast_1d(values).tolist()
                for site, values in _by_site(layers, ends, "activation_bits").items()
            },
        )


class Scales(_Strict):
    """Real values of the integers; the integer path itself needs none of them."""

    activation_ranges: dict[str, list[PositiveFloat]]
    """Calibrated largest magnitude of a tensor, in real units of the model, by layer."""
    residual_scale: PositiveFloat
    """Real value of one code of the residual stream."""
    logit_scale: PositiveFloat
    """Real logit times the number of tokens, per integer logit."""


class ExpectedCost(_Strict):
    """Mean cost per example by the differentiable model of the accelerator."""

    energy_pj: PositiveFloat
    latency_cycles: PositiveFloat


class Expected(_Strict):
    """What the deployed model reached before it was exported."""

    part: Literal["train", "validation", "test"]
    """Part of the data on which it was measured."""
    num_examples: Annotated[int, Field(gt=0)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    """Fraction of examples classified correctly."""
    kl_nats: float
    """Mean divergence from the dense model's outputs, in nats."""
    attention: ExpectedCost
    """Cost of attention only."""
    end_to_end: ExpectedCost
    """Cost of the whole model, linear layers included."""
    area_mm2: PositiveFloat


class HardwareConfig(_Strict):
    """Everything about an exported model but its arrays."""

    schema_version: Literal[1] = 1
    generator: str
    """Program and version that wrote the export."""
    structure: ModelStructure
    policy: IntegerPolicy
    scales: Scales
    accelerator: AcceleratorSpec
    expected: Expected
    tables: dict[str, Sha256] = {}
    """SHA-256 of the little-endian int64 values of every look-up table; set on writing."""
    files: dict[str, Sha256] = {}
    """SHA-256 of the other files of the export; set on writing."""


def _by_site(
    layers: Mapping[str, Array], ends: Mapping[str, Array], suffix: str
) -> dict[str, Array]:
    """Returns the arrays `<site>_<suffix>` of all linear sites."""
    return {
        site: np.asarray((ends if site in _END_SITES else layers)[f"{site}_{suffix}"])
        for site in LINEAR_SITES
    }


def check_policy(
    config: HardwareConfig, layers: Mapping[str, Array], ends: Mapping[str, Array]
) -> None:
    """Checks that configuration and arrays agree.

    Raises:
      ExportError: If the policy differs from what the arrays hold, weights are wider than their
        bits, or the accelerator runs another mechanism than the model.
    """
    policy = config.policy
    held = IntegerPolicy.from_arrays(layers, ends, policy.weight_bits)
    for field in IntegerPolicy.model_fields:
        if getattr(held, field) != getattr(policy, field):
            raise ExportError(f"`policy.{field}` disagrees with the arrays of the deployment")
    for site, weight in _by_site(layers, ends, "weight").items():
        blocks = weight[None] if site in _END_SITES else weight
        bits = policy.weight_bits.get(site, [])
        if len(bits) != len(blocks) or not all(2 <= width <= 8 for width in bits):
            raise ExportError(
                f"`policy.weight_bits.{site}` must hold {len(blocks)} widths of 2 to 8 bits, "
                f"got {bits}"
            )
        for width, block in zip(bits, blocks, strict=True):
            if np.abs(block).max() > limit(width):
                raise ExportError(f"the codes of `{site}_weight` do not fit their {width} bits")
    if policy.weight_bits.keys() != set(LINEAR_SITES):
        raise ExportError(f"`policy.weight_bits` must name {', '.join(LINEAR_SITES)} only")
    mechanism = config.structure.mechanism
    if mechanism not in ("dense", config.accelerator.mechanism):
        raise ExportError(
            f"`accelerator` runs mechanism `{config.accelerator.mechanism}`, "
            f"the model needs `{mechanism}`"
        )


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of `config.json`."""
    return HardwareConfig.model_json_schema()
