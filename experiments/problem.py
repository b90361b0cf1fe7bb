"""A task, its trained dense model and a machine: what every training run, curve and evaluation starts from."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from codesign.calibration import Calibration, floored, merge
from codesign.errors import CodesignError, UnknownNameError
from codesign.experiments.configs import Experiment, vision_config
from codesign.experiments.data import Examples, Task, batch_indices, load_task, shifted
from codesign.experiments.run import RunDirectory, train_loop
from codesign.gates import Relaxation
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.spec import AcceleratorSpec, load_preset
from codesign.mechanisms import MECHANISMS, Mechanism, mechanism_by_name
from codesign.models import vit
from codesign.models.config import VisionConfig
from codesign.models.parameters import init_params
from codesign.optimize import LossAux, OptimizeSettings, init_state, make_train_step
from codesign.policy import Policy

FLOAT_CHUNK = 256
"""Examples per call of the compiled float path."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """An experiment with everything loaded.

    Attributes:
      experiment: The settings.
      task: The data.
      config: The model.
      mechanism: The mechanism attached to the model.
      spec: The machine as its file states it.
      accelerator: The machine for the cost model.
      train: Training images with their shifts.
      params: Parameters of the trained dense model.
      teacher: Logits of the dense model on `train`, `[N, classes]`.
    """

    experiment: Experiment
    task: Task
    config: VisionConfig
    mechanism: Mechanism
    spec: AcceleratorSpec
    accelerator: Accelerator
    train: Examples
    params: dict[str, Any]
    teacher: NDArray[np.float32]

    @property
    def calibration_pixels(self) -> NDArray[np.int32]:
        """The fixed images that measure ranges and start thresholds: the first of the training part."""
        return self.task.parts["train"].pixels[: self.experiment.num_calibration]

    @property
    def num_rounds(self) -> int:
        """Rounds of the mechanism's filter; 0 if it has no thresholds."""
        knobs = self.mechanism.knobs(1, 1)
        return knobs["threshold"].shape[-1] if "threshold" in knobs else 0


@functools.partial(jax.jit, static_argnames="config")
def float_path(
    params: dict[str, Any], pixels: jax.Array, config: VisionConfig
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """Returns logits `[B, classes]` and absolute maxima of the model in plain floating point."""
    output = vit.apply(
        params,
        None,
        None,
        pixels,
        config=config,
        mechanism=MECHANISMS["dense"],
        relaxation=None,
    )
    return output.logits, output.observed


def chunks(pixels: NDArray[np.int32], size: int) -> list[tuple[NDArray[np.int32], int]]:
    """Returns the images in chunks of exactly `size` (the last one repeats its first image) with their true lengths."""
    parts = []
    for start in range(0, len(pixels), size):
        part = pixels[start : start + size]
        fill = np.broadcast_to(part[:1], (size - len(part), *part.shape[1:]))
        parts.append((np.concatenate([part, fill]), len(part)))
    return parts


def float_logits(
    params: dict[str, Any], pixels: NDArray[np.int32], config: VisionConfig
) -> NDArray[np.float32]:
    """Returns the logits of the model in plain floating point, `[N, classes]`."""
    return np.concatenate(
        [
            np.asarray(float_path(params, part, config)[0])[:length]
            for part, length in chunks(pixels, FLOAT_CHUNK)
        ]
    )


def calibrate(
    params: dict[str, Any], pixels: NDArray[np.int32], config: VisionConfig
) -> Calibration:
    """Returns the absolute maxima over all of `pixels`, measured in plain floating point."""
    measured = []
    for part, _ in chunks(pixels, FLOAT_CHUNK):
        observed = float_path(params, part, config)[1]
        measured.append(Calibration(layers=observed["layers"], ends=observed["ends"]))
    return floored(functools.reduce(merge, measured))


def outline(experiment: Experiment) -> Problem:
    """Returns the problem without its dense model (`params` and `teacher` are empty): enough to check settings.

    Raises:
      CodesignError: If a name, a file, the data or a size of the model is wrong, or settings do not fit each other.
    """
    mechanism = mechanism_by_name(experiment.mechanism)
    spec = load_preset(experiment.preset)
    if mechanism.name not in (spec.mechanism, "dense"):
        raise UnknownNameError(
            f"preset `{experiment.preset}` runs `{spec.mechanism}`, not `{mechanism.name}`: "
            "choose a preset made for the mechanism"
        )
    task = load_task(experiment.task)
    try:
        config = vision_config(task, experiment.model)
    except ValueError as error:
        raise CodesignError(f"`experiment.model`: {error}: correct that size") from error
    outlined = Problem(
        experiment=experiment,
        task=task,
        config=config,
        mechanism=mechanism,
        spec=spec,
        accelerator=accelerator_from_spec(spec),
        train=task.parts["train"],
        params={},
        teacher=np.zeros((0, task.num_classes), np.float32),
    )
    rounds = outlined.num_rounds
    if rounds and len(experiment.start_kept) != rounds:
        raise CodesignError(
            f"`experiment.start_kept` must have one entry for each of the {rounds} rounds of `{mechanism.name}`, "
            f"got {experiment.start_kept}: give {rounds}"
        )
    return outlined


def load_problem(
    experiment: Experiment, *, cache: Path, progress: bool, restart: bool = False
) -> Problem:
    """Returns the problem of an experiment; trains its dense model unless the cache holds it.

    Args:
      experiment: Settings; checked before anything runs.
      cache: Folder that holds dense models, one run directory each.
      progress: Whether to show a progress bar.
      restart: Whether to train the dense model even if the cache holds it.

    Raises:
      CodesignError: As `outline` does.
    """
    outlined = outline(experiment)
    task, config = outlined.task, outlined.config
    train = shifted(task.parts["train"], reach=experiment.reach)
    params = dense_params(experiment, task, config, train, cache, progress, restart)
    return dataclasses.replace(
        outlined, train=train, params=params, teacher=float_logits(params, train.pixels, config)
    )


def dense_params(
    experiment: Experiment,
    task: Task,
    config: VisionConfig,
    train: Examples,
    cache: Path,
    progress: bool,
    restart: bool,
) -> dict[str, Any]:
    """Returns the parameters of the dense model, from the cache or by training them (resuming if interrupted)."""
    settings = {
        "task": task.name,
        "model": dataclasses.asdict(experiment.model),
        "dense": dataclasses.asdict(experiment.dense),
        "reach": experiment.reach,
        "seed": experiment.seed,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = cache / f"dense-{task.name}-{digest}"
    run = RunDirectory.create(
        path, settings, resume=path.exists() and not restart, overwrite=restart and path.exists()
    )
    dense = experiment.dense
    optimize = OptimizeSettings(
        train=("params",),
        num_steps=dense.num_steps,
        hardened_fraction=0.0,
        weight_rate=dense.rate,
        weight_decay=dense.weight_decay,
    )
    params = init_params(config.structure, key=jax.random.key(experiment.seed))
    state = init_state(params, Policy(layers={}, ends={}), optimize, 1)
    constants: dict[str, Any] = {}
    start, saved = run.resume({"state": state, "constants": constants})
    if start < dense.num_steps:

        def loss_fn(
            params: dict[str, Any],
            policy: Policy,
            batch: dict[str, jax.Array],
            constants: dict[str, Any],
            relaxation: Relaxation,
        ) -> tuple[jax.Array, LossAux]:
            del policy, constants, relaxation
            output = vit.apply(
                params,
                None,
                None,
                batch["pixels"],
                config=config,
                mechanism=MECHANISMS["dense"],
                relaxation=None,
            )
            targets = optax.smooth_labels(
                jax.nn.one_hot(batch["labels"], task.num_classes), dense.label_smoothing
            )
            losses = optax.losses.softmax_cross_entropy(output.logits, targets)
            accuracy = jnp.mean(jnp.argmax(output.logits, -1) == batch["labels"])
            return jnp.mean(losses), LossAux(terms={"accuracy": accuracy}, workload=None)

        def batch_fn(step: int) -> dict[str, NDArray[np.int32]]:
            chosen = batch_indices(len(train), dense.batch_size, step, experiment.seed)
            return {"pixels": train.pixels[chosen], "labels": train.labels[chosen]}

        saved["state"] = train_loop(
            make_train_step(loss_fn, no_cost, optimize),
            saved["state"],
            batch_fn,
            constants,
            start=start,
            stop=dense.num_steps,
            run=run,
            checkpoint_every=max(1, dense.num_steps // 4),
            log_every=max(1, dense.num_steps // 20),
            progress=progress,
        )
    trained: dict[str, Any] = saved["state"].params
    return trained


def no_cost(workload: Any, constants: Any, smoothness: jax.Array) -> jax.Array:
    """Returns one cost that always equals its budget: nothing is constrained (a checkpoint holds no empty arrays)."""
    del workload, constants, smoothness
    return jnp.ones((1,))
