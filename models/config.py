"""Configuration of the models."""

import dataclasses

from codesign.structure import ModelStructure


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer, and how raw pixels are scaled if it takes images."""

    # Sizes; its mechanism is that of the deployment, `dense` while the model itself trains.
    structure: ModelStructure
    # A pixel p enters as (p - offset) * scale; both in units of the raw pixel values.
    pixel_offset: int = 0
    pixel_scale: float = 1.0
    # Added to the variance in every normalisation, square of the residual's unit, > 0.
    norm_epsilon: float = 1e-6
