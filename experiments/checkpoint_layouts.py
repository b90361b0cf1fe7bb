"""How Hugging Face names the sizes and tensors of BERT, DistilBERT, GPT-2, ViT and DeiT, and how its tensors become ours.

A `Family` is one `model_type`; `recipe` says from which tensors every array of our parameters is made.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from codesign.structure import ModelStructure, Norm, PatchInput, Pooler, Pooling

PIXEL_OFFSET = 128
PIXEL_SCALE = 1.0 / 128.0
"""8-bit pixels enter a loaded model as (p - 128) / 128, symmetric around 0; the rest of its normalisation is in `embed`."""

Shape = tuple[int, ...]
Tensors = Mapping[str, NDArray[np.float32]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`: the keys of its config.json and the names of its modules.

    Source: `transformers` 5.23, `models/<model_type>/configuration_*.py` and `modeling_*.py`.
    """

    # Comes before every module but the heads where a checkpoint has a head.
    prefix: str
    # Keys of config.json.
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    width: str = "hidden_size"
    hidden: str = "intermediate_size"
    # Inner width of the FFN over the width where config.json has null; 0: it must be there.
    hidden_ratio: int = 0
    activation: str = "hidden_act"
    max_tokens: str = "max_position_embeddings"
    # A key, or the value where the model has no key for it.
    norm_epsilon: str | float = "layer_norm_eps"
    # Options of which we have one value only; a config.json may leave them out.
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    # Wiring.
    norm: Norm
    is_causal: bool = False
    # Modules of a layer, behind `layer` with the layer's number.
    layer: str
    qkv: tuple[str, ...]
    out: str
    attention_norm: str
    up: str
    down: str
    ffn_norm: str
    # Whether linear weights are stored [in, out] (GPT-2's Conv1D) instead of [out, in].
    is_input_first: bool = False
    # What turns images or token numbers into the residual stream.
    embed: str
    position: str
    # Tables whose row 0 joins every position (token types), or tokens in front of the patches.
    types: str = ""
    prefix_tokens: tuple[str, ...] = ()
    # LayerNorm of the embedding (post-norm), or the last one (pre-norm).
    end_norm: str
    # Dense layer between the first token and the head, with its non-linearity; whether `prefix` comes before it.
    pooler: str = ""
    pooler_activation: Pooler = "none"
    is_pooler_in_body: bool = False
    # The head of each architecture that has one we can use.
    heads: Mapping[str, str]
    # What the head reads, and what a fresh head reads.
    head_pooling: Pooling
    fresh_pooling: Pooling
    # Ends of tensors that are no parameters.
    buffers: tuple[str, ...] = ()
    # Beginnings of tensors of heads that are no use here.
    other_heads: tuple[str, ...] = ()
    # Mean and standard deviation per channel where preprocessor_config.json is missing.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


_ENCODER_LAYER = "encoder.layer.{}."
_VIT = Family(
    prefix="vit.",
    norm="pre",
    layer=_ENCODER_LAYER,
    qkv=tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    out="attention.output.dense",
    attention_norm="layernorm_before",
    up="intermediate.dense",
    down="output.dense",
    ffn_norm="layernorm_after",
    embed="embeddings.patch_embeddings.projection",
    position="embeddings.position_embeddings",
    prefix_tokens=("embeddings.cls_token",),
    end_norm="layernorm",
    heads={"ViTForImageClassification": "classifier"},
    head_pooling="first",
    fresh_pooling="first",
    other_heads=("pooler.", "embeddings.mask_token", "decoder.", "distillation_classifier."),
    mean=(0.5, 0.5, 0.5),  # ViTImageProcessor
    std=(0.5, 0.5, 0.5),
)

FAMILIES = {
    "bert": Family(
        prefix="bert.",
        options={
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
        },
        norm="post",
        layer=_ENCODER_LAYER,
        qkv=tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
        out="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        up="intermediate.dense",
        down="output.dense",
        ffn_norm="output.LayerNorm",
        embed="embeddings.word_embeddings",
        position="embeddings.position_embeddings",
        types="embeddings.token_type_embeddings",
        end_norm="embeddings.LayerNorm",
        pooler="pooler.dense",
        pooler_activation="tanh",
        is_pooler_in_body=True,
        heads={"BertForSequenceClassification": "classifier"},
        head_pooling="first",
        fresh_pooling="mean",
        buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
        other_heads=("cls.", "qa_outputs."),
    ),
    "distilbert": Family(
        prefix="distilbert.",
        num_layers="n_layers",
        num_heads="n_heads",
        width="dim",
        hidden="hidden_dim",
        activation="activation",
        norm_epsilon=1e-12,  # written out in modeling_distilbert.py
        norm="post",
        layer="transformer.layer.{}.",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        out="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        ffn_norm="output_layer_norm",
        embed="embeddings.word_embeddings",
        position="embeddings.position_embeddings",
        end_norm="embeddings.LayerNorm",
        pooler="pre_classifier",
        pooler_activation="relu",
        heads={"DistilBertForSequenceClassification": "classifier"},
        head_pooling="first",
        fresh_pooling="mean",
        buffers=("embeddings.position_ids",),
        other_heads=("vocab_", "qa_outputs."),
    ),
    "gpt2": Family(
        prefix="transformer.",
        num_layers="n_layer",
        num_heads="n_head",
        width="n_embd",
        hidden="n_inner",
        hidden_ratio=4,
        activation="activation_function",
        max_tokens="n_positions",
        norm_epsilon="layer_norm_epsilon",
        options={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        norm="pre",
        is_causal=True,
        layer="h.{}.",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        attention_norm="ln_1",
        up="mlp.c_fc",
        down="mlp.c_proj",
        ffn_norm="ln_2",
        is_input_first=True,
        embed="wte",
        position="wpe",
        end_norm="ln_f",
        heads={"GPT2LMHeadModel": "lm_head"},
        head_pooling="all",
        fresh_pooling="all",
        buffers=(".attn.bias", ".attn.masked_bias"),
        other_heads=("score.", "classifier.", "multiple_choice_head.", "qa_outputs."),
    ),
    "vit": _VIT,
    "deit": dataclasses.replace(
        _VIT,
        prefix="deit.",
        prefix_tokens=("embeddings.cls_token", "embeddings.distillation_token"),
        heads={
            "DeiTForImageClassification": "classifier",
            "DeiTForImageClassificationWithTeacher": "cls_classifier",
        },
        mean=(0.485, 0.456, 0.406),  # DeiTImageProcessor: ImageNet
        std=(0.229, 0.224, 0.225),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalisation:
    """What an image processor does to a pixel p of channel c: `(p * rescale - mean[c]) / std[c]`."""

    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Tensors of a checkpoint, name to shape, and how they make one of our arrays."""

    shapes: Mapping[str, Shape]
    make: Callable[[Tensors], NDArray[np.float32]]


def recipe(
    family: Family,
    structure: ModelStructure,
    names: Collection[str],
    *,
    head: str | None,
    num_types: int,
    has_qkv_bias: bool,
    normalisation: Normalisation | None,
) -> dict[str, Any]:
    """Returns our parameters as nested dictionaries with a `Source` in place of every array.

    Args:
      family: Names of the model's tensors.
      structure: Sizes of the model; its head and pooler only where the checkpoint's are used.
      names: Tensors of the checkpoint.
      head: Module of the head, the embedding's for a tied one; None: no `head` in the result.
      num_types: Rows of the table of token types, if the family has one.
      has_qkv_bias: Whether queries, keys and values have a bias.
      normalisation: What the model expects of its pixels; None for text.

    Returns:
      The parameters of `codesign.models.parameters.init_params`, without `head` if `head` is None.
    """
    body = body_prefix(family, names)
    width, attention, hidden = structure.width, structure.attention_width, structure.hidden
    columns = 3 * attention // len(family.qkv)

    def linear(modules: tuple[str, ...], inner: int, outer: int, biased: bool = True) -> Any:
        return _linear(modules, inner, outer, family.is_input_first, biased)

    def layer(number: int) -> dict[str, Any]:
        start = body + family.layer.format(number)
        qkv = tuple(start + module for module in family.qkv)
        return {
            "attention_norm": _norm(start + family.attention_norm, width, names),
            "qkv": linear(qkv, width, columns, has_qkv_bias),
            "out": linear((start + family.out,), attention, width),
            "ffn_norm": _norm(start + family.ffn_norm, width, names),
            "up": linear((start + family.up,), width, hidden),
            "down": linear((start + family.down,), hidden, width),
        }

    def stacked(*sources: Source) -> Source:
        return Source(
            shapes={name: shape for one in sources for name, shape in one.shapes.items()},
            make=lambda tensors: np.stack([one.make(tensors) for one in sources]),
        )

    parts: dict[str, Any] = {
        "blocks": jax.tree.map(stacked, *(layer(n) for n in range(structure.num_layers))),
        "norm" if family.norm == "pre" else "embed_norm": _norm(
            body + family.end_norm, width, names
        ),
    }
    if isinstance(structure.input, PatchInput):
        assert normalisation is not None
        parts["embed"] = _patches(body + family.embed, structure.input, width, normalisation)
        prefix = [body + name for name in family.prefix_tokens]
        parts["position"] = _patch_position(
            body + family.position, prefix, structure.max_tokens, width
        )
    else:
        table = f"{body}{family.embed}.weight"
        parts["embed"] = {"table": _same(table, (structure.input.vocabulary_size, width))}
        parts["position"] = _token_position(
            f"{body}{family.position}.weight",
            f"{body}{family.types}.weight" if family.types else "",
            (structure.max_tokens, width),
            num_types,
        )
    if structure.pooler != "none":
        parts["pool"] = linear((pooler_module(family, names),), width, width)
    if head is not None:
        is_language_head = structure.pooling == "all"
        parts["head"] = _linear((head,), width, structure.num_outputs, False, not is_language_head)
    return parts


def body_prefix(family: Family, names: Collection[str]) -> str:
    """Returns what comes before the modules that are no heads: the family's prefix, or nothing."""
    return family.prefix if any(name.startswith(family.prefix) for name in names) else ""


def pooler_module(family: Family, names: Collection[str]) -> str:
    """Returns the module between the first token and the head."""
    return (body_prefix(family, names) if family.is_pooler_in_body else "") + family.pooler


def _same(name: str, shape: Shape) -> Source:
    """Returns a tensor as it is."""
    return Source(shapes={name: shape}, make=lambda tensors: tensors[name])


def _norm(module: str, width: int, names: Collection[str]) -> dict[str, Source]:
    """Returns a LayerNorm; checkpoints converted from TensorFlow call its arrays gamma and beta."""
    is_old = f"{module}.gamma" in names
    gain, offset = ("gamma", "beta") if is_old else ("weight", "bias")
    return {
        "scale": _same(f"{module}.{gain}", (width,)),
        "bias": _same(f"{module}.{offset}", (width,)),
    }


def _linear(
    modules: tuple[str, ...], inner: int, outer: int, is_input_first: bool, biased: bool
) -> dict[str, Source]:
    """Returns linear layers of the same input side by side; without a bias in the checkpoint it is 0."""
    weights = [f"{module}.weight" for module in modules]
    shape = (inner, outer) if is_input_first else (outer, inner)

    def kernel(tensors: Tensors) -> NDArray[np.float32]:
        found = (tensors[name] for name in weights)
        return np.concatenate([one if is_input_first else one.T for one in found], axis=1)

    biases = [f"{module}.bias" for module in modules] if biased else []

    def bias(tensors: Tensors) -> NDArray[np.float32]:
        if not biases:
            return np.zeros(outer * len(modules), np.float32)
        return np.concatenate([tensors[name] for name in biases])

    return {
        "kernel": Source(shapes=dict.fromkeys(weights, shape), make=kernel),
        "bias": Source(shapes=dict.fromkeys(biases, (outer,)), make=bias),
    }


def _patches(
    module: str, patches: PatchInput, width: int, normalisation: Normalisation
) -> dict[str, Source]:
    """Returns the patch embedding of pixels that enter as x = (p - PIXEL_OFFSET) * PIXEL_SCALE.

    A channel of the model's own input is (p * rescale - mean) / std = x * gain + offset.
    """
    mean, std = np.array(normalisation.mean), np.array(normalisation.std)
    gain = normalisation.rescale / (PIXEL_SCALE * std)
    offset = (PIXEL_OFFSET * normalisation.rescale - mean) / std
    weight, bias = f"{module}.weight", f"{module}.bias"
    shape = (width, patches.channels, patches.patch_size, patches.patch_size)
    shapes = {weight: shape}

    def rows_first(tensors: Tensors) -> NDArray[np.float64]:
        return np.transpose(tensors[weight].astype(np.float64), (2, 3, 1, 0))  # [p, p, C, D]

    def kernel(tensors: Tensors) -> NDArray[np.float32]:
        scaled = rows_first(tensors) * gain[:, None]
        return scaled.reshape(patches.patch_values, width).astype(np.float32)

    def shifted_bias(tensors: Tensors) -> NDArray[np.float32]:
        shift = np.einsum("ijcd,c->d", rows_first(tensors), offset)
        return np.asarray(tensors[bias] + shift, np.float32)

    return {
        "kernel": Source(shapes=shapes, make=kernel),
        "bias": Source(shapes=shapes | {bias: (width,)}, make=shifted_bias),
    }


def _patch_position(name: str, prefix: list[str], max_tokens: int, width: int) -> Source:
    """Returns the position table of patches, whose first rows hold the learned tokens too."""

    def make(tensors: Tensors) -> NDArray[np.float32]:
        table = np.array(tensors[name][0], np.float32)
        for row, token in enumerate(prefix):
            table[row] += tensors[token][0, 0]
        return table

    shapes = {name: (1, max_tokens, width)} | dict.fromkeys(prefix, (1, 1, width))
    return Source(shapes=shapes, make=make)


def _token_position(name: str, types: str, shape: Shape, num_types: int) -> Source:
    """Returns the position table of tokens, all of type 0."""
    if not types:
        return _same(name, shape)
    return Source(
        shapes={name: shape, types: (num_types, shape[1])},
        make=lambda tensors: np.asarray(tensors[name] + tensors[types][0], np.float32),
    )
