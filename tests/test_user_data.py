"""The user's own labelled text: formats, labels, the held-out part, and one line for everything that can be wrong."""

import csv
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from codesign.errors import DataError
from codesign.experiments.data import DataSettings
from codesign.experiments.tasks import load_task
from codesign.experiments.user_data import UserData, load_user_data, read_labelled

ROWS = [("fine, really", "pos"), ('he said "no"', "neg"), ("two\nlines", "pos"), ("né", "neg")]


def write(path: Path, rows: list[tuple]) -> Path:
    match path.suffixes:
        case [".csv"]:
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("id", "text", "label"), *((0, *row) for row in rows)])
        case [".jsonl", *_]:
            lines = "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows).encode()
            path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
        case _:
            parquet = pytest.importorskip("pyarrow.parquet")
            arrow = pytest.importorskip("pyarrow")
            columns = dict(zip(("text", "label"), map(list, zip(*rows, strict=True)), strict=True))
            parquet.write_table(arrow.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".jsonl.gz", ".parquet"])
def test_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = read_labelled(write(tmp_path / f"own{suffix}", ROWS), "text", "label")
    assert list(zip(rows.texts, rows.labels, strict=True)) == ROWS
    assert rows.classes() == ("neg", "pos")
    np.testing.assert_array_equal(rows.class_numbers(rows.classes()), [1, 0, 1, 0])
    # CSV: the last of a row's lines, the header being line 1.
    first = "row 1" if suffix == ".parquet" else "line 2" if suffix == ".csv" else "line 1"
    assert rows.places[0] == first


@pytest.mark.parametrize(
    ("suffix", "labels", "classes"),
    [
        (".csv", ["10", "9", " 9 "], (9, 10)),
        (".csv", ["10", "9", "x"], ("10", "9", "x")),
        (".csv", ["10.0", "9", " 9.0"], (9, 10)),
        (".csv", ["10.0", "9", "x"], ("10.0", "9", "x")),
        (".jsonl", [10, 9, 9.0], (9, 10)),
        (".jsonl", [True, False, False], (0, 1)),
        (".parquet", [2.0, 1.0, 1.0], (1, 2)),
    ],
)
def test_labels_become_sorted_classes(
    tmp_path: Path, suffix: str, labels: list, classes: tuple
) -> None:
    path = write(tmp_path / f"own{suffix}", [("a", label) for label in labels])
    assert read_labelled(path, "text", "label").classes() == classes


def test_a_long_cell_is_read_and_the_limit_put_back(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = write(tmp_path / "own.csv", [("x" * 200_000, "a")])
    assert len(read_labelled(path, "text", "label").texts[0]) == 200_000
    assert csv.field_size_limit() == limit


def test_a_byte_order_mark_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\na,0\r\n\r\nb,1\r\n")
    assert read_labelled(path, "text", "label").texts == ("a", "b")
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "a", "label": 0}\n\n{"text": "b\\u2028c", "label": 1}')
    assert read_labelled(path, "text", "label").places == ("line 1", "line 3")


BAD_FILES = {
    "own.csv": [
        (b"", "`.*own.csv` is empty"),
        (b"text,label\n", "has no rows"),
        (b"body,class\na,0\n", "no column `text` .it has `body`, `class`.: .*`--text-column`"),
        (b"text;label\na;0\n", "no column `text` .it has `text;label`."),
        (b"text,class\na,0\n", "no column `label` .*`--label-column`"),
        (b"text,label\na,0\nb\xe9,1\n", r"not UTF-8 at byte 16 \(line 3\)"),
        (b"text,label\na,0\nb\n", "line 3: `label` is missing"),
        (b"text,label\na,0\nb,\n", "line 3: `label` is missing"),
        (b"text,label\na,0\nb,c,1\n", "line 3: more cells than the header"),
        (b"text,label\na,0\n  ,1\n", "line 3: `text` is empty"),
        (b"text,label\na,0\na\0b,1\n", "line 3: `text` holds a NUL"),
        (b"text,label\na,0\nb,0.5\n", "line 3: `label` is 0.5, neither"),
        (b'text,label\n"a,0\nb,1\n', "after line 1: unexpected end of data: mend"),
    ],
    "own.jsonl": [
        (b"", "is empty"),
        (b"\n\n", "has no rows"),
        (b'{"text": "a", "label": 0}\n{"text": "b"', "line 2 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"text": "a", "label": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        (b'["a", 0]\n', "line 1 is not an object"),
        (b'{"text": "a"}\n', "line 1 has no column `label` .it has `text`."),
        (b'{"text": 3, "label": 0}\n', "line 1: `text` is of type int, not text"),
        (b'{"text": null, "label": 0}\n', "line 1: `text` is missing"),
        (b'{"text": "\\ud800", "label": 0}\n', "line 1: `text` holds half a surrogate"),
        (b'{"text": "a", "label": null}\n', "line 1: `label` is missing"),
        (b'{"text": "a", "label": NaN}\n', "line 1: `label` is missing"),
        (b'{"text": "a", "label": 0.5}\n', "line 1: `label` is 0.5, neither"),
        (b'{"text": "a", "label": [1]}\n', r"line 1: `label` is \[1\], neither"),
        (b'{"text": "a", "label": 1}\n{"text": "b", "label": "x"}', "line 2: label 'x' after 1"),
        (b'{"text": "\xff", "label": 1}\n', "not UTF-8 at byte 10"),
    ],
    "own.jsonl.gz": [
        (b"", "is empty"),
        (b"text", "cannot be read"),
        (gzip.compress(b'{"text": "a", "label": 0}\n', mtime=0)[:-9], "cannot be read"),
    ],
    "own.parquet": [(b"", "is empty"), (b"PAR1 cut", "is not a readable Parquet file")],
    "own.xlsx": [(b"PK", r"must end in one of \.csv, \.jsonl, \.jsonl\.gz, \.parquet")],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, *case) for name, cases in BAD_FILES.items() for case in cases],
    ids=str,
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_labelled(tmp_path / name, "text", "label")
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file_and_a_missing_library_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="`none.csv` is not a file"):
        read_labelled(Path("none.csv"), "text", "label")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "own.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'codesign\[parquet\]'`, or convert"):
        read_labelled(tmp_path / "own.parquet", "text", "label")


def test_missing_columns_of_parquet_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "own.parquet", ROWS)
    with pytest.raises(DataError, match="no column `body` .it has `text`, `label`."):
        read_labelled(path, "body", "label")


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_the_held_out_part_has_every_class_in_its_share(tmp_path: Path, fraction: float) -> None:
    rows = [(f"text {i}", "abc"[min(i // 50, 2)]) for i in range(103)]
    data = UserData(path=write(tmp_path / "own.csv", rows), validation_fraction=fraction)
    train, validation, classes = load_user_data(data)
    assert classes == ("a", "b", "c")
    assert sorted([*train.texts, *validation.texts]) == sorted(text for text, _ in rows)
    for label, number in (("a", 50), ("b", 50), ("c", 3)):
        held = sum(own == label for own in validation.labels)
        # At least one on either side, else the nearest whole number.
        assert held == min(max(1, round(fraction * number)), number - 1)
    again = load_user_data(data)[1]
    assert again.texts == validation.texts
    other = load_user_data(UserData(path=data.path, validation_fraction=fraction, seed=1))[1]
    assert other.texts != validation.texts


def test_a_second_file_is_the_validation_part(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", [("a", "1"), ("b", "2"), ("c", "x")])
    second = write(tmp_path / "second.csv", [("d", "2"), ("e", "1")])
    train, validation, classes = load_user_data(UserData(path=path, validation_path=second))
    assert train.texts == ("a", "b", "c") and validation.texts == ("d", "e")
    # "1" and "2" stay strings because the training classes are.
    np.testing.assert_array_equal(validation.class_numbers(classes), [1, 0])
    strange = write(tmp_path / "strange.csv", [("d", "2"), ("e", "3")])
    with pytest.raises(
        DataError, match="strange.csv`, line 3: label '3' is not one of `1`, `2`, `x`"
    ):
        load_user_data(UserData(path=path, validation_path=strange))[1].class_numbers(classes)


def test_classes_must_be_two_and_large_enough_to_split(tmp_path: Path) -> None:
    one = write(tmp_path / "one.csv", [("a", "x"), ("b", "x")])
    with pytest.raises(DataError, match="every label in column `label` is 'x'"):
        load_user_data(UserData(path=one))
    identifiers = write(tmp_path / "own.csv", [(f"t{i}", str(i)) for i in range(5)])
    with pytest.raises(DataError, match="line 2: class 0 has one row, .* check that `label` holds"):
        load_user_data(UserData(path=identifiers))


def test_the_task_of_a_users_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0, "good": 1, "bad": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [("good good", "yes"), ("bad", "no")] * 5
    task = load_task(
        "user_text",
        DataSettings(
            data=write(tmp_path / "own.csv", rows),
            tokenizer=str(tmp_path),
            max_tokens=4,
            truncate=False,
        ),
    )
    assert (task.num_outputs, task.classes) == (2, ("no", "yes"))
    train = task.part("train")
    assert len(train) == 8 and len(task.part("validation")) == 2
    for tokens, label in zip(train.inputs["tokens"], train.labels, strict=True):
        assert tokens.tolist() == ([1, 1, 0, 0] if label else [2, 0, 0, 0])
    with pytest.raises(DataError, match="`user_text` needs `--data FILE`"):
        load_task("user_text")


def test_columns_that_stand_there_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("text,label,label\na,0,1\nb,1,0\n")
    (tmp_path / "own.jsonl").write_text('{"text": "a", "label": 0, "label": 1}\n')
    for name in ("own.csv", "own.jsonl"):
        with pytest.raises(DataError, match="`label` stands there twice"):
            read_labelled(tmp_path / name, "text", "label")
    with pytest.raises(DataError, match="named as text and as label"):
        read_labelled(tmp_path / "own.jsonl", "label", "label")
