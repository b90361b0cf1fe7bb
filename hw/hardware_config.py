"""Schema of `config.json`, the readable part of an exported hardware configuration.

The format is described in `docs/export.md`. Imports no JAX.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from codesign.errors import ExportError
from codesign.hw.spec import AcceleratorSpec
from codesign.references import reference_by_name
from codesign.structure import ModelStructure

Array = npt.NDArray[Any]

SCHEMA_VERSION = 2

NestedIntegers: TypeAlias = list[int] | list[list[int]] | list[list[list[int]]]
PositiveFloat = Annotated[float, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    """A frozen model that refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class IntegerPolicy(_Strict):
    """The trained knobs as the hardware holds them; lists go by layer."""

    mechanism: dict[str, NestedIntegers]
    """The mechanism's own arrays by name, nested as they are; empty for `dense`."""
    qk_bits: list[int]
    """Bits of query, key and probabilities in exact attention, `[L]`."""
    v_bits: list[int]
    """Bits of the values, `[L]`."""
    weight_bits: dict[str, list[int]]
    """Bits of the weights by linear site, `[L]`; one entry for a site outside the blocks."""
    activation_bits: dict[str, list[int]]
    """Bits of the activations that enter a linear site; as `weight_bits`."""

    @classmethod
    def from_arrays(
        cls, structure: ModelStructure, layers: Mapping[str, Array], ends: Mapping[str, Array]
    ) -> Self:
        """Returns the policy that a deployment's arrays hold."""
        own = reference_by_name(structure.mechanism).layer_shapes(structure)
        return cls(
            mechanism={name: layers[name].tolist() for name in own},
            qk_bits=layers["qk_bits"].tolist(),
            v_bits=layers["v_bits"].tolist(),
            weight_bits=_bits_by_site(structure, layers, ends, "_weight_bits"),
            activation_bits=_bits_by_site(structure, layers, ends, "_activation_bits"),
        )


class Scales(_Strict):
    """Real values of the integers; the integer path itself needs none of them."""

    activation_scales: dict[str, PositiveFloat | list[PositiveFloat]]
    """Real value of one code of a tensor, by layer where there are several."""
    residual_scale: PositiveFloat
    """Real value of one code of the residual stream."""
    logit_scale: PositiveFloat
    """Real logit per integer logit; times the number of tokens with mean pooling."""


class ExpectedCost(_Strict):
    """Mean cost per example by the differentiable model of the accelerator."""

    energy_pj: PositiveFloat
    latency_cycles: PositiveFloat


class Expected(_Strict):
    """What the deployed model reached before it was exported."""

    part: Literal["train", "validation", "test"]
    """Part of the data on which it was measured."""
    num_examples: Annotated[int, Field(gt=0)]
    quality_name: Literal["accuracy", "bits_per_token"]
    """Fraction of examples classified correctly, or a decoder's cross-entropy per token."""
    quality: Annotated[float, Field(ge=0)]
    kl_nats: float
    """Mean divergence from the dense model's outputs, in nats."""
    attention: ExpectedCost
    """Cost of attention only."""
    end_to_end: ExpectedCost
    """Cost of the whole model, linear layers included."""
    area_mm2: PositiveFloat

    @model_validator(mode="after")
    def _check_quality(self) -> Self:
        """Checks that an accuracy is a fraction."""
        if self.quality_name == "accuracy" and self.quality > 1:
            raise ValueError(f"`quality` is an accuracy: it must lie in [0, 1], got {self.quality}")
        return self


class HardwareConfig(_Strict):
    """Everything about an exported model but its arrays."""

    schema_version: Literal[2] = 2
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
    structure: ModelStructure,
    layers: Mapping[str, Array],
    ends: Mapping[str, Array],
    suffix: str,
) -> dict[str, list[int]]:
    """Returns the widths `<site><suffix>` of all linear sites."""
    groups = ((layers, structure.layer_shapes()), (ends, structure.end_shapes()))
    return {
        name.removesuffix(suffix): np.atleast_1d(arrays[name]).tolist()
        for arrays, shapes in groups
        for name in shapes
        if name.endswith(suffix)
    }


def check_policy(
    config: HardwareConfig, layers: Mapping[str, Array], ends: Mapping[str, Array]
) -> None:
    """Checks that configuration and arrays agree.

    Raises:
      ExportError: If the policy differs from what the arrays hold, or the accelerator runs another
        mechanism than the model.
    """
    held = IntegerPolicy.from_arrays(config.structure, layers, ends)
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
