"""Bad text, labels, tokenizers and checkpoints on the command line: exit status 2, one line, nothing overwritten."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_experiment import write_reviews, write_tokenizer

from codesign.experiments import finished
from codesign.experiments.cli import main
from codesign.experiments.configs import Budget, digits
from codesign.experiments.run import RunDirectory

BUDGET = ("--budget.energy", "0.5")
CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Returns the message of a refusal: exit status 2, one line on standard error."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("codesign: error: ") and error.count("\n") == 1
    return error


def files_of(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with reviews, a tokenizer that fits, one of another model, and a pretrained BERT of 12 positions."""
    write_reviews(tmp_path / "own.csv")
    write_tokenizer(tmp_path / "tokenizer.json")
    write_tokenizer(tmp_path / "other.json", num_more=100)
    shutil.copytree(CHECKPOINTS / "bert", tmp_path / "bert")
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def write(content: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(content)

    return damage


def write_fewer_tokens(path: Path) -> None:
    tokenizer = json.loads(write_tokenizer(path).read_text())
    tokenizer["model"]["vocab"].popitem()
    path.write_text(json.dumps(tokenizer))


ONLY_ZEROS_AND_ONES = b'{"text": "good", "label": 0}\n{"text": "bad", "label": 1}\n'


@pytest.mark.parametrize(
    ("damaged", "damage", "options", "message"),
    [
        ("bert/model.safetensors", cut, (), "model.safetensors"),
        ("bert/model.safetensors", write(b"\x80\x04]."), (), "model.safetensors"),
        (None, None, ("--tokenizer", "{}/other.json"), "it is another model's"),
        (
            "bert/tokenizer.json",
            write_fewer_tokens,
            ("--tokenizer", "{}/tokenizer.json"),
            "tokenizer.json` it is unknown: leave `--tokenizer` out",
        ),
        (None, None, ("--tokenizer", "{}/absent.json"), "absent.json` does not exist"),
        (None, None, ("--text-column", "body"), "has no column `body`"),
        (None, None, ("--label-column", "class"), "name it with `--label-column`"),
        ("own.csv", write(b""), (), "own.csv` is empty"),
        ("own.csv", write(b"verdict,review\n"), (), "has no rows"),
        (
            "own.csv",
            write(b"verdict,review\npraise,caf\xe9\n"),
            (),
            "not UTF-8 at byte 25 (line 2)",
        ),
        ("own.csv", Path.unlink, (), "own.csv` is not a file"),
        (
            "more.csv",
            write(b"verdict,review\npraise,good\nboredom,dull\n"),
            ("--validation-data", "{}/more.csv"),
            "line 3: label 'boredom' is not one of",
        ),
        (
            None,
            None,
            ("--max-tokens", "13"),
            "longer than the model's 12 positions: lower `--max-tokens`",
        ),
        (None, None, ("--max-tokens", "0"), "`max_tokens` must be at least 1, got 0"),
        (
            None,
            None,
            ("--max-tokens", "4", "--no-truncate"),
            "above the 4 allowed",
        ),
        (None, None, ("--experiment.checkpoint", "{}/nowhere/bert"), "does not exist"),
        (None, None, ("--experiment.checkpoint", "{}/own.csv"), "is a file: give its folder"),
    ],
)
def test_bad_text_is_one_line_and_overwrites_nothing(
    damaged: str | None,
    damage: Callable[[Path], None] | None,
    options: tuple[str, ...],
    message: str,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {
        "--data": "{}/own.csv",
        "--text-column": "review",
        "--label-column": "verdict",
        "--tokenizer": "{}/tokenizer.json",
        "--max-tokens": "12",
        "--experiment.checkpoint": "{}/bert",
        "--experiment.num-calibration": "4",
    }
    flags = tuple(word for word in options if word == "--no-truncate")
    named = [word for word in options if word not in flags]
    given |= dict(zip(named[::2], named[1::2], strict=True))
    arguments = [word.format(text) for pair in given.items() for word in pair]
    train = ("train", "user_text", *arguments, *flags, *BUDGET, "--out")
    out = text / "run"
    settings = finished.Settings(experiment=digits(), mode="joint", budget=Budget(energy=0.7))
    RunDirectory.create(out, settings.plain(), resume=False, overwrite=False)
    if damaged is not None and damage is not None:
        damage(text / damaged)
    before = files_of(text)
    assert message in refused(capsys, *train, out, "--overwrite")
    assert message in refused(capsys, *train, text / "other-run")
    assert files_of(text) == before


def test_good_text_has_an_estimate(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `test_bad_text_...` damages is sound, and its options are those of the named experiment."""
    own = ("--data", text / "own.csv", "--text-column", "review", "--label-column", "verdict")
    model = ("--tokenizer", text / "tokenizer.json", "--experiment.checkpoint", text / "bert")
    command = ("train", "user_text", *own, *model, "--max-tokens", "12", *BUDGET)
    arguments = [str(word) for word in (*command, "--out", text / "run", "--estimate")]
    assert main(arguments) == 0
    *notes, expected = capsys.readouterr().out.splitlines()
    assert any(note.startswith("checkpoint: fresh head of 2 outputs") for note in notes)
    assert "checkpoint: the task's classes are blame, praise" in notes
    assert expected.startswith("expected time: ")
    assert not (text / "run").exists()
    # A comparison says it once, not once a mechanism.
    options = [str(word) for word in (*own, *model)]
    compared = ["compare", "user_text", *options, "--max-tokens", "12", "--budgets", "0.9"]
    several = ["--mechanisms", "sofa", "topk", "a3", "--out", str(text / "all"), "--estimate"]
    assert main([*compared, *several]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == notes


def test_labels_of_a_known_task_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    for name, content in (
        ("train", ONLY_ZEROS_AND_ONES),
        ("validation", ONLY_ZEROS_AND_ONES.replace(b"1}", b"2}")),
    ):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
    options = ("--data", tmp_path, "--tokenizer", tmp_path / "tokenizer.json")
    command = ("train", "sst2", *options, *BUDGET, "--out", tmp_path / "run")
    assert "line 2: label 2 is not one of `0`, `1`" in refused(capsys, *command)
    assert not (tmp_path / "run").exists()


def test_a_part_that_is_not_there_is_found_before_anything_runs(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--data", text / "own.csv", "--text-column", "review", "--label-column", "verdict")
    model = ("--tokenizer", text / "tokenizer.json", "--experiment.checkpoint", text / "bert")
    command = ("curve", "user_text", *own, *model, "--max-tokens", "12", "--part", "test")
    before = files_of(text)
    message = refused(capsys, *command, "--out", text / "run")
    assert "part 'test' of task 'user_text' is not in" in message and "train, validation" in message
    assert files_of(text) == before
