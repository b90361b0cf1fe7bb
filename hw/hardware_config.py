"""Schema of `config.json`, the readable part of an exported hardware configuration.

The format is described in `docs/export.md`. Imports no JAX.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from codesign.errors import ExportError
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
    def from_arrays(cls, layers: Mapping[str, Array], ends: Mapping[str, Array]) -> Self:
        """Returns the policy that a deployment's arrays hold."""
        return cls(
            thresholds=layers["threshold"].tolist() if "threshold" in layers else [],
            query_bits=layers["query_bits"].tolist() if "query_bits" in layers else [],
            key_bits=layers["key_bits"].tolist() if "key_bits" in layers else [],
            qk_bits=layers["qk_bits"].tolist(),
            v_bits=layers["v_bits"].tolist(),
            weight_bits=_bits_by_site(layers, ends, "weight_bits"),
            activation_bits=_bits_by_site(layers, ends, "activation_bits"),
        )


class Scales(_Strict):
    """Real values of the integers; the integer path itself needs none of them."""

    activation_scales: dict[str, PositiveFloat | list[PositiveFloat]]
    """Real value of one code of a tensor, by layer where there are several."""
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


def _bits_by_site(
    layers: Mapping[str, Array], ends: Mapping[str, Array], suffix: str
) -> dict[str, list[int]]:
    """Returns the widths `<site>_<suffix>` of all linear sites."""
    return {
        site: np.atleast_1d((ends if site in _END_SITES else layers)[f"{site}_{suffix}"]).tolist()
        for site in LINEAR_SITES
    }


def check_policy(
    config: HardwareConfig, layers: Mapping[str, Array], ends: Mapping[str, Array]
) -> None:
    """Checks that configuration and arrays agree.

    Raises:
      ExportError: If the policy differs from what the arrays hold, or the accelerator runs another
        mechanism than the model.
    """
    held = IntegerPolicy.from_arrays(layers, ends)
    for field in IntegerPolicy.model_fields:
        if getattr(held, field) != getattr(config.policy, field):
            raise ExportError(f"`policy.{field}` disagrees with the arrays of the deployment")
    mechanism = config.structure.mechanism
    if mechanism not in ("dense", config.accelerator.mechanism):
        raise ExportError(
            f"`accelerator` runs mechanism `{config.accelerator.mechanism}`, "
            f"the model needs `{mechanism}`"
        )


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of `config.json`."""
    return HardwareConfig.model_json_schema()
