"""What the documents promise: the README's example runs, and every command that they name exists with its options."""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from codesign.experiments.cli import COMMANDS, main
from codesign.experiments.configs import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[1]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MAX_EXAMPLE_LINES = 20
PLACEHOLDER = re.compile(r"[A-Z]+")


def blocks(text: str, language: str) -> list[str]:
    return [code for name, code in FENCED.findall(text) if name == language]


def commands(text: str) -> list[str]:
    """Returns every command line in code: spans, which may be broken over lines, and lines of blocks."""
    lines = [line for _, code in FENCED.findall(text) for line in code.splitlines()]
    prose = FENCED.sub("", text)
    lines += re.findall(r"^ {4}(.*)$", prose, re.MULTILINE)
    lines += re.findall(r"`([^`]+)`", prose)
    stripped = (" ".join(line.split()) for line in lines)
    return [line for line in stripped if line.startswith("codesign ")]


def help_of(*arguments: str) -> str:
    """Returns the help text of a command; fails if there is none."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        assert main([*arguments, "--help"]) == 0
    return output.getvalue()


def fault(line: str) -> str | None:
    """Returns what is wrong with a command line; None if nothing is."""
    _, name, *rest = shlex.split(line, comments=True)
    if name == "COMMAND":
        return None if rest == ["--help"] else "only --help goes with any command"
    if name.startswith("--"):
        return None if name in ("--help", "--version") else "no such option"
    if name not in COMMANDS:
        return "no such command"
    experiment = []
    if COMMANDS[name].takes_experiment:
        if not rest or not (rest[0] in EXPERIMENTS or PLACEHOLDER.fullmatch(rest[0])):
            return "an experiment must come first"
        experiment = [next(iter(EXPERIMENTS))]
    text = help_of(name, *experiment)
    for word in rest:
        option = word.partition("=")[0]
        if option.startswith("--") and not re.search(rf"{re.escape(option)}(?![\w.-])", text):
            return f"no option {option}"
    return None


def test_example_of_the_readme_runs(tmp_path: Path) -> None:
    # The longer example is a file of its own, which test_own_model.py runs.
    shown = (ROOT / "examples" / "own_model.py").read_text()
    examples = blocks((ROOT / "README.md").read_text(), "python")
    assert shown in examples, "README.md does not show examples/own_model.py as it is"
    examples.remove(shown)
    assert examples, "README.md has no other ```python block"
    for code in examples:
        assert len([line for line in code.splitlines() if line.strip()]) <= MAX_EXAMPLE_LINES
    # With the code that users' programs compile to: it trains a model of its full size.
    environment = os.environ | {"XLA_FLAGS": "", "TMPDIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(examples)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    for quantity in ("accuracy", "cycles", "J"):
        assert quantity in found.stdout


@pytest.mark.parametrize("name", ["dense_layers", "dense_mapper", "validation"])
def test_examples_of_the_documents_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks((ROOT / "docs" / f"{name}.md").read_text(), "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= MAX_EXAMPLE_LINES
    exec(compile(code, f"docs/{name}.md", "exec"), {"__name__": "__main__"})
    assert re.search(r"\d", capsys.readouterr().out)


def test_commands_of_the_documents_exist() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = {path.name: commands(path.read_text()) for path in documents}
    assert found["README.md"] and found["command_line.md"]
    faults = {
        f"{name}: {line}": what
        for name, lines in found.items()
        for line in lines
        if (what := fault(line)) is not None
    }
    assert not faults
    described = {shlex.split(line)[1] for line in found["command_line.md"]}
    assert described - {"COMMAND"} == set(COMMANDS)


def test_faulty_commands_are_found_out() -> None:
    text = "`codesign nope`, `codesign train --out\nx`, `codesign list --jso`\n```sh\ncodesign bench # x\n```\n"
    assert {line: fault(line) for line in commands(text)} == {
        "codesign bench # x": None,
        "codesign nope": "no such command",
        "codesign train --out x": "an experiment must come first",
        "codesign list --jso": "no option --jso",
    }


def test_tables_of_results_are_those_of_the_records():
    """What `python docs/update_tables.py` would write is what stands there."""
    script = runpy.run_path(str(ROOT / "docs" / "update_tables.py"))
    texts = [(ROOT / "docs" / name).read_text() for name in script["DOCUMENTS"]]
    assert [script["updated"](text) for text in texts] == texts
    written = {name for text in texts for _, _, name, _ in script["MARKED"].findall(text)}
    assert written == {path.stem for path in (ROOT / "docs" / "results").glob("*.json")}
