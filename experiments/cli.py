"""The command line `codesign`: one table of commands; each is a function whose signature makes its options.

Exit status: 0, 1 (it ran and the answer is no), 2 (bad input, one line on standard error), 130 (interrupted).
"""

import contextlib
import difflib
import functools
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from codesign import __version__
from codesign.errors import CodesignError, UnknownNameError


@dataclass(frozen=True, kw_only=True)
class Command:
    """Where a command lives; its module is imported only when it runs.

    Attributes:
      summary: One line for the overview.
      module: Module of the function.
      function: Its name; it returns the exit status.
      takes_experiment: Whether the first argument names the experiment whose fields the options override.
    """

    summary: str
    module: str
    function: str
    takes_experiment: bool = False


COMMANDS = {
    "list": Command(
        summary="mechanisms, presets, tasks and experiments by name",
        module="codesign.experiments.catalog",
        function="list_names",
    ),
    "cost": Command(
        summary="latency, energy and area of a machine at three operating points",
        module="codesign.experiments.cost_report",
        function="cost_report",
    ),
    "quickstart": Command(
        summary="a dense model, a curve and a verified export, in minutes",
        module="codesign.experiments.quickstart",
        function="quickstart",
    ),
    "train": Command(
        summary="train thresholds, bits and weights under a budget",
        module="codesign.experiments.commands",
        function="train",
        takes_experiment=True,
    ),
    "evaluate": Command(
        summary="accuracy and cost of a run's integer path",
        module="codesign.experiments.commands",
        function="evaluate",
    ),
    "curve": Command(
        summary="accuracy against cost, beside dense and uniform settings",
        module="codesign.experiments.commands",
        function="curve",
        takes_experiment=True,
    ),
    "compare": Command(
        summary="every mechanism in one frame, at equal quality",
        module="codesign.experiments.compare_command",
        function="compare",
        takes_experiment=True,
    ),
    "reproduce": Command(
        summary="a published study, or how well cost model and simulators agree",
        module="codesign.experiments.reproduce",
        function="reproduce",
    ),
    "report": Command(
        summary="the table of a curve or a run",
        module="codesign.experiments.commands",
        function="report",
    ),
    "export": Command(
        summary="hardware configuration, integer weights and golden vectors of a run",
        module="codesign.experiments.deploy_commands",
        function="export",
    ),
    "verify": Command(
        summary="replay an export in the emulator and compare it with its run",
        module="codesign.experiments.deploy_commands",
        function="verify",
    ),
    "simulate": Command(
        summary="cost model against the simulator on a run's masks",
        module="codesign.experiments.deploy_commands",
        function="simulate_run",
    ),
    "validate": Command(
        summary="hardware models against other tools and published results",
        module="codesign.experiments.validate_command",
        function="validate",
    ),
    "bench": Command(
        summary="speed of the cost model and of the training step",
        module="codesign.experiments.commands",
        function="bench",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    Args:
      argv: Arguments after the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except CodesignError as error:
        print(f"codesign: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing more can be written, at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(
            f"codesign: error: '{error.filename or 'a file'}' cannot be used: {error.strerror or error}: name another path",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("codesign: interrupted; `--resume` continues a training run", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"codesign {__version__}")
        return 0
    if name not in COMMANDS:
        raise UnknownNameError(f"command `{name}` does not exist: {_hint(name, list(COMMANDS))}")
    command = COMMANDS[name]
    prefix = f"codesign {name}"
    if not command.takes_experiment:
        function = getattr(importlib.import_module(command.module), command.function)
        return _call(function, rest, prefix)
    from codesign.experiments.configs import EXPERIMENTS, experiment_by_name

    if rest and rest[0] in ("-h", "--help"):
        print(f"usage: {prefix} EXPERIMENT [OPTIONS]\n\n{command.summary}\n\nexperiments:")
        for known, function in EXPERIMENTS.items():
            print(f"  {known:12} {_first_line(function)}")
        print(f"\noptions of an experiment: {prefix} {next(iter(EXPERIMENTS))} --help")
        return 0
    if not rest or rest[0].startswith("-"):
        raise UnknownNameError(
            f"`{prefix}` needs the name of an experiment first: choose one of {', '.join(EXPERIMENTS)}"
        )
    experiment = experiment_by_name(rest[0])
    function = getattr(importlib.import_module(command.module), command.function)
    return _call(function, rest[1:], f"{prefix} {rest[0]}", experiment=experiment)


def _call(function: Callable[..., int], arguments: list[str], program: str, **defaults: Any) -> int:
    """Parses the arguments into the function's parameters and calls it."""
    import tyro

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(function, *args, **kwargs)

    def parsed() -> Callable[[], int]:
        ready: Callable[[], int] = tyro.cli(
            functools.partial(bound, **defaults) if defaults else bound,
            args=arguments,
            prog=program,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        return ready

    # The call stands outside the parser, which would take errors of the command for its own. It wraps those of settings
    # and its own in many lines: a first, silent try finds them, a second prints help.
    silent = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(silent):
            ready = parsed()
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, CodesignError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        if stop.code:
            raise CodesignError(_usage_error(silent.getvalue(), program)) from None
        ready = parsed()
    return ready()


def _usage_error(box: str, program: str) -> str:
    """Returns the parser's message, printed in parts between rules under a title, as one line."""
    parts = [""]
    for line in box.strip().splitlines()[1:]:
        text = line.strip("│╰╯ ")
        if text and not text.strip("─-"):
            parts.append("")
        else:
            parts[-1] = f"{parts[-1]} {text}".strip()
    parts = [part for part in parts if part] or ["options cannot be read"]
    message = parts[0].partition(" Got errors:")[0].rstrip(". ")
    nearest = re.search(r"Perhaps you meant: (--[\w.-]+)", " ".join(parts))
    advice = f"did you mean `{nearest[1]}`? " if nearest else ""
    return f"{message}: {advice}see `{program} --help`"


def _overview() -> str:
    lines = [f"  {name:12} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: codesign COMMAND [OPTIONS]",
            "",
            "Trains the sparsity and precision of a transformer through a model of its accelerator.",
            "",
            "commands (each has --help with units, defaults and an example):",
            *lines,
        ]
    )


def _hint(name: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean `{close[0]}`?" if close else f"use one of {', '.join(choices)}"


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
