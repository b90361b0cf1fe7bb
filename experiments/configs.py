"""Named experiments and their settings."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from codesign.errors import CodesignError, UnknownNameError
from codesign.experiments.data import DataSettings, Task, TextInput
from codesign.optimize import Group, OptimizeSettings
from codesign.policy import BITS_RANGE

Metric = Literal["energy", "latency"]
"""What every example costs."""
BudgetMetric = Literal["energy", "latency", "edp"]
"""What a budget bounds: means over examples, and their product, the energy-delay product."""
Scope = Literal["end_to_end", "attention"]
Mode = Literal["joint", "policy", "codesign"]

MODES: dict[Mode, tuple[Group, ...]] = {
    "joint": ("params", "thresholds", "bits", "clips"),
    "policy": ("thresholds", "bits", "clips"),
    "codesign": ("params", "thresholds", "bits", "clips", "sizes"),
}
"""Optimiser groups that each mode trains."""


def require(is_legal: bool, name: str, legal: str, value: Any) -> None:
    """Raises `CodesignError` unless a setting is legal.

    Args:
      is_legal: Whether it is.
      name: Its dotted name, as on the command line.
      legal: What it must be.
      value: What it is.
    """
    if not is_legal:
        raise CodesignError(f"`{name}` must {legal}, got {value}: change it")


def require_at_least(settings: Any, prefix: str, least: float, *names: str) -> None:
    """Raises `CodesignError` naming the first of the fields that is below `least` or not finite."""
    for name in names:
        value = getattr(settings, name)
        is_legal = math.isfinite(value) and value >= least
        require(is_legal, f"{prefix}.{name}", f"be at least {least:g}", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Sizes of a transformer that is trained from scratch; all are counts of elements."""

    # Transformer blocks, >= 1.
    num_layers: int = 3
    # Attention heads, >= 1, and the width of one.
    num_heads: int = 2
    head_dim: int = 32
    # Width of the residual stream, and of the feed-forward network's inside.
    width: int = 64
    hidden: int = 128
    # Images: patches of patch_size pixels every stride pixels, the image padded by that many zeros on each side.
    patch_size: int = 3
    stride: int = 1
    padding: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
          CodesignError: If a size is below its least value; names it.
        """
        names = [field.name for field in dataclasses.fields(self) if field.name != "padding"]
        require_at_least(self, "experiment.model", 1, *names)
        require_at_least(self, "experiment.model", 0, "padding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSettings:
    """Training of the dense model in floating point, before any mechanism."""

    # Optimiser steps, >= 0; 0 takes a checkpoint that was fine-tuned for the task as it is.
    num_steps: int = 500
    # Examples per step, >= 1.
    batch_size: int = 32
    # Peak learning rate of AdamW (warm-up over a tenth, then cosine), > 0.
    rate: float = 2e-3
    # Decoupled weight decay, >= 0.
    weight_decay: float = 0.05
    # Probability mass moved from the label to all classes, [0, 1).
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
          CodesignError: If a field is outside its range; names it.
        """
        prefix = "experiment.dense"
        require_at_least(self, prefix, 1, "batch_size")
        require_at_least(self, prefix, 0, "num_steps", "weight_decay")
        is_legal = math.isfinite(self.rate) and self.rate > 0.0
        require(is_legal, f"{prefix}.rate", "be > 0", self.rate)
        smoothing = self.label_smoothing
        require(0.0 <= smoothing < 1.0, f"{prefix}.label_smoothing", "lie in [0, 1)", smoothing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds on the cost, each as a fraction of the dense cost on the same machine; None: no bound."""

    # Energy per example over that of dense, > 0.
    energy: float | None = None
    # Latency per example over that of dense, > 0.
    latency: float | None = None
    # Mean energy times mean latency over that of dense, > 0.
    edp: float | None = None
    # Whether the linear layers count (end_to_end) or attention alone.
    scope: Scope = "end_to_end"

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
          CodesignError: If a bound is not positive and finite.
        """
        for name, value in self._bounds.items():
            if value is not None and not 0.0 < value < math.inf:
                raise CodesignError(
                    f"`budget.{name}` must be > 0 and finite (a fraction of dense), got {value}: give e.g. 0.5"
                )

    @property
    def _bounds(self) -> dict[BudgetMetric, float | None]:
        return {"energy": self.energy, "latency": self.latency, "edp": self.edp}

    @property
    def limits(self) -> dict[BudgetMetric, float]:
        """The bounds that are set."""
        return {name: value for name, value in self._bounds.items() if value is not None}


def with_edp(means: Mapping[Metric, Any]) -> dict[BudgetMetric, Any]:
    """Returns mean costs (pJ and cycles, or both over those of dense) with their product."""
    energy, latency = means["energy"], means["latency"]
    return {"energy": energy, "latency": latency, "edp": energy * latency}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a training run or a curve depends on, but the budgets."""

    # Name of a task in `codesign.experiments.tasks.TASKS`.
    task: str = "digits"
    # Where the data comes from and how it is cut; its options have no prefix: `--data`, `--text-column`.
    data: Annotated[DataSettings, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=DataSettings
    )
    # Pretrained model: a folder, `minilm` (the [text] extra), or a name on the Hugging Face hub; None: `model`'s sizes.
    checkpoint: str | None = None
    # Accelerator: a shipped preset's name, or the path of a TOML file.
    preset: str = "energon"
    # Mechanism attached to the model.
    mechanism: str = "energon"
    # Seed of initialisation and of the order of the examples, >= 0.
    seed: int = 0
    # Sizes of a transformer trained from scratch; with a checkpoint nothing here is read.
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    # Training of the dense model.
    dense: DenseSettings = dataclasses.field(default_factory=DenseSettings)
    # Training under a budget.
    optimize: OptimizeSettings = dataclasses.field(default_factory=OptimizeSettings)
    # Lengths, rising, to which token sequences are padded, one compilation each; none: the longest alone.
    buckets: tuple[int, ...] = ()
    # Examples per step of the training under a budget, >= 1.
    batch_size: int = 32
    # Training examples that measure ranges, start thresholds and the budget's rounding, >= 1.
    num_calibration: int = 128
    # Weight of the divergence from the dense model's outputs in the task loss, [0, 1]; the rest is cross-entropy.
    distillation: float = 1.0
    # Images are moved by up to this many pixels each way in training, >= 0.
    reach: int = 1
    # Kept fraction of each of the mechanism's thresholds at the start, (0, 1]; none: the mechanism's own.
    start_kept: tuple[float, ...] = ()
    # Widths at the start, bit: weights and activations of linear layers in [2, 8], attention in [8, 16]; off the integers.
    start_linear_bits: float = 7.5
    # The same of exact attention: Q, K, probabilities and V.
    start_attention_bits: float = 15.5

    def plain(self) -> dict[str, Any]:
        """Returns the settings as JSON types."""
        return dataclasses.asdict(self) | {"data": self.data.plain()}

    def buckets_of(self, task: Task) -> tuple[int, ...]:
        """Returns the lengths to which a task's sequences are padded, the longest of them last; none for images."""
        if not isinstance(task.input, TextInput):
            return ()
        longest = task.input.max_tokens
        return (*(bucket for bucket in self.buckets if bucket < longest), longest)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
          CodesignError: If a field is outside its range; names it.
        """
        prefix = "experiment"
        require_at_least(self, prefix, 1, "batch_size", "num_calibration")
        require_at_least(self, prefix, 0, "seed", "reach")
        share = self.distillation
        require(0.0 <= share <= 1.0, f"{prefix}.distillation", "lie in [0, 1]", share)
        kept = self.start_kept
        is_legal = all(0.0 < value <= 1.0 for value in kept)
        require(is_legal, f"{prefix}.start_kept", "lie in (0, 1]", kept)
        is_rising = all(0 < low < high for low, high in itertools.pairwise(self.buckets))
        require(is_rising, f"{prefix}.buckets", "be positive and rise", self.buckets)
        for kind in ("linear", "attention"):
            value, (low, high) = getattr(self, f"start_{kind}_bits"), BITS_RANGE[kind]
            legal = f"lie in [{low:g}, {high:g}] bit"
            require(low <= value <= high, f"{prefix}.start_{kind}_bits", legal, value)


def digits() -> Experiment:
    """Digits on the Energon machine: a ViT of 3 layers on 64 tokens (one per pixel, 3 x 3 windows).

    `codesign quickstart` draws its curve in under six minutes on two CPU cores.
    """
    return Experiment(
        optimize=OptimizeSettings(
            num_steps=100,
            hardened_fraction=0.5,
            weight_rate=1.5e-3,
            weight_epsilon=1e-2,
            bits_rate=0.05,
            price_warmup_fraction=0.02,
            clip_rate=0.005,
            threshold_rate=0.01,
        ),
    )


def mnist() -> Experiment:
    """MNIST, 7,500 images: a ViT of 4 layers on 49 patches of 4 x 4 pixels, trained from scratch."""
    return dataclasses.replace(
        digits(),
        task="mnist",
        model=ModelSettings(
            num_layers=4,
            num_heads=4,
            head_dim=16,
            width=64,
            hidden=128,
            patch_size=4,
            stride=4,
            padding=0,
        ),
        dense=DenseSettings(num_steps=1200, batch_size=64, rate=2e-3),
        optimize=dataclasses.replace(digits().optimize, num_steps=300),
    )


def tinyshakespeare() -> Experiment:
    """Characters of Shakespeare's plays: a decoder of 4 layers on windows of 256, trained from scratch."""
    return dataclasses.replace(
        digits(),
        task="tinyshakespeare",
        model=ModelSettings(num_layers=4, num_heads=4, head_dim=32, width=128, hidden=512),
        dense=DenseSettings(num_steps=1500, batch_size=16, rate=2e-3, label_smoothing=0.0),
        optimize=dataclasses.replace(digits().optimize, num_steps=200),
        batch_size=8,
        num_calibration=8,
        reach=0,
    )


def sst2() -> Experiment:
    """SST-2, movie sentences of up to 64 word pieces: MiniLM (6 layers, width 384), fine-tuned."""
    return dataclasses.replace(
        _minilm(),
        task="sst2",
        data=DataSettings(max_tokens=64),
        buckets=(32, 64),
        batch_size=16,
        dense=dataclasses.replace(_minilm().dense, num_steps=430, batch_size=32),
    )


def spamassassin() -> Experiment:
    """E-mails, spam or not, up to 256 word pieces: MiniLM (6 layers, width 384), fine-tuned."""
    return dataclasses.replace(
        _minilm(), task="spamassassin", data=DataSettings(max_tokens=256), buckets=(128, 256)
    )


def spamassassin512() -> Experiment:
    """E-mails, spam or not, up to 512 word pieces: MiniLM (6 layers, width 384), fine-tuned."""
    return dataclasses.replace(
        spamassassin(), data=DataSettings(max_tokens=512), buckets=(128, 256, 512), batch_size=4
    )


def user_text() -> Experiment:
    """Your own labelled text, given with `--data FILE`, up to 128 word pieces: MiniLM (6 layers, width 384), fine-tuned."""
    return dataclasses.replace(
        _minilm(), task="user_text", data=DataSettings(max_tokens=128), buckets=(32, 64, 128)
    )


def _minilm() -> Experiment:
    return Experiment(
        checkpoint="minilm",
        dense=DenseSettings(num_steps=250, batch_size=8, rate=1e-4, label_smoothing=0.0),
        optimize=OptimizeSettings(
            num_steps=120,
            hardened_fraction=0.5,
            weight_rate=1e-4,
            weight_epsilon=1e-4,
            bits_rate=0.05,
            price_warmup_fraction=0.02,
            clip_rate=0.005,
            threshold_rate=0.03,
        ),
        batch_size=8,
        num_calibration=32,
        reach=0,
    )


EXPERIMENTS = {
    function.__name__: function
    for function in (
        digits,
        mnist,
        tinyshakespeare,
        sst2,
        spamassassin,
        spamassassin512,
        user_text,
    )
}


def experiment_by_name(name: str) -> Experiment:
    """Returns a named experiment.

    Raises:
      UnknownNameError: If there is none of that name.
    """
    if name not in EXPERIMENTS:
        raise UnknownNameError(
            f"experiment `{name}` does not exist: choose one of {', '.join(sorted(EXPERIMENTS))}"
        )
    return EXPERIMENTS[name]()
