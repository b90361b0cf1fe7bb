"""Configuration of the models."""

import dataclasses

from codesign.structure import ModelStructure


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A vision transformer and how its raw pixels are scaled."""

    # Sizes; its mechanism is that of the deployment, `dense` while the model itself trains.
    structure: ModelStructure
    # A pixel p enters as (p - offset) * scale; both in units of the raw pixel values.
    pixel_offset: int
    pixel_scale: float
    # Added to the variance in every normalisation, square of the residual's unit, > 0.
    norm_epsilon: float = 1e-6
