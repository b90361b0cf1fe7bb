"""How much the benchmarks measure, and the text models whose training step they time."""

import dataclasses

from codesign.experiments.configs import Experiment, digits
from codesign.structure import ModelStructure, TokenInput

MINILM = ModelStructure(
    num_layers=6,
    num_heads=12,
    head_dim=32,
    width=384,
    hidden=1536,
    input=TokenInput(vocabulary_size=30522, max_tokens=512),
    norm="post",
    pooling="first",
    pooler="tanh",
    num_outputs=2,
)
"""all-MiniLM-L6-v2 with its pooler and a head of two classes (sizes of its `config.json`)."""
SMALL = ModelStructure(
    num_layers=2,
    num_heads=4,
    head_dim=32,
    width=128,
    hidden=512,
    input=TokenInput(vocabulary_size=1000, max_tokens=128),
    num_outputs=2,
)
"""A transformer that is trained beside other tools' (ours)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextShape:
    """A text model and the rows of a training step of it, all of full length; counts."""

    structure: ModelStructure
    batch_size: int
    num_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSizes:
    """How much is measured; all are counts."""

    # Whose model, machine and optimiser are timed.
    experiment: Experiment = dataclasses.field(default_factory=digits)
    # Timed calls of each function.
    repeats: int = 5
    # Design points in a call: `num_chunks` times `chunk`, evaluated one chunk after another in one compiled call.
    num_chunks: int = 32
    chunk: int = 4096
    # Different workloads (kept fractions and bits) among them.
    num_settings: int = 256
    # Design points of the baseline, one call each.
    num_single: int = 256
    # Training steps in a timed call.
    num_steps: int = 2
    # Images in a timed call of the hard path, the emulator and the simulator.
    num_images: int = 128
    # Depths whose compilation is compared, and how often each is compiled.
    layers: tuple[int, int] = (6, 12)
    compilations: int = 1
    # MiniLM on short and on long rows, and the model that is trained beside other tools'.
    short: TextShape = TextShape(structure=MINILM, batch_size=8, num_tokens=128)
    long: TextShape = TextShape(structure=MINILM, batch_size=2, num_tokens=512)
    small: TextShape = TextShape(structure=SMALL, batch_size=8, num_tokens=128)
    # Trials of the black-box search in a timed call, and gradient steps.
    num_trials: int = 100
    num_gradients: int = 1000


FULL = BenchSizes()
QUICK = BenchSizes(
    repeats=3, num_chunks=8, num_settings=64, num_single=64, num_images=32, num_trials=30
)
