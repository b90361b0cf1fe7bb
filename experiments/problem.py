"""A task, its trained dense model and a machine: what every training run, curve and evaluation starts from."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from codesign.errors import CodesignError, UnknownNameError
from codesign.experiments.batches import TrainingBatches
from codesign.experiments.configs import Experiment
from codesign.experiments.data import Examples, Task
from codesign.experiments.model_choice import ChosenModel, choose_model
from codesign.experiments.run import CHECKPOINT_FORMAT, RunDirectory, locked, train_loop
from codesign.experiments.tasks import load_task
from codesign.experiments.teacher import Teacher
from codesign.gates import Relaxation
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.capacity import check_capacities
from codesign.hw.sizing import size_ranges
from codesign.hw.spec import AcceleratorSpec, load_preset
from codesign.mechanisms import MECHANISMS, Mechanism, dense_beside, mechanism_by_name
from codesign.models.config import ModelConfig
from codesign.models.model import apply
from codesign.optimize import LossAux, OptimizeSettings, init_state, make_train_step
from codesign.policy import Policy


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
      params: Parameters of the trained dense model; empty in an outline.
      teacher: Its outputs.
      notes: What was done so that checkpoint, task and settings fit each other.
    """

    experiment: Experiment
    task: Task
    config: ModelConfig
    mechanism: Mechanism
    spec: AcceleratorSpec
    accelerator: Accelerator
    params: dict[str, Any]
    teacher: Teacher
    notes: tuple[str, ...] = ()

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths to which token sequences are padded, rising; empty for images."""
        return self.experiment.buckets_of(self.task)

    @property
    def machine_mechanism(self) -> Mechanism:
        """The mechanism that the machine was made for; the problem's own may be `dense`."""
        return mechanism_by_name(self.spec.mechanism)

    @property
    def calibration_examples(self) -> Examples:
        """The fixed examples that measure ranges and start thresholds: the first of the training part."""
        return self.task.part("train").first(self.experiment.num_calibration)

    def batches(self, batch_size: int, seed: int) -> TrainingBatches:
        """Returns the training batches of a seed."""
        return TrainingBatches(
            self.task.part("train"),
            batch_size=batch_size,
            buckets=self.buckets,
            seed=seed,
            reach=self.experiment.reach,
        )


def outline(experiment: Experiment) -> Problem:
    """Returns the problem without its dense model (`params` are empty): enough to check settings.

    Raises:
      CodesignError: If a name, a file, the data or a size of the model is wrong, or settings do not fit each other.
    """
    return _outline(experiment)[0]


def _outline(experiment: Experiment) -> tuple[Problem, ChosenModel]:
    mechanism = mechanism_by_name(experiment.mechanism)
    spec = load_preset(experiment.preset)
    if mechanism.name == "dense":
        mechanism = dense_beside(mechanism_by_name(spec.mechanism))
    if mechanism.name not in (spec.mechanism, "dense"):
        raise UnknownNameError(
            f"preset `{experiment.preset}` runs `{spec.mechanism}`, not `{mechanism.name}`: "
            "choose a preset made for the mechanism"
        )
    data = experiment.data
    if data.tokenizer is None and experiment.checkpoint is not None:
        data = dataclasses.replace(data, tokenizer=experiment.checkpoint)
    task = load_task(experiment.task, data)
    chosen = choose_model(task, experiment)
    structure = chosen.config.structure
    check_capacities(spec, head_dim=structure.head_dim, width=structure.width)
    size_ranges(spec)
    scale, kept = mechanism.thresholds, experiment.start_kept
    if scale is not None and kept and len(kept) != len(scale.names):
        raise CodesignError(
            f"`experiment.start_kept` must have one entry for each of {', '.join(scale.names)} of "
            f"`{mechanism.name}`, got {kept}: give {len(scale.names)}, or none for its own"
        )
    num_training = len(task.part("train"))
    asked = {"batch_size": experiment.batch_size, "num_calibration": experiment.num_calibration}
    more = tuple(
        f"settings: `experiment.{name}` {count} is more than the {num_training} training examples: all are used"
        for name, count in asked.items()
        if count > num_training
    )
    outlined = Problem(
        experiment=experiment,
        task=task,
        config=chosen.config,
        mechanism=mechanism,
        spec=spec,
        accelerator=accelerator_from_spec(spec),
        params={},
        teacher=Teacher({}, chosen.config),
        notes=tuple(f"checkpoint: {note}" for note in chosen.notes) + more,
    )
    return outlined, chosen


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
    outlined, chosen = _outline(experiment)
    params = dense_params(outlined, chosen, cache, progress, restart)
    return dataclasses.replace(outlined, params=params, teacher=Teacher(params, outlined.config))


def task_loss(
    logits: jax.Array, batch: dict[str, jax.Array], label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """Returns mean cross-entropy, nats, and mean accuracy over examples, or over the tokens of a decoder that exist.

    Args:
      logits: `[B, C]` or `[B, T, C]`.
      batch: `labels` `[B]` or `[B, T]`; `valid` `[B, T]` with tokens.
      label_smoothing: Probability mass moved from the label to all classes.
    """
    targets = optax.smooth_labels(
        jax.nn.one_hot(batch["labels"], logits.shape[-1]), label_smoothing
    )
    losses = optax.losses.softmax_cross_entropy(logits, targets)
    is_right = (jnp.argmax(logits, -1) == batch["labels"]).astype(losses.dtype)
    return mean_loss(losses, batch), mean_loss(is_right, batch)


def mean_loss(losses: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the mean of losses `[B]`, or of `[B, T]` over tokens that exist."""
    if losses.ndim == 1:
        return jnp.mean(losses)
    exists = batch["valid"].astype(losses.dtype)
    return jnp.sum(losses * exists) / jnp.sum(exists)


def contents_digest(tree: Any) -> str:
    """Returns a digest of the names, shapes and values of a tree's arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def dense_params(
    problem: Problem, chosen: ChosenModel, cache: Path, progress: bool, restart: bool
) -> dict[str, Any]:
    """Returns the parameters of the dense model, from the cache or by training them (resuming if interrupted).

    Without steps they are those of the checkpoint.
    """
    experiment, dense = problem.experiment, problem.experiment.dense
    params = chosen.params(jax.random.key(experiment.seed))
    if dense.num_steps == 0:
        return params
    settings = {
        "task": problem.task.name,
        "data": problem.task.part("train").digest(),
        "model": dataclasses.asdict(experiment.model),
        "checkpoint": None if experiment.checkpoint is None else contents_digest(params),
        "dense": dataclasses.asdict(dense),
        "buckets": problem.buckets,
        "reach": experiment.reach,
        "seed": experiment.seed,
        "format": CHECKPOINT_FORMAT,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = cache / f"dense-{problem.task.name}-{digest}"
    # Two curves of one cache would write one another's checkpoints.
    with locked(path):
        return _trained_dense(problem, params, path, settings, progress, restart)


def _trained_dense(
    problem: Problem,
    params: dict[str, Any],
    path: Path,
    settings: dict[str, Any],
    progress: bool,
    restart: bool,
) -> dict[str, Any]:
    """Returns the parameters that the run directory `path` holds, after training them there as far as they are not."""
    dense, seed = problem.experiment.dense, problem.experiment.seed
    run = RunDirectory.create(
        path, settings, resume=path.exists() and not restart, overwrite=restart and path.exists()
    )
    optimize = OptimizeSettings(
        train=("params",),
        num_steps=dense.num_steps,
        hardened_fraction=0.0,
        weight_rate=dense.rate,
        weight_decay=dense.weight_decay,
    )
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
            output = apply(
                params,
                None,
                None,
                batch,
                config=problem.config,
                mechanism=MECHANISMS["dense"],
                relaxation=None,
            )
            loss, accuracy = task_loss(output.logits, batch, dense.label_smoothing)
            return loss, LossAux(terms={"accuracy": accuracy}, workload=None)

        batches = problem.batches(dense.batch_size, seed)
        saved["state"] = train_loop(
            make_train_step(loss_fn, no_cost, optimize),
            saved["state"],
            batches.batch,
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
