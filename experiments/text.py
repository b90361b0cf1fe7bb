"""Text as token numbers: word pieces by a checkpoint's own tokenizer, or characters."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from codesign.errors import DataError
from codesign.experiments.checkpoint_sources import CONFIG_FILE, TOKENIZER_FILE, checkpoint_folder

NUM_NAMED = 10
"""Unknown characters that an error names at most."""

Tokens = NDArray[np.int32]
Valid = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class WordPieces:
    """A tokenizer read from a `tokenizer.json`.

    Attributes:
      tokenizer: What cuts the text; its own post-processor adds [CLS] and [SEP].
      path: The file.
      vocabulary_size: One more than its largest token number.
      pad_id: Fills a row after its text; never read, because `valid` masks it.
    """

    tokenizer: Tokenizer
    path: Path
    vocabulary_size: int
    pad_id: int

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int,
        truncate: bool,
        places: Sequence[str],
        origin: str,
    ) -> tuple[Tokens, Valid]:
        """Returns token numbers `[N, max_tokens]`, padded at the end, and which of them are text.

        Args:
          texts: N texts.
          max_tokens: Tokens of a row, those that the tokenizer adds included.
          truncate: Whether a longer text is cut; if not, it is an error.
          places: Where each text is in `origin`, for messages.
          origin: Where the texts are from.

        Raises:
          DataError: If a text has no token, or more than `max_tokens` without `truncate`.
        """
        added = self.tokenizer.num_special_tokens_to_add(False)
        if max_tokens <= added:
            raise DataError(
                f"`--max-tokens` must exceed the {added} tokens that `{self.path}` adds to a text, "
                f"got {max_tokens}: raise it"
            )
        self.tokenizer.no_padding()
        if truncate:
            self.tokenizer.enable_truncation(max_tokens)
        else:
            self.tokenizer.no_truncation()
        tokens = np.full((len(texts), max_tokens), self.pad_id, np.int32)
        valid = np.zeros((len(texts), max_tokens), np.bool_)
        for index, encoding in enumerate(self.tokenizer.encode_batch(list(texts))):
            length = len(encoding.ids)
            if length > max_tokens:
                raise DataError(
                    f"{origin}, {places[index]}: the text has {length} tokens, above the {max_tokens} allowed: "
                    "raise `--max-tokens`, leave `--no-truncate` out, or shorten it"
                )
            if length <= added:
                raise DataError(
                    f"{origin}, {places[index]}: the text has no token that `{self.path}` knows: remove it"
                )
            tokens[index, :length] = encoding.ids
            valid[index, :length] = True
        return tokens, valid


def load_word_pieces(source: str) -> WordPieces:
    """Returns a tokenizer.

    Args:
      source: A `tokenizer.json`, or a checkpoint that has one: a folder, `minilm` or a name on the Hugging Face hub.

    Raises:
      CheckpointError: If there is no such checkpoint.
      DataError: If there is no such file, or it is malformed.
    """
    file = Path(source)
    if file.suffix != ".json":
        folder = checkpoint_folder(source)
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise DataError(_no_tokenizer(folder))
    if not file.is_file():
        raise DataError(f"tokenizer `{file}` does not exist: give the file or its folder")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except (
        Exception
    ) as error:  # NOTE: the library raises plain `Exception` for every malformed file.
        raise DataError(
            f"`{file}` is not a tokenizer ({error}): give the `{TOKENIZER_FILE}` of a checkpoint"
        ) from error
    numbers = tokenizer.get_vocab(with_added_tokens=True).values()
    if not numbers:
        raise DataError(f"tokenizer `{file}` has no tokens: give that of a checkpoint")
    padding = tokenizer.padding
    pad_id = padding["pad_id"] if padding else tokenizer.token_to_id("[PAD]")
    return WordPieces(
        tokenizer=tokenizer, path=file, vocabulary_size=max(numbers) + 1, pad_id=pad_id or 0
    )


def _no_tokenizer(folder: Path) -> str:
    if not (folder / CONFIG_FILE).is_file():
        return (
            f"`{folder}` has neither {CONFIG_FILE} nor {TOKENIZER_FILE}: give a checkpoint's folder"
        )
    if (folder / "vocab.txt").is_file():
        return (
            f"`{folder}` has a vocab.txt, and only {TOKENIZER_FILE} is read: let transformers write it, "
            "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
        )
    return f"`{folder}` has no {TOKENIZER_FILE}: give a checkpoint of text, or one's file with `--tokenizer`"


def check_same_tokens(source: str, own: Path) -> None:
    """Checks that a tokenizer numbers its tokens as the checkpoint's own does.

    Args:
      source: As in `load_word_pieces`.
      own: The `tokenizer.json` of the checkpoint.

    Raises:
      DataError: If a token has another number there, or is not there; names it.
    """
    given, known = load_word_pieces(source), load_word_pieces(str(own))
    numbers = known.tokenizer.get_vocab(with_added_tokens=True)
    for token, number in sorted(given.tokenizer.get_vocab(with_added_tokens=True).items()):
        if numbers.get(token) != number:
            there = f"number {numbers[token]}" if token in numbers else "unknown"
            raise DataError(
                f"tokenizer `{given.path}` is another model's: its {token!r} has number {number}, in `{own}` it is "
                f"{there}: leave `--tokenizer` out"
            )


def decoded(content: bytes, path: Path) -> str:
    """Returns UTF-8 bytes as text, without a byte order mark.

    Raises:
      DataError: If they are not UTF-8; gives the byte and the line.
    """
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"`{path}` is not UTF-8 at byte {error.start} (line {line}): save it as UTF-8"
        ) from error


def read_characters(path: Path) -> str:
    """Returns the text of a file.

    Raises:
      DataError: If it cannot be read, has under two characters (nothing to predict) or is not UTF-8.
    """
    try:
        text = decoded(path.read_bytes(), path)
    except OSError as error:
        raise DataError(f"`{path}` cannot be read ({error.strerror}): mend or move it") from error
    if len(text) < 2:
        raise DataError(f"`{path}` has {len(text)} characters: give at least two")
    return text


def character_numbers(text: str, vocabulary: str, *, origin: str) -> Tokens:
    """Returns the place of every character in a sorted vocabulary, `[len(text)]`.

    Raises:
      DataError: If a character is not in it; names them.
    """
    codes, known = _codes(text), _codes(vocabulary)
    places = np.minimum(np.searchsorted(known, codes), len(known) - 1)
    strange = np.flatnonzero(known[places] != codes)
    if len(strange):
        names = sorted({text[index] for index in strange})
        shown = ", ".join(ascii(name) for name in names[:NUM_NAMED])
        more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
        raise DataError(
            f"{origin}: {shown}{more} not among the {len(vocabulary)} characters of the training part "
            f"(first at character {int(strange[0])}): replace or remove them"
        )
    return places.astype(np.int32)


def next_character_windows(numbers: Tokens, length: int) -> tuple[Tokens, Tokens, Valid]:
    """Returns windows `[N, length]` that do not overlap, the character after each of theirs, and which are text.

    Every character but the first is a target once; the last window is filled with zeros, not valid.

    Args:
      numbers: Token numbers of a text, `[n]`, n >= 2.
      length: Tokens of a window.
    """
    num_targets = len(numbers) - 1
    num_windows = -(-num_targets // length)
    shape = (num_windows, length)

    def windows(values: NDArray[np.int32]) -> Tokens:
        filled = np.zeros(num_windows * length, np.int32)
        filled[:num_targets] = values
        return filled.reshape(shape)

    valid = np.arange(num_windows * length).reshape(shape) < num_targets
    return windows(numbers[:-1]), windows(numbers[1:]), valid


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
