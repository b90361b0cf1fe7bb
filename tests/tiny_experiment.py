"""An experiment on digits that trains in seconds."""

from codesign.experiments.configs import DenseSettings, Experiment, ModelSettings
from codesign.optimize import OptimizeSettings

NUM_STEPS = 6


def tiny() -> Experiment:
    """Two layers of two heads on 16 tokens."""
    return Experiment(
        model=ModelSettings(
            num_layers=2,
            num_heads=2,
            head_dim=8,
            width=16,
            hidden=48,
            patch_size=4,
            stride=2,
        ),
        dense=DenseSettings(num_steps=20),
        optimize=OptimizeSettings(num_steps=NUM_STEPS, bits_rate=0.3),
    )
