"""Run directories: resolved settings, metrics and checkpoints, and the loop that writes them.

A run killed at any moment can be resumed, and then writes the metrics it would have written without
the interruption, times (`seconds`) excepted.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from codesign import __version__, errors
from codesign.errors import CheckpointError, RunDirectoryError
from codesign.optimize import PyTree, StepFn, TrainState
from codesign.watch import ThresholdWatch, check_finite

CONFIG = "config.json"
VERSIONS = "versions.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
CHECKPOINT_FORMAT = 2
"""Of what a checkpoint holds: leaves by path."""
MANIFEST = "manifest.json"
NUM_CHECKPOINTS = 2


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `<path>.lock` as the only process; waits for another one that does. It is freed however a process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The files of one run.

    Attributes:
      path: The directory, with `config.json`, `versions.json`, `metrics.jsonl`, `checkpoints/`.
    """

    path: Path

    @classmethod
    def create(
        cls, path: Path | str, config: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> Self:
        """Returns a run directory that is ready to be written to.

        Args:
          path: The directory; made if it does not exist.
          config: Resolved settings, of types that JSON can hold.
          resume: Continue the run that is there, if there is one.
          overwrite: Delete the run that is there, if there is one.

        Raises:
          RunDirectoryError: If the directory is in use and neither flag is given, is not a run's,
            or was made with other settings.
        """
        run = cls(Path(path).absolute())
        plain = json.loads(json.dumps(config, allow_nan=False))
        if check_directory(path, resume=resume, overwrite=overwrite):
            if resume:
                run._check_config(plain)
                return run
            shutil.rmtree(run.path.resolve())
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.path / VERSIONS, versions())
        write_json(run.path / CONFIG, plain)
        return run

    def log(self, step: int, metrics: Mapping[str, Any], seconds: float) -> None:
        """Appends one line of metrics.

        Args:
          step: Steps done.
          metrics: Finite scalars and vectors by name.
          seconds: Wall time per step.
        """
        values = {name: np.asarray(value).tolist() for name, value in sorted(metrics.items())}
        line = json.dumps({"step": step, **values, "seconds": seconds}, allow_nan=False)
        with (self.path / METRICS).open("a") as file:
            file.write(line + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the logged lines; a last line cut short by an interruption is left out.

        Raises:
          RunDirectoryError: If another line is malformed.
        """
        path = self.path / METRICS
        whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise RunDirectoryError(
                f"'{path}' has a malformed line ({error}): mend or remove that line"
            ) from error

    def save(self, step: int, tree: PyTree) -> None:
        """Writes a checkpoint and deletes all but the last two.

        It counts as one only when its manifest, written last, is in place.

        Args:
          step: Steps done; larger than that of any checkpoint here.
          tree: Pytree of arrays.
        """
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(NUM_CHECKPOINTS),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        directory = self._checkpoint(step)
        for other in directory.parent.glob("[0-9]*"):
            if other.name.isdigit() and not (other / MANIFEST).exists():  # cut short
                shutil.rmtree(other)
        with _manager(self.path / CHECKPOINTS, options) as manager:
            manager.save(step, args=ocp.args.StandardSave(_by_path(tree)), force=True)
        write_json(
            directory / MANIFEST,
            {
                "format": CHECKPOINT_FORMAT,
                "leaves": _leaves(tree),
                "files": {name: _digest(directory / name) for name in _files(directory)},
            },
        )

    def checkpoint_step(self) -> int | None:
        """Returns the number of steps done at the last complete checkpoint; None if there is none."""
        manifests = (self.path / CHECKPOINTS).glob(f"*/{MANIFEST}")
        steps = [int(path.parent.name) for path in manifests if path.parent.name.isdigit()]
        return max(steps, default=None)

    def load(self, target: PyTree) -> tuple[int, PyTree]:
        """Returns the last complete checkpoint; changes nothing.

        Args:
          target: Pytree of arrays or `jax.ShapeDtypeStruct`, of the structure, shapes and dtypes
            expected. NumPy arrays come back as NumPy arrays, all else on the default device.

        Returns:
          The number of steps done, and the tree.

        Raises:
          CheckpointError: If there is none, or it is corrupted or made by another model.
        """
        step = self.checkpoint_step()
        if step is None:
            raise CheckpointError(f"'{self.path}' has no complete checkpoint: train it first")
        directory = self._checkpoint(step)
        try:
            manifest = json.loads((directory / MANIFEST).read_text())
            saved, digests = manifest["leaves"], manifest["files"]
            version = manifest.get("format", 1)
            damaged = next((n for n in digests if _digest(directory / n) != digests[n]), None)
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged = MANIFEST
        if damaged is not None:
            raise CheckpointError(
                f"checkpoint '{directory}' is corrupted ({damaged}): delete that directory and "
                "`--resume` continues from the checkpoint before it"
            )
        if version != CHECKPOINT_FORMAT:
            raise CheckpointError(
                f"checkpoint '{directory}' is of another version of codesign (format {version}, here {CHECKPOINT_FORMAT}): "
                "use that version, or train again with `--overwrite`"
            )
        if difference := _first_difference(saved, _leaves(target)):
            raise CheckpointError(
                f"checkpoint '{directory}' is of another model: {difference}; "
                "use the settings it was made with"
            )
        with _manager(
            self.path / CHECKPOINTS, ocp.CheckpointManagerOptions(create=False)
        ) as manager:
            abstract = _by_path(jax.tree.map(_abstract, target))
            restored = manager.restore(step, args=ocp.args.StandardRestore(abstract))
        tree = jax.tree.unflatten(jax.tree.structure(target), [restored[path] for path in abstract])
        return step, jax.tree.map(_uncommitted, tree, target)

    def resume(self, target: PyTree) -> tuple[int, PyTree]:
        """Returns the last complete checkpoint, or step 0 and `target` itself if there is none.

        Metrics logged after that step are dropped.

        Args:
          target: Pytree of arrays: the state before the first step.

        Raises:
          CheckpointError: If the checkpoint is corrupted or made by another model.
        """
        step, tree = (0, target) if self.checkpoint_step() is None else self.load(target)
        kept = [line for line in self.metrics() if line["step"] <= step]
        _write_text(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        return step, tree

    def _checkpoint(self, step: int) -> Path:
        return self.path / CHECKPOINTS / str(step)

    def _check_config(self, config: dict[str, Any]) -> None:
        """Raises `RunDirectoryError` naming the first setting that differs from the run's."""
        saved = json.loads((self.path / CONFIG).read_text())
        if (key := _first_key(saved, config)) is not None:
            raise RunDirectoryError(
                f"'{self.path}' was made with another `{key}`: give it the same value to "
                "`--resume`, or choose another directory"
            )


def check_directory(path: Path | str, *, resume: bool, overwrite: bool) -> bool:
    """Checks that a run can be made in a directory; returns whether there is one, to be continued or deleted.

    Args:
      path: The directory; need not exist.
      resume: Whether the run that is there is to be continued, if there is one.
      overwrite: Whether the run that is there is to be deleted, if there is one.

    Raises:
      RunDirectoryError: If the path is of a file, or the directory is in use and neither flag is given, or is not a run's.
    """
    if resume and overwrite:
        raise RunDirectoryError("`--resume` and `--overwrite` exclude each other: give one")
    whole = Path(path).absolute()
    file = next((one for one in (whole, *whole.parents) if one.exists() and not one.is_dir()), None)
    if file is not None:
        raise RunDirectoryError(f"'{file}' is a file: give a directory")
    if not whole.exists() or not any(whole.iterdir()):
        return False
    if not resume and not overwrite:
        raise RunDirectoryError(
            f"'{path}' exists: continue it with `--resume`, delete it with `--overwrite`, or choose another directory"
        )
    if not _is_run(whole):
        raise RunDirectoryError(
            f"'{path}' is not a run directory (it lacks a sound {CONFIG} or {VERSIONS}): "
            "choose another one, or remove it by hand"
        )
    if overwrite and Path.cwd().is_relative_to(whole.resolve()):
        raise RunDirectoryError(
            f"'{path}' holds the current directory: go elsewhere to `--overwrite` it"
        )
    return True


def _is_run(path: Path) -> bool:
    """Returns whether a directory holds the two files that every run starts with."""
    with contextlib.suppress(OSError, ValueError):
        versions, config = (json.loads((path / name).read_text()) for name in (VERSIONS, CONFIG))
        return "codesign" in versions and isinstance(config, dict)
    return False


def train_loop(
    step_fn: StepFn,
    state: TrainState,
    batch_fn: Callable[[int], PyTree],
    constants: PyTree,
    *,
    start: int,
    stop: int,
    run: RunDirectory,
    checkpoint_every: int,
    log_every: int,
    progress: bool,
) -> TrainState:
    """Trains, logs and writes checkpoints; returns the last state.

    Args:
      step_fn: Compiled step; consumes `state`.
      state: State after `start` steps.
      batch_fn: Batch of a step counted from 0; a pure function, so that a resumed run sees the
        same batches.
      constants: Passed to `step_fn` and saved in checkpoints.
      start: Steps done.
      stop: Steps done at the end; a checkpoint and a line of metrics are written there too.
      run: Where to write; a checkpoint is `{"state": ..., "constants": ...}`.
      checkpoint_every: Steps between checkpoints.
      log_every: Steps between lines of metrics.
      progress: Whether to show a progress bar, if standard error is a terminal.

    Raises:
      NonFiniteError: If a metric is not finite; the step is neither logged nor saved.
      CodesignError: If a threshold is dead (`ThresholdWatch`).
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    watch = ThresholdWatch()
    with bar:
        task = bar.add_task("step", total=stop, completed=start)
        logged, logged_at = start, time.perf_counter()
        for done in range(start + 1, stop + 1):
            state, metrics = step_fn(state, batch_fn(done - 1), constants)
            check_finite(metrics, done)
            watch.observe(metrics, done)
            if done % log_every == 0 or done == stop:
                now = time.perf_counter()
                run.log(done, metrics, (now - logged_at) / (done - logged))
                logged, logged_at = done, now
            if done % checkpoint_every == 0 or done == stop:
                run.save(done, {"state": state, "constants": constants})
            bar.update(task, completed=done)
    return state


def _manager(path: Path, options: Any) -> Any:
    """Returns an Orbax manager of one pytree per step."""
    return ocp.CheckpointManager(
        path, options=options, item_handlers=ocp.StandardCheckpointHandler()
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns what Orbax is to restore: a NumPy array, or an array on the default device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
        leaf.shape, leaf.dtype, sharding=None if isinstance(leaf, np.ndarray) else device
    )


def _uncommitted(restored: Any, target: Any) -> Any:
    """Returns a restored leaf as it was before it was saved: committed to no device, so that nothing compiles twice."""
    return restored if isinstance(target, np.ndarray) else jnp.asarray(np.asarray(restored))


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by path: what a checkpoint holds, whatever is empty beside them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _leaves(tree: PyTree) -> dict[str, str]:
    """Returns dtype and shape of each leaf, by path."""
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in _by_path(tree).items()}


def _first_difference(saved: dict[str, str], expected: dict[str, str]) -> str | None:
    """Returns a phrase for the first leaf that differs; None if none does."""
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            there, here = saved.get(name, "absent"), expected.get(name, "absent")
            return f"`{name}` is {there} there and {here} here"
    return None


def _first_key(saved: Any, given: Any, prefix: str = "") -> str | None:
    """Returns the dotted name of the first setting that differs; None if none does."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in sorted(saved.keys() | given.keys()):
            name = f"{prefix}.{key}" if prefix else key
            if key not in saved or key not in given:
                return name
            if (found := _first_key(saved[key], given[key], name)) is not None:
                return found
        return None
    return None if saved == given else prefix


def _files(directory: Path) -> list[str]:
    """Returns the relative paths of all files below a directory, sorted."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path.relative_to(directory).as_posix() for path in files)


def _digest(path: Path) -> str | None:
    """Returns the SHA-256 of a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _write_text(path: Path, text: str) -> None:
    """Writes a file in one step: it holds either its old or its new text, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one step."""
    _write_text(path, json.dumps(value, indent=2) + "\n")


def versions() -> dict[str, str | None]:
    """Returns what a result may depend on besides its settings."""
    libraries = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "codesign": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def _commit() -> str | None:
    """Returns the commit of the checkout this package runs from, `-dirty` if changed; None if there is none."""
    package = Path(errors.__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
