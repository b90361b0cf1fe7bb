import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.errors import CheckpointError, NonFiniteError, RunDirectoryError
from codesign.experiments.run import CHECKPOINTS, CONFIG, METRICS, RunDirectory, locked, train_loop
from codesign.gates import Relaxation
from codesign.optimize import LossAux, OptimizeSettings, TrainState, init_state, make_train_step
from codesign.policy import Policy, dense_knobs

SETTINGS = OptimizeSettings(num_steps=12, hardened_fraction=0.25)
CONFIG_VALUES: dict[str, Any] = {"task": "toy", "optimize": {"num_steps": 12, "rates": (0.1, 0.2)}}


def loss_fn(
    params: Any, policy: Policy, batch: Any, constants: Any, relaxation: Relaxation
) -> tuple[jax.Array, LossAux]:
    kept = jax.nn.sigmoid(-policy.layers["threshold"] / relaxation.temperature)
    bits = policy.layers["qkv.weight_bits"]
    loss = jnp.mean(jnp.square(params["weight"] - batch)) + jnp.mean(4.0**-bits) - jnp.mean(kept)
    return loss, LossAux(terms={"kept": jnp.mean(kept)}, workload=jnp.mean(kept) * jnp.mean(bits))


def cost_fn(workload: Any, constants: Any, smoothness: jax.Array) -> jax.Array:
    return jnp.reshape(workload, (1,)) / constants["budget"][None]


def batch_fn(step: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (2, 3))


STEP_FN = make_train_step(loss_fn, cost_fn, SETTINGS)
CONSTANTS = {"budget": np.asarray(2.0, np.float32)}


def initial_state(width: int = 3) -> TrainState:
    knobs = dense_knobs(2, linear_bits=7.5, attention_bits=15.5, end_sites=("embed", "head"))
    policy = knobs.replace(layers=knobs.layers | {"threshold": jnp.zeros((2, 2, 1))})
    return init_state({"weight": jnp.ones((2, width))}, policy, SETTINGS, num_constraints=1)


def target(width: int = 3) -> dict[str, Any]:
    return {"state": initial_state(width), "constants": CONSTANTS}


def open_run(path: Path, **flags: bool) -> RunDirectory:
    options = {"resume": False, "overwrite": False} | flags
    return RunDirectory.create(path, CONFIG_VALUES, **options)


def train(path: Path, *, stop: int = 12, **flags: bool) -> TrainState:
    run = open_run(path, **flags)
    start, tree = run.resume(target())
    return train_loop(
        STEP_FN,
        tree["state"],
        batch_fn,
        tree["constants"],
        start=start,
        stop=stop,
        run=run,
        checkpoint_every=3,
        log_every=2,
        progress=True,
    )


def untimed(path: Path) -> list[dict[str, Any]]:
    lines = RunDirectory(path).metrics()
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """A run of 12 steps without interruption, and its last state; not to be changed."""
    path = tmp_path_factory.mktemp("finished") / "run"
    return path, train(path)


@pytest.fixture
def copied(finished: tuple[Path, TrainState], tmp_path: Path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "copied")


def test_files_of_a_run(finished: tuple[Path, TrainState]) -> None:
    path, state = finished
    assert json.loads((path / CONFIG).read_text())["optimize"]["rates"] == [0.1, 0.2]
    versions = json.loads((path / "versions.json").read_text())
    assert {"codesign", "commit", "python", "platform", "jax", "flax", "optax"} <= versions.keys()
    assert [line["step"] for line in untimed(path)] == [2, 4, 6, 8, 10, 12]
    assert RunDirectory(path).checkpoint_step() == 12
    step, tree = RunDirectory(path).load(target())
    assert step == 12
    chex.assert_trees_all_equal(tree["state"], state)
    assert isinstance(tree["constants"]["budget"], np.ndarray)
    assert sorted(p.name for p in (path / CHECKPOINTS).iterdir()) == ["12", "9"]


@pytest.mark.parametrize("interrupted_after", [2, 7, 10])
def test_interrupted_and_resumed_equals_uninterrupted(
    finished: tuple[Path, TrainState], tmp_path: Path, interrupted_after: int
) -> None:
    calls = 0

    def interrupting(state: TrainState, batch: Any, constants: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > interrupted_after:
            raise KeyboardInterrupt
        return STEP_FN(state, batch, constants)

    run = open_run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train_loop(
            interrupting,
            initial_state(),
            batch_fn,
            CONSTANTS,
            start=0,
            stop=12,
            run=run,
            checkpoint_every=3,
            log_every=2,
            progress=False,
        )
    with (run.path / METRICS).open("a") as file:
        file.write('{"step": 8, "tas')  # a line cut short
    state = train(run.path, resume=True)
    assert untimed(run.path) == untimed(finished[0])
    chex.assert_trees_all_equal(state, finished[1])


# Runs in another process: trains, and kills itself at a chosen moment of the checkpoint at step 9.
KILLED = """
    import os, signal, sys
    from pathlib import Path
    import jax
    jax.config.update("jax_numpy_rank_promotion", "raise")
    sys.path.insert(0, sys.argv[1])
    import test_run
    path, moment, num = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    def kill(event, arguments):
        global num
        where = str(arguments[0]) if arguments else ""
        if event == moment and f"{path}/checkpoints/9" in where:
            num -= 1
            if num == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(kill)
    test_run.train(path)
"""


@pytest.mark.parametrize(
    ("moment", "num", "last_complete"),
    [
        ("open", 4, 6),  # in the middle of writing
        ("os.rename", 2, 6),  # written, not yet in place
        ("os.rename", 3, 6),  # in place; the manifest is not
    ],
)
def test_killed_during_a_checkpoint(
    finished: tuple[Path, TrainState], tmp_path: Path, moment: str, num: int, last_complete: int
) -> None:
    path = tmp_path / "run"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(Path(__file__).parent), str(path)]
    killed = subprocess.run([*command, moment, str(num)], env=os.environ, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any(p.name.startswith("9") for p in (path / CHECKPOINTS).iterdir())
    assert RunDirectory(path).checkpoint_step() == last_complete
    state = train(path, resume=True)
    assert untimed(path) == untimed(finished[0])
    chex.assert_trees_all_equal(state, finished[1])
    assert sorted(p.name for p in (path / CHECKPOINTS).iterdir()) == ["12", "9"]


@pytest.mark.parametrize("damage", ["truncated", "one bit", "removed"])
@pytest.mark.parametrize("name", ["manifest.json", "_METADATA", "manifest.ocdbt"])
def test_corrupted_checkpoint(copied: Path, damage: str, name: str) -> None:
    directory = copied / CHECKPOINTS / "12"
    file = next(p for p in sorted(directory.rglob(name)))
    content = bytearray(file.read_bytes())
    match damage:
        case "truncated":
            file.write_bytes(content[: len(content) // 2])
        case "one bit":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "removed":
            file.unlink()
    run = RunDirectory(copied)
    if name == "manifest.json" and damage == "removed":  # an interrupted save looks like this
        assert run.checkpoint_step() == 9
        return
    before = untimed(copied)
    with pytest.raises(CheckpointError, match="12' is (corrupted|of another)") as error:
        run.resume(target())
    assert "\n" not in str(error.value)
    assert untimed(copied) == before
    shutil.rmtree(directory)
    assert run.resume(target())[0] == 9
    assert [line["step"] for line in untimed(copied)] == [2, 4, 6, 8]


def test_checkpoint_of_another_model(finished: tuple[Path, TrainState]) -> None:
    run = RunDirectory(finished[0])
    with pytest.raises(CheckpointError, match=r"`state\.opt.* is float32\[2, 3\] there and float3"):
        run.load(target(width=4))
    with pytest.raises(CheckpointError, match=r"`constants\.limit` is absent there"):
        run.load(target() | {"constants": CONSTANTS | {"limit": jnp.zeros(2)}})


def test_missing_checkpoint(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run.load(target())
    given = target()
    assert run.resume(given) == (0, given)


def test_existing_directory_is_refused_and_left_alone(copied: Path) -> None:
    before = sorted(copied.rglob("*"))
    with pytest.raises(RunDirectoryError, match="`--resume`.*`--overwrite`"):
        open_run(copied)
    with pytest.raises(RunDirectoryError, match="exclude each other"):
        open_run(copied, resume=True, overwrite=True)
    with pytest.raises(RunDirectoryError, match="another `optimize.num_steps`"):
        changed = {"task": "toy", "optimize": {"num_steps": 13, "rates": [0.1, 0.2]}}
        RunDirectory.create(copied, changed, resume=True, overwrite=False)
    with pytest.raises(RunDirectoryError, match="another `seed`"):
        RunDirectory.create(copied, CONFIG_VALUES | {"seed": 1}, resume=True, overwrite=False)
    assert sorted(copied.rglob("*")) == before


def test_overwrite_deletes_runs_only(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    open_run(other)  # an empty directory is as good as none
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / CONFIG).write_text("{}")
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        open_run(stranger, overwrite=True)
    with pytest.raises(RunDirectoryError, match="is a file: give a directory"):
        open_run(stranger / CONFIG, overwrite=True)
    assert (stranger / CONFIG).read_text() == "{}"
    with monkeypatch.context() as patch:
        patch.chdir(copied / CHECKPOINTS)
        with pytest.raises(RunDirectoryError, match="holds the current directory"):
            open_run(copied, overwrite=True)
    run = open_run(copied, overwrite=True)
    assert run.checkpoint_step() is None and run.metrics() == []


def test_non_finite_step_is_not_saved(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    with pytest.raises(NonFiniteError, match="`task` is nan at step 3"):
        train_loop(
            STEP_FN,
            initial_state(),
            lambda step: batch_fn(step) * (jnp.nan if step == 2 else 1.0),
            CONSTANTS,
            start=0,
            stop=12,
            run=run,
            checkpoint_every=1,
            log_every=1,
            progress=False,
        )
    assert run.checkpoint_step() == 2
    assert [line["step"] for line in run.metrics()] == [1, 2]


def test_malformed_metrics(copied: Path) -> None:
    text = (copied / METRICS).read_text()
    (copied / METRICS).write_text("{\n" + text)
    with pytest.raises(RunDirectoryError, match="malformed line"):
        RunDirectory(copied).metrics()


def test_a_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with locked(tmp_path / "cache" / "dense"):
            order.append("second")

    other = threading.Thread(target=second)
    with locked(tmp_path / "cache" / "dense"):
        other.start()
        other.join(timeout=0.2)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
