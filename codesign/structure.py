"""Structure of a model: what it takes in, how its blocks are built, and the arrays and tensors of its integer path.

`docs/integer_path.md` says what each array means. Imports no JAX.
"""

import dataclasses
from typing import Literal, TypeAlias

from codesign.errors import CodesignError

ACTIVATION_LIMIT = 511
"""Largest code that enters the table of a non-linearity, which has `2 * ACTIVATION_LIMIT + 1` entries."""

Norm: TypeAlias = Literal["pre", "post"]
Activation: TypeAlias = Literal["gelu", "gelu_tanh", "relu"]
Pooling: TypeAlias = Literal["mean", "first", "all"]
Pooler: TypeAlias = Literal["none", "tanh", "relu"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("pre", "post"),
    "activation": ("gelu", "gelu_tanh", "relu"),
    "pooling": ("mean", "first", "all"),
    "pooler": ("none", "tanh", "relu"),
}


def _check_sizes(instance: object, may_be_zero: tuple[str, ...] = ()) -> None:
    """Raises `CodesignError` naming the first whole number of a dataclass that is too small."""
    for field in dataclasses.fields(instance):  # type: ignore[arg-type]
        value = getattr(instance, field.name)
        least = 0 if field.name in may_be_zero else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise CodesignError(f"`{field.name}` must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchInput:
    """Square images cut into patches, one token each, behind `num_prefix` learned tokens (a class token).

    Raises:
      CodesignError: If a size is not positive, or a patch does not fit.
    """

    kind: Literal["patches"] = "patches"
    # Side of the square input, in pixels; `channels` values per pixel.
    image_size: int
    channels: int
    patch_size: int
    stride: int
    # Zeros added on each of the four sides, in pixels; 0 or more.
    padding: int = 0
    # Learned tokens in front of the patches: 1 with a class token, 2 with a distillation token too.
    num_prefix: int = 0

    def __post_init__(self) -> None:
        """Checks the sizes."""
        _check_sizes(self, ("padding", "num_prefix"))
        padded_size = self.image_size + 2 * self.padding
        if self.patch_size > padded_size:
            raise CodesignError(
                f"`patch_size` must fit the padded image ({padded_size} pixels), "
                f"got {self.patch_size}"
            )

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return (self.image_size + 2 * self.padding - self.patch_size) // self.stride + 1

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid_size**2

    @property
    def patch_values(self) -> int:
        """Values P of one patch."""
        return self.patch_size**2 * self.channels

    @property
    def max_tokens(self) -> int:
        """Tokens of an image, prefix included."""
        return self.num_prefix + self.num_patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenInput:
    """Sequences of token numbers, padded at the end; a table row and a position row are added up.

    Raises:
      CodesignError: If a size is not positive.
    """

    kind: Literal["tokens"] = "tokens"
    # Rows V of the embedding table.
    vocabulary_size: int
    # Rows of the position table: the longest sequence.
    max_tokens: int

    def __post_init__(self) -> None:
        """Checks the sizes."""
        _check_sizes(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelStructure:
    """Sizes and wiring of a transformer; sizes are counts of elements, none a physical unit.

    Raises:
      CodesignError: If a size is not positive, a choice is unknown, or choices contradict each other.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    # Width D of the residual stream.
    width: int
    # Inner width F of the feed-forward network.
    hidden: int
    input: PatchInput | TokenInput
    # Where a block normalises: what enters a branch (ViT, GPT), or the sum that leaves it (BERT).
    norm: Norm = "pre"
    # Whether a token sees only itself and earlier ones.
    is_causal: bool = False
    # Non-linearity of the feed-forward network; `gelu_tanh` is GPT-2's approximation.
    activation: Activation = "gelu"
    # What the head reads: the mean token, the first one, or every token (one output per token).
    pooling: Pooling = "mean"
    # A dense layer with this non-linearity between the first token and the head.
    pooler: Pooler = "none"
    # Classes, or the vocabulary of a decoder.
    num_outputs: int
    mechanism: str = "dense"
    # Filter rounds R; 0 where the mechanism has none.
    num_rounds: int = 0

    def __post_init__(self) -> None:
        """Checks the sizes and their consistency."""
        _check_sizes(self, ("num_rounds",))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise CodesignError(
                    f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.pooler != "none" and self.pooling != "first":
            raise CodesignError(
                f"`pooler` works on the first token: `pooling` must be first, got {self.pooling}"
            )

    @property
    def max_tokens(self) -> int:
        """Most tokens of an example."""
        return self.input.max_tokens

    @property
    def attention_width(self) -> int:
        """Width H * d of all heads side by side."""
        return self.num_heads * self.head_dim

    @property
    def end_sites(self) -> tuple[str, ...]:
        """Linear layers outside the blocks, in order."""
        first = ("embed",) if isinstance(self.input, PatchInput) else ()
        return (*first, *(("pool",) if self.pooler != "none" else ()), "head")

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every array of the group `layers`, the layer axis first, without the mechanism's own."""
        width, hidden, attention = self.width, self.hidden, self.attention_width
        shapes: dict[str, tuple[int, ...]] = {
            "attention_gain": (width,),
            "attention_bias": (width,),
            "qkv_activation_bits": (),
            "qkv_weight_bits": (),
            "qkv_weight": (width, 3 * attention),
            "qkv_bias": (3 * attention,),
            "qkv_mantissa": (3 * attention,),
            "qkv_shift": (3 * attention,),
            "qk_bits": (),
            "v_bits": (),
            "exp_mantissa": (),
            "exp_shift": (),
            "context_mantissa": (),
            "context_shift": (),
            "out_activation_bits": (),
            "out_weight_bits": (),
            "out_weight": (attention, width),
            "out_bias": (width,),
            "out_mantissa": (width,),
            "out_shift": (width,),
            "ffn_gain": (width,),
            "ffn_bias": (width,),
            "up_activation_bits": (),
            "up_weight_bits": (),
            "up_weight": (width, hidden),
            "up_bias": (hidden,),
            "up_mantissa": (hidden,),
            "up_shift": (hidden,),
            "activation_table": (2 * ACTIVATION_LIMIT + 1,),
            "down_activation_bits": (),
            "down_weight_bits": (),
            "down_weight": (hidden, width),
            "down_bias": (width,),
            "down_mantissa": (width,),
            "down_shift": (width,),
        }
        if self.norm == "post":
            shapes |= {
                f"{site}_enter_{part}": ()
                for site in ("qkv", "up")
                for part in ("mantissa", "shift")
            }
        return {name: (self.num_layers, *shape) for name, shape in shapes.items()}

    def end_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every array of the group `ends`: input, embedding, pooler and head."""
        width = self.width
        shapes: dict[str, tuple[int, ...]] = {
            "position": (self.max_tokens, width),
            "norm_epsilon": (),
        }
        if isinstance(self.input, PatchInput):
            shapes |= {
                "input_offset": (),
                "input_mantissa": (),
                "input_shift": (),
                "embed_activation_bits": (),
                "embed_weight_bits": (),
                "embed_weight": (self.input.patch_values, width),
                "embed_bias": (width,),
                "embed_mantissa": (width,),
                "embed_shift": (width,),
            }
        else:
            shapes["token"] = (self.input.vocabulary_size, width)
        if self.norm == "post":
            shapes |= {"embed_gain": (width,), "embed_offset": (width,), "embed_epsilon": ()}
        # What reads the residual stream last normalises it (pre-norm) or requantises it (post-norm).
        first = "head" if self.pooler == "none" else "pool"
        if self.norm == "pre":
            shapes |= {f"{first}_gain": (width,), f"{first}_offset": (width,)}
        else:
            shapes |= {f"{first}_enter_mantissa": (), f"{first}_enter_shift": ()}
        if self.pooler != "none":
            shapes |= {
                "pool_activation_bits": (),
                "pool_weight_bits": (),
                "pool_weight": (width, width),
                "pool_bias": (width,),
                "pool_mantissa": (width,),
                "pool_shift": (width,),
                "pool_table": (2 * ACTIVATION_LIMIT + 1,),
            }
        return shapes | {
            "head_activation_bits": (),
            "head_weight_bits": (),
            "head_weight": (width, self.num_outputs),
            "head_bias": (self.num_outputs,),
        }

    def tensor_shapes(self, batch_size: int, num_tokens: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor the integer path names but the mechanism's own, in order of computation."""
        layers, heads, tokens = self.num_layers, self.num_heads, num_tokens
        per_head = (layers, batch_size, heads, tokens, self.head_dim)
        pairs = (batch_size, heads, tokens, tokens)
        stream = (layers, batch_size, tokens, self.width)
        outputs = (tokens,) if self.pooling == "all" else ()
        return {
            "embedded": stream[1:],
            "query": per_head,
            "key": per_head,
            "value": per_head,
            "probabilities": (layers, *pairs),
            "context": (layers, batch_size, tokens, self.attention_width),
            "attended": stream,
            "hidden": (layers, batch_size, tokens, self.hidden),
            "residual": stream,
            "logits": (batch_size, *outputs, self.num_outputs),
        }
