"""Which model fits a task: one built from sizes, or a pretrained checkpoint."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from codesign.errors import CodesignError
from codesign.experiments.checkpoints import check_images, check_text, load_checkpoint
from codesign.experiments.configs import Experiment, ModelSettings
from codesign.experiments.data import ImageInput, Task
from codesign.experiments.text import check_same_tokens
from codesign.hw.closed_form import ModelShape
from codesign.models.config import ModelConfig
from codesign.models.parameters import init_params
from codesign.structure import ModelStructure, PatchInput, TokenInput

MAX_LISTED = 5
"""Class names in a note."""


@dataclasses.dataclass(frozen=True)
class ChosenModel:
    """A model's sizes, a function from a random key to its parameters before training, and notes for people."""

    config: ModelConfig
    params: Callable[[jax.Array], dict[str, Any]]
    notes: tuple[str, ...] = ()


def choose_model(task: Task, experiment: Experiment) -> ChosenModel:
    """Returns the model of an experiment.

    Raises:
      CodesignError: If a size is wrong, or the checkpoint does not fit the task.
    """
    if experiment.checkpoint is not None:
        checkpoint = load_checkpoint(
            experiment.checkpoint, num_outputs=task.num_outputs, key=jax.random.key(experiment.seed)
        )
        check_fit(task, checkpoint.config, experiment.checkpoint)
        notes = checkpoint.notes
        given, own = experiment.data.tokenizer, checkpoint.tokenizer_path
        if given is not None and own is not None and task.kind != "language":
            check_same_tokens(given, own)
        if task.classes and not checkpoint.has_own_head:
            notes += (f"the task's classes are {_listed(task.classes)}",)
        fault = None if checkpoint.has_own_head else "has no head for the task"
        if checkpoint.labels and task.classes and checkpoint.labels != task.classes:
            outputs = f"{_listed(checkpoint.labels)}, the task's classes {_listed(task.classes)}"
            fault = f"has the outputs {outputs}, in this order"
            notes += (f"its outputs are {outputs}, in this order",)
        if experiment.dense.num_steps == 0 and fault:
            raise CodesignError(
                f"checkpoint '{experiment.checkpoint}' {fault}: `experiment.dense.num_steps` must be at least 1"
            )
        return ChosenModel(checkpoint.config, lambda key: checkpoint.params, notes)
    if experiment.dense.num_steps == 0:
        raise CodesignError(
            "a model without a checkpoint has to be trained: `experiment.dense.num_steps` must be at least 1"
        )
    try:
        config = sized_config(task, experiment.model)
    except ValueError as error:
        raise CodesignError(f"`experiment.model`: {error}: correct that size") from error
    return ChosenModel(config, lambda key: init_params(config.structure, key=key))


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")


def sized_config(task: Task, model: ModelSettings) -> ModelConfig:
    """Returns a pre-norm transformer of given sizes: a decoder for a language, else with mean pooling."""
    pixel_offset, pixel_scale = 0, 1.0
    if isinstance(task.input, ImageInput):
        entry: PatchInput | TokenInput = PatchInput(
            image_size=task.input.image_size,
            channels=task.input.channels,
            patch_size=model.patch_size,
            stride=model.stride,
            padding=model.padding,
        )
        pixel_offset, pixel_scale = task.input.pixel_offset, task.input.pixel_scale
    else:
        entry = TokenInput(
            vocabulary_size=task.input.vocabulary_size, max_tokens=task.input.max_tokens
        )
    is_decoder = task.kind == "language"
    structure = ModelStructure(
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        width=model.width,
        hidden=model.hidden,
        input=entry,
        is_causal=is_decoder,
        pooling="all" if is_decoder else "mean",
        num_outputs=task.num_outputs,
    )
    return ModelConfig(structure=structure, pixel_offset=pixel_offset, pixel_scale=pixel_scale)


def check_fit(task: Task, config: ModelConfig, source: str) -> None:
    """Raises `CodesignError` unless a checkpoint takes what the task gives and returns what it wants."""
    if isinstance(task.input, ImageInput):
        check_images(config, image_size=task.input.image_size, channels=task.input.channels)
        return
    check_text(
        config,
        vocabulary_size=task.input.vocabulary_size,
        max_tokens=task.input.max_tokens,
        tokenizer=task.input.tokenizer,
    )
    is_language = task.kind == "language"
    if is_language != (config.structure.pooling == "all"):
        raise CodesignError(
            f"checkpoint '{source}' {'has no output per token' if is_language else 'is a decoder'}, "
            f"task `{task.name}` is of kind {task.kind}: choose another checkpoint"
        )
    entry = config.structure.input
    assert isinstance(entry, TokenInput)
    if is_language and task.input.vocabulary_size != entry.vocabulary_size:
        raise CodesignError(
            f"checkpoint '{source}' was trained on {entry.vocabulary_size} tokens, task `{task.name}` numbers "
            f"{task.input.vocabulary_size} {task.input.tokenizer} in its own way: choose a checkpoint of the same, or none"
        )


def model_shape(structure: ModelStructure, num_tokens: int) -> ModelShape:
    """Returns the sizes of a model at a number of tokens, embedding and head included, for workloads in closed form."""
    entry, width = structure.input, structure.width
    rows = num_tokens if structure.pooling == "all" else 1
    embed = None
    if isinstance(entry, PatchInput):
        embed = (entry.num_patches, entry.patch_values, width)
    return ModelShape(
        num_layers=structure.num_layers,
        num_tokens=num_tokens,
        num_heads=structure.num_heads,
        head_dim=structure.head_dim,
        width=width,
        hidden=structure.hidden,
        is_causal=structure.is_causal,
        embed=embed,
        head=(rows, width, structure.num_outputs),
    )
