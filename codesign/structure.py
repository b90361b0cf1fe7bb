"""Structure of a deployed model: it fixes the names and shapes of the arrays of the integer path.

`docs/integer_path.md` says what each array means.
"""

import dataclasses

from codesign.errors import CodesignError, UnknownNameError

DEPLOYED_MECHANISMS = ("dense", "energon")
"""Mechanisms that the integer path defines."""

GELU_LIMIT = 511
"""Largest code that enters the GELU table; the table has `2 * GELU_LIMIT + 1` entries."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelStructure:
    """Sizes of a deployed vision transformer; all are counts of elements, none a physical unit.

    Raises:
      UnknownNameError: If `mechanism` has no integer path.
      CodesignError: If a size is not positive, a patch does not fit, or `num_rounds` contradicts
        `mechanism`.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    # Width D of the residual stream.
    width: int
    # Inner width F of the feed-forward network.
    hidden: int
    # Side of the square input, in pixels; `channels` values per pixel.
    image_size: int
    channels: int
    patch_size: int
    stride: int
    # Zeros added on each of the four sides, in pixels; 0 or more.
    padding: int
    num_classes: int
    mechanism: str
    # Filter rounds R; 0 for `dense`.
    num_rounds: int

    def __post_init__(self) -> None:
        """Checks the sizes and their consistency."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            minimum = 0 if field.name in ("padding", "num_rounds") else 1
            if field.name != "mechanism" and value < minimum:
                raise CodesignError(f"`{field.name}` must be at least {minimum}, got {value}")
        if self.mechanism not in DEPLOYED_MECHANISMS:
            raise UnknownNameError(
                f"`mechanism` must be one of {', '.join(DEPLOYED_MECHANISMS)}, "
                f"got {self.mechanism!r}"
            )
        if (self.num_rounds > 0) != (self.mechanism == "energon"):
            raise CodesignError(
                "`num_rounds` must be 0 for `dense` and at least 1 for `energon`, "
                f"got {self.num_rounds} for `{self.mechanism}`"
            )
        padded_size = self.image_size + 2 * self.padding
        if self.patch_size > padded_size:
            raise CodesignError(
                f"`patch_size` must fit the padded image ({padded_size} pixels), "
                f"got {self.patch_size}"
            )

    @property
    def grid_size(self) -> int:
        """Tokens along one side of the image."""
        return (self.image_size + 2 * self.padding - self.patch_size) // self.stride + 1

    @property
    def num_tokens(self) -> int:
        """Tokens T of an image."""
        return self.grid_size**2

    @property
    def patch_values(self) -> int:
        """Values P in the vector of one token before the embedding."""
        return self.patch_size**2 * self.channels

    @property
    def attention_width(self) -> int:
        """Width H * d of all heads side by side."""
        return self.num_heads * self.head_dim

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every array of the group `layers`, the layer axis first."""
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
            "gelu_table": (2 * GELU_LIMIT + 1,),
            "down_activation_bits": (),
            "down_weight_bits": (),
            "down_weight": (hidden, width),
            "down_bias": (width,),
            "down_mantissa": (width,),
            "down_shift": (width,),
        }
        if self.mechanism == "energon":
            shapes |= {
                "threshold": (self.num_heads, self.num_rounds),
                "query_bits": (),
                "key_bits": (self.num_rounds,),
            }
        return {name: (self.num_layers, *shape) for name, shape in shapes.items()}

    def end_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every array of the group `ends`: input, embedding and head."""
        width = self.width
        return {
            "input_offset": (),
            "input_mantissa": (),
            "input_shift": (),
            "embed_activation_bits": (),
            "embed_weight_bits": (),
            "embed_weight": (self.patch_values, width),
            "embed_bias": (width,),
            "embed_mantissa": (width,),
            "embed_shift": (width,),
            "position": (self.num_tokens, width),
            "norm_epsilon": (),
            "head_gain": (width,),
            "head_offset": (width,),
            "head_activation_bits": (),
            "head_weight_bits": (),
            "head_weight": (width, self.num_classes),
            "head_bias": (self.num_classes,),
        }

    def tensor_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor the integer path names, in order of computation."""
        layers, heads, tokens = self.num_layers, self.num_heads, self.num_tokens
        per_head = (layers, batch_size, heads, tokens, self.head_dim)
        pairs = (batch_size, heads, tokens, tokens)
        stream = (layers, batch_size, tokens, self.width)
        return {
            "embedded": stream[1:],
            "query": per_head,
            "key": per_head,
            "value": per_head,
            "scores": (layers, self.num_rounds, *pairs),
            "keep": (layers, self.num_rounds, *pairs),
            "probabilities": (layers, *pairs),
            "context": (layers, batch_size, tokens, self.attention_width),
            "attended": stream,
            "hidden": (layers, batch_size, tokens, self.hidden),
            "residual": stream,
            "logits": (batch_size, self.num_classes),
        }
