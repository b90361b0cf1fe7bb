"""Hugging Face checkpoints of BERT, DistilBERT, MiniLM, GPT-2, ViT and DeiT as our configuration and parameters.

Only safetensors files are read, after their headers were checked; no pickle is ever loaded.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from codesign.errors import CheckpointError, CodesignError
from codesign.experiments.checkpoint_layouts import (
    FAMILIES,
    PIXEL_OFFSET,
    PIXEL_SCALE,
    Family,
    Normalisation,
    Source,
    body_prefix,
    pooler_module,
    recipe,
)
from codesign.experiments.checkpoint_sources import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    TOKENIZER_FILE,
    checkpoint_folder,
    read_json,
)
from codesign.experiments.tensors import read_tensors, tensor_shapes
from codesign.models.config import ModelConfig
from codesign.structure import Activation, ModelStructure, PatchInput, Pooler, Pooling, TokenInput

HEAD_STDDEV = 0.02
"""Standard deviation of a fresh head's weights (`initializer_range` of all five families)."""
RESCALE = 1.0 / 255.0
"""What image processors multiply 8-bit pixels by unless their file says otherwise."""
DEFAULT_LABELS = 2
"""Outputs of a classifier whose config.json names no labels (`PretrainedConfig` of transformers)."""
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A pretrained model."""

    # Mechanism `dense`; pixels are 8-bit.
    config: ModelConfig
    # As `codesign.models.parameters.init_params` returns them, float32.
    params: dict[str, Any]
    # The checkpoint's tokenizer.json; None if it has none.
    tokenizer_path: Path | None
    # Names of the outputs; None where the checkpoint names none, or its head is not used.
    labels: tuple[str, ...] | None
    # Whether the head is the checkpoint's own, not a fresh one.
    has_own_head: bool
    # One line each: what of the checkpoint is not used, and what was not in it.
    notes: tuple[str, ...]


def load_checkpoint(
    source: str | Path,
    *,
    num_outputs: int | None = None,
    pooling: Pooling | None = None,
    key: jax.Array | None = None,
) -> Checkpoint:
    """Returns a pretrained model with its own head, or with a fresh one where its own does not fit.

    Args:
      source: A folder with config.json and model.safetensors, `minilm`, or a name on the Hugging Face hub.
      num_outputs: Outputs wanted; None: those of the checkpoint's head.
      pooling: What the head reads; None: what the checkpoint's head reads, without a head the mean of a text
        and the class token of an image.
      key: Random key of a fresh head; needed for nothing else.

    Returns:
      The model.

    Raises:
      CheckpointError: If the checkpoint is damaged, incomplete, or of a model that is not supported.
    """
    folder = checkpoint_folder(source)
    settings = _Settings(path=folder / CONFIG_FILE, values=read_json(folder / CONFIG_FILE))
    family = _family(settings)
    found = tensor_shapes(folder)
    head, notes = _head(family, settings, set(found), num_outputs, pooling)
    structure = _structure(family, settings, set(found), head, num_outputs, pooling)
    if structure.num_layers > len(found):
        raise CheckpointError(
            f"{settings.path} has `{family.num_layers}` {structure.num_layers}, more than "
            f"{folder} has tensors ({len(found)}): these files do not belong together"
        )
    normalisation = None
    if isinstance(structure.input, PatchInput):
        normalisation, note = _normalisation(folder, family, structure.input.channels)
        notes += note
    sources = recipe(
        family,
        structure,
        found,
        head=head.module if head else None,
        num_types=settings.size("type_vocab_size") if family.types else 0,
        has_qkv_bias=settings.values.get("qkv_bias", True) is not False,
        normalisation=normalisation,
    )
    leaves = jax.tree.leaves(sources)
    wanted = {name: shape for leaf in leaves for name, shape in leaf.shapes.items()}
    unused, unknown = _rest(family, set(found) - set(wanted), body_prefix(family, found))
    if unknown:
        raise CheckpointError(
            f"{folder} has tensors that a {settings.values['model_type']} of its {CONFIG_FILE} has not: "
            f"{', '.join(unknown[:4])}{f' and {len(unknown) - 4} more' if len(unknown) > 4 else ''}"
        )
    if unused:
        notes += (f"not used: {', '.join(unused)}",)
    tensors = read_tensors(folder, wanted)

    def make(one: Source) -> jax.Array:
        return jnp.asarray(one.make(tensors))

    params = jax.tree.map(make, sources)
    if head is None:
        if key is None:
            raise CheckpointError(f"the head of {folder} does not fit: a fresh one needs `key`")
        shape = (structure.width, structure.num_outputs)
        params["head"] = {
            "kernel": HEAD_STDDEV * jax.random.normal(key, shape, jnp.float32),
            "bias": jnp.zeros(structure.num_outputs, jnp.float32),
        }
        notes += (f"fresh head of {structure.num_outputs} outputs, {structure.pooling} pooling",)
    tokenizer = folder / TOKENIZER_FILE
    images = isinstance(structure.input, PatchInput)
    return Checkpoint(
        config=ModelConfig(
            structure=structure,
            pixel_offset=PIXEL_OFFSET if images else 0,
            pixel_scale=PIXEL_SCALE if images else 1.0,
            norm_epsilon=settings.norm_epsilon(family),
        ),
        params=params,
        tokenizer_path=tokenizer if tokenizer.is_file() and not images else None,
        labels=head.labels if head else None,
        has_own_head=head is not None,
        notes=notes,
    )


def check_text(
    config: ModelConfig, *, vocabulary_size: int, max_tokens: int, tokenizer: str
) -> None:
    """Checks that a model can read a task's texts.

    Args:
      config: The model.
      vocabulary_size: Numbers that the tokenizer gives out.
      max_tokens: Tokens of the longest text.
      tokenizer: What to call the tokenizer in a message.

    Raises:
      CheckpointError: If the tokenizer is another model's, texts are too long, or the model takes images.
    """
    model = config.structure.input
    if not isinstance(model, TokenInput):
        raise CheckpointError("the checkpoint is of a model of images: choose one of text")
    if vocabulary_size > model.vocabulary_size:
        raise CheckpointError(
            f"tokenizer {tokenizer} gives out {vocabulary_size} tokens, the model knows "
            f"{model.vocabulary_size}: it is another model's, use the checkpoint's own tokenizer.json"
        )
    if max_tokens > model.max_tokens:
        raise CheckpointError(
            f"texts of {max_tokens} tokens are longer than the model's {model.max_tokens} positions: "
            "lower `--max-tokens`"
        )


def check_images(config: ModelConfig, *, image_size: int, channels: int) -> None:
    """Checks that a model can read a task's images: squares of `image_size` pixels a side.

    Raises:
      CheckpointError: If it takes images of other sizes, or text.
    """
    model = config.structure.input
    if not isinstance(model, PatchInput):
        raise CheckpointError("the checkpoint is of a model of text: choose one of images")
    if (image_size, channels) != (model.image_size, model.channels):
        raise CheckpointError(
            f"images of {image_size} pixels and {channels} channels do not fit the model, which takes "
            f"{model.image_size} pixels and {model.channels} channels: choose another checkpoint or task"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Head:
    """A head of the checkpoint that is used: its module and outputs."""

    module: str
    num_outputs: int
    labels: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a config.json says."""

    path: Path
    values: dict[str, Any]

    def get(self, key: str) -> Any:
        """Returns the value of a key that must be there."""
        if key not in self.values:
            raise CheckpointError(f"{self.path} has no `{key}`: copy the whole checkpoint")
        return self.values[key]

    def size(self, key: str) -> int:
        """Returns a positive whole number."""
        return self._checked(key, self.get(key))

    def side(self, key: str) -> int:
        """Returns the side of a square, a number or a pair of equal ones."""
        value = self.get(key)
        is_square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
        return self._checked(key, value[0] if is_square else value)

    def _checked(self, key: str, value: Any) -> int:
        """Returns `value` if it is a positive whole number."""
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.path}: `{key}` must be a positive whole number, got {value!r}"
            )
        return value

    def norm_epsilon(self, family: Family) -> float:
        """Returns what is added to the variances."""
        if isinstance(family.norm_epsilon, float):
            return family.norm_epsilon
        value = self.get(family.norm_epsilon)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise CheckpointError(
                f"{self.path}: `{family.norm_epsilon}` must be positive, got {value!r}"
            )
        return float(value)


def _family(settings: _Settings) -> Family:
    """Returns the family that a config.json names, after checking the options we have one value of."""
    name = settings.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"{settings.path}: `model_type` {name!r} is not supported: choose a checkpoint of "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    for option, value in family.options.items():
        if settings.values.get(option, value) != value:
            raise CheckpointError(
                f"{settings.path}: `{option}` {settings.values[option]!r} is not supported, only {value!r}"
            )
    return family


def _head(
    family: Family,
    settings: _Settings,
    names: set[str],
    num_outputs: int | None,
    pooling: Pooling | None,
) -> tuple[_Head | None, tuple[str, ...]]:
    """Returns the checkpoint's head if it fits what is wanted, and a note where it does not."""
    if (
        family.head_pooling == "all"
    ):  # a language model: without a head of its own, the table is the head
        own = next(iter(family.heads.values()))
        is_tied = f"{own}.weight" not in names and settings.values.get("tie_word_embeddings", True)
        module = body_prefix(family, names) + family.embed if is_tied else own
        head = _Head(module=module, num_outputs=settings.size("vocab_size"), labels=None)
    else:
        architectures = settings.values.get("architectures")
        if isinstance(architectures, list) and architectures:
            modules = [module for name, module in family.heads.items() if name in architectures]
        else:
            modules = [name for name in family.heads.values() if f"{name}.weight" in names]
        if not modules:
            return None, ()
        head = _classifier(modules[0], settings)
    if num_outputs not in (None, head.num_outputs):
        return None, (f"the checkpoint's head has {head.num_outputs} outputs, not {num_outputs}",)
    if pooling not in (None, family.head_pooling):
        return None, (f"the checkpoint's head is for {family.head_pooling} pooling, not {pooling}",)
    return head, ()


def _classifier(module: str, settings: _Settings) -> _Head:
    """Returns a classifier with its labels: `id2label` maps the numbers of outputs, written as text, to names."""
    labels = settings.values.get("id2label")
    if not isinstance(labels, dict) or not labels:
        number = settings.size("num_labels") if "num_labels" in settings.values else DEFAULT_LABELS
        return _Head(module=module, num_outputs=number, labels=None)
    names = [labels.get(str(number)) for number in range(len(labels))]
    return _Head(
        module=module,
        num_outputs=len(names),
        labels=tuple(map(str, names)) if None not in names else None,
    )


def _structure(
    family: Family,
    settings: _Settings,
    names: set[str],
    head: _Head | None,
    num_outputs: int | None,
    pooling: Pooling | None,
) -> ModelStructure:
    """Returns the sizes and the wiring of a checkpoint's model."""
    width, num_heads = settings.size(family.width), settings.size(family.num_heads)
    if width % num_heads:
        raise CheckpointError(
            f"{settings.path}: `{family.width}` {width} is not a multiple of `{family.num_heads}` {num_heads}"
        )
    is_ratio = family.hidden_ratio > 0 and settings.values.get(family.hidden) is None
    name = settings.get(family.activation)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise CheckpointError(
            f"{settings.path}: `{family.activation}` {name!r} is not supported: choose a checkpoint "
            f"with {', '.join(ACTIVATIONS)}"
        )
    if head is not None:
        num_outputs, pooling = head.num_outputs, family.head_pooling
    elif num_outputs is None:
        raise CheckpointError(
            f"{settings.path.parent} has no head that fits: say how many outputs it shall have (`num_outputs`)"
        )
    pooling = pooling or family.fresh_pooling
    pooler: Pooler = "none"
    has_pooler = bool(family.pooler) and f"{pooler_module(family, names)}.weight" in names
    if pooling == "first" and (head is not None or has_pooler):
        pooler = family.pooler_activation
    inputs: PatchInput | TokenInput
    if family.prefix_tokens:
        inputs = _patch_input(family, settings)
    else:
        inputs = TokenInput(
            vocabulary_size=settings.size("vocab_size"), max_tokens=settings.size(family.max_tokens)
        )
    return ModelStructure(
        num_layers=settings.size(family.num_layers),
        num_heads=num_heads,
        head_dim=width // num_heads,
        width=width,
        hidden=family.hidden_ratio * width if is_ratio else settings.size(family.hidden),
        input=inputs,
        norm=family.norm,
        is_causal=family.is_causal,
        activation=ACTIVATIONS[name],
        pooling=pooling,
        pooler=pooler,
        num_outputs=num_outputs,
    )


def _patch_input(family: Family, settings: _Settings) -> PatchInput:
    """Returns the sizes of a model of images."""
    patch_size = settings.side("patch_size")
    image_size, channels = settings.side("image_size"), settings.size("num_channels")
    try:
        return PatchInput(
            image_size=image_size,
            channels=channels,
            patch_size=patch_size,
            stride=patch_size,
            num_prefix=len(family.prefix_tokens),
        )
    except CodesignError as error:
        raise CheckpointError(f"{settings.path}: {error}") from None


def _normalisation(
    folder: Path, family: Family, channels: int
) -> tuple[Normalisation, tuple[str, ...]]:
    """Returns what the model's image processor does to a pixel, and a note if the family's own had to do."""
    path = folder / PREPROCESSOR_FILE
    notes: tuple[str, ...] = ()
    values: dict[str, Any] = {}
    if path.is_file():
        values = read_json(path)
    else:
        notes = (f"no {PREPROCESSOR_FILE}: mean {family.mean}, deviation {family.std} assumed",)
    parts: dict[str, tuple[float, ...]] = {}
    for key, default, neutral in (("image_mean", family.mean, 0.0), ("image_std", family.std, 1.0)):
        part = values.get(key, list(default))
        if not values.get("do_normalize", True):
            part = [neutral] * channels
        if not isinstance(part, list) or len(part) != channels or not _are_finite(part):
            raise CheckpointError(
                f"{path}: `{key}` must be {channels} numbers, one per channel, got {part!r}"
            )
        parts[key] = tuple(map(float, part))
    if min(parts["image_std"]) <= 0:
        raise CheckpointError(f"{path}: `image_std` must be positive, got {parts['image_std']}")
    rescale = values.get("rescale_factor", RESCALE) if values.get("do_rescale", True) else 1.0
    if not _are_finite([rescale]) or rescale <= 0:
        raise CheckpointError(f"{path}: `rescale_factor` must be positive, got {rescale!r}")
    return Normalisation(rescale=rescale, mean=parts["image_mean"], std=parts["image_std"]), notes


def _are_finite(values: list[object]) -> bool:
    """Returns whether all values are finite numbers."""
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def _rest(family: Family, rest: set[str], body: str) -> tuple[list[str], list[str]]:
    """Returns modules of heads that are not used, and tensors that do not belong to the model at all."""
    heads = (*family.other_heads, *(f"{head}." for head in family.heads.values()))
    if family.pooler:
        heads += (f"{family.pooler}.",)
    unused, unknown = set(), []
    for name in sorted(rest):
        own = name.removeprefix(body)
        if own.startswith(heads):
            unused.add(own.rpartition(".")[0] or own)
        elif not family.buffers or not own.endswith(family.buffers):
            unknown.append(name)
    return sorted(unused), unknown
