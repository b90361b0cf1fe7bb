"""What a task's data looks like: examples in parts, the inputs that a model reads, and the settings that choose them."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from codesign.errors import DataError

Part = Literal["train", "validation", "test"]
QualityName = Literal["accuracy", "bits_per_token"]


@dataclasses.dataclass(frozen=True)
class Examples:
    """N examples.

    Attributes:
      inputs: Images: `pixels`, raw integers int32 `[N, image, image]` or with channels last. Text: `tokens`, int32
        `[N, T]`, padded at the end, and `valid`, bool `[N, T]`, which of them are text.
      labels: Classes, int32 `[N]`; of a language task the next token, `[N, T]`, to be read where `valid`.
    """

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    def first(self, number: int | None) -> "Examples":
        """Returns the first examples; all if `number` is None."""
        return self.take(slice(number))

    def take(self, indices: NDArray[np.integer[Any]] | slice) -> "Examples":
        """Returns the examples of these indices, in their order."""
        return Examples(
            inputs={name: values[indices] for name, values in self.inputs.items()},
            labels=self.labels[indices],
        )

    def digest(self) -> str:
        """Returns 12 hexadecimal digits that tell these examples from others."""
        state = hashlib.sha256()
        for name, values in sorted((self.inputs | {"labels": self.labels}).items()):
            state.update(f"{name} {values.dtype} {values.shape}".encode())
            state.update(np.ascontiguousarray(values).data)
        return state.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """Square images; a pixel p enters the model as (p - pixel_offset) * pixel_scale."""

    image_size: int
    channels: int
    pixel_offset: int
    pixel_scale: float


@dataclasses.dataclass(frozen=True)
class TextInput:
    """Rows of token numbers.

    Attributes:
      vocabulary_size: Token numbers are below it.
      max_tokens: Tokens of a row, padding included.
      tokenizer: File of the tokenizer, or "characters".
      pad_id: Token after a row's end; masked.
    """

    vocabulary_size: int
    max_tokens: int
    tokenizer: str
    pad_id: int


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set for a model.

    Attributes:
      name: Its name in `TASKS`.
      parts: Examples of the parts that exist; `part` reads one.
      kind: Whether the model tells an example's class, or every next token.
      num_outputs: Classes, or tokens.
      input: What the examples look like.
      origin: Where they are from, for messages.
      classes: Names of the classes; empty for a language task.
    """

    name: str
    parts: dict[Part, Examples]
    kind: Literal["classification", "language"]
    num_outputs: int
    input: ImageInput | TextInput
    origin: str
    classes: tuple[str, ...] = ()

    def part(self, name: Part) -> Examples:
        """Returns the examples of a part.

        Raises:
          DataError: If the data has no such part.
        """
        if name not in self.parts:
            raise DataError(
                f"part '{name}' of task '{self.name}' is not in {self.origin}: "
                f"it has {', '.join(self.parts)}; use one of these or add its file"
            )
        return self.parts[name]

    @property
    def quality_name(self) -> QualityName:
        """What measures a model of the task."""
        return "accuracy" if self.kind == "classification" else "bits_per_token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where a task's data is and how its text is cut; what a task has no use for is not read."""

    # Folder with the task's files, of `user_text` the file; None: $CODESIGN_DATA/<task>, else the Hugging Face hub.
    data: Path | None = None
    # Whose word pieces: a tokenizer.json, a checkpoint's folder, `minilm`, or a name on the Hugging Face hub; None: those
    # of the experiment's checkpoint, else of `minilm`.
    tokenizer: str | None = None
    # Tokens of a row, [CLS] and [SEP] included, >= 1; None: 64 for sst2, 128 for user_text, else 256.
    max_tokens: int | None = None
    # Whether longer texts are cut; if not, one is an error.
    truncate: bool = True
    # Column of the text in the user's own file.
    text_column: str = "text"
    # Column of its labels.
    label_column: str = "label"
    # A second file of the user's own, for the validation part; None: examples of the first are held out.
    validation_data: Path | None = None
    # Part of every class that is held out where there is no second file, (0, 1).
    validation_fraction: float = 0.2
    # Seed that chooses what is held out, >= 0.
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
          DataError: If a field is outside its range; names it.
        """
        for name, is_legal, legal in (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "be at least 1"),
            ("validation_fraction", 0.0 < self.validation_fraction < 1.0, "lie in (0, 1)"),
            ("split_seed", self.split_seed >= 0, "be at least 0"),
        ):
            if not is_legal:
                raise DataError(f"`{name}` must {legal}, got {getattr(self, name)}: change it")

    def plain(self) -> dict[str, Any]:
        """Returns the settings as JSON types."""
        return {
            name: str(value.absolute()) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
        }
