"""Which model fits which task: sizes, pretrained checkpoints, and what does not fit."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_experiment import MAX_TOKENS, VOCABULARY, made_up_task, tiny, untrained

from codesign.errors import CodesignError, RunDirectoryError
from codesign.experiments.checkpoints import load_checkpoint
from codesign.experiments.configs import Experiment, ModelSettings
from codesign.experiments.data import ImageInput, Task
from codesign.experiments.dense_cost import DenseCost
from codesign.experiments.evaluate import costs_of
from codesign.experiments.finished import check_data, record_data
from codesign.experiments.model_choice import choose_model, model_shape, sized_config
from codesign.experiments.problem import contents_digest, dense_params
from codesign.hw.closed_form import Setting, workload_from_fractions
from codesign.hw.surrogate import SCOPES
from codesign.structure import PatchInput, TokenInput

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
MODEL = ModelSettings(
    num_layers=3, num_heads=2, head_dim=4, width=8, hidden=16, patch_size=4, stride=2, padding=1
)


def test_sizes_make_a_model_for_every_kind_of_task() -> None:
    images, text, decoder = (
        sized_config(made_up_task(kind), MODEL) for kind in ("images", "text", "decoder")
    )
    for config in (images, text, decoder):
        shape = config.structure
        assert (shape.num_layers, shape.num_heads, shape.head_dim) == (3, 2, 4)
        assert (shape.width, shape.hidden, shape.norm, shape.mechanism) == (8, 16, "pre", "dense")
    # 8 pixels with 1 of padding on both sides: windows of 4 start at 0, 2, 4, 6.
    patches = images.structure.input
    assert isinstance(patches, PatchInput) and patches.grid_size == 4
    assert (images.pixel_offset, images.pixel_scale) == (8, 1 / 8)
    words = TokenInput(vocabulary_size=VOCABULARY, max_tokens=MAX_TOKENS)
    assert text.structure.input == decoder.structure.input == words
    assert (text.pixel_offset, text.pixel_scale) == (0, 1.0)
    kinds = [(one.structure.is_causal, one.structure.pooling) for one in (images, text, decoder)]
    assert kinds == [(False, "mean"), (False, "mean"), (True, "all")]
    outputs = [one.structure.num_outputs for one in (images, text, decoder)]
    assert outputs == [3, 3, VOCABULARY]


def test_a_size_that_does_not_fit_is_named() -> None:
    experiment = Experiment(model=dataclasses.replace(MODEL, patch_size=11))
    with pytest.raises(CodesignError, match="`experiment.model`: `patch_size` must fit"):
        choose_model(made_up_task("images"), experiment)


def text_task(kind: str, **changes: Any) -> Task:
    task = made_up_task(kind)
    return dataclasses.replace(task, input=dataclasses.replace(task.input, **changes))


def experiment_on(checkpoint: str, seed: int = 0) -> Experiment:
    return dataclasses.replace(tiny(), checkpoint=str(GOLDEN / checkpoint), seed=seed)


@pytest.mark.parametrize("name", ["bert", "distilbert-classifier"])
def test_a_checkpoint_gets_a_head_of_the_tasks_size(name: str) -> None:
    task = dataclasses.replace(made_up_task("text"), num_outputs=7)
    chosen, other = (choose_model(task, experiment_on(name, seed)) for seed in (0, 1))
    assert chosen.config == other.config and chosen.config.structure.num_outputs == 7
    params, different = (one.params(jax.random.key(0)) for one in (chosen, other))
    head = params.pop("head")["kernel"]
    assert head.shape == (chosen.config.structure.width, 7)
    assert np.any(head != different.pop("head")["kernel"])  # that of another seed
    jax.tree.map(np.testing.assert_array_equal, params, different)


def test_a_checkpoint_keeps_a_head_that_fits() -> None:
    own = load_checkpoint(GOLDEN / "gpt2")
    vocabulary = own.config.structure.num_outputs
    task = dataclasses.replace(
        text_task("decoder", vocabulary_size=vocabulary), num_outputs=vocabulary
    )
    chosen = choose_model(task, experiment_on("gpt2"))
    assert chosen.config == own.config
    jax.tree.map(np.testing.assert_array_equal, chosen.params(jax.random.key(5)), own.params)


@pytest.mark.parametrize(
    ("task", "checkpoint", "message"),
    [
        (dataclasses.replace(made_up_task("text"), num_outputs=7), "bert", "has no head"),
        (made_up_task("text"), None, "has to be trained"),
    ],
)
def test_only_a_fine_tuned_checkpoint_needs_no_training(
    task: Task, checkpoint: str | None, message: str
) -> None:
    experiment = experiment_on("bert") if checkpoint else tiny()
    untouched = dataclasses.replace(experiment.dense, num_steps=0)
    with pytest.raises(CodesignError, match=f"{message}.*num_steps` must be at least 1"):
        choose_model(task, dataclasses.replace(experiment, dense=untouched))


def test_a_checkpoint_of_other_classes_needs_training() -> None:
    name = "distilbert-classifier"
    labels = load_checkpoint(GOLDEN / name).labels
    assert labels is not None
    task = dataclasses.replace(
        made_up_task("text"), num_outputs=len(labels), classes=tuple(reversed(labels))
    )
    untouched = dataclasses.replace(experiment_on(name).dense, num_steps=0)
    experiment = dataclasses.replace(experiment_on(name), dense=untouched)
    with pytest.raises(CodesignError, match="in this order.*must be at least 1"):
        choose_model(task, experiment)
    chosen = choose_model(dataclasses.replace(task, classes=labels), experiment)
    problem = dataclasses.replace(untrained("text"), experiment=experiment, config=chosen.config)
    params = dense_params(problem, chosen, Path("unused"), progress=False, restart=False)
    jax.tree.map(np.testing.assert_array_equal, params, load_checkpoint(GOLDEN / name).params)


def images_of(size: int, channels: int) -> Task:
    task = made_up_task("images")
    entry = ImageInput(image_size=size, channels=channels, pixel_offset=0, pixel_scale=1.0)
    return dataclasses.replace(task, input=entry)


@pytest.mark.parametrize(
    ("task", "checkpoint", "message"),
    [
        (text_task("text", vocabulary_size=10_000), "bert", "it is another model's"),
        (text_task("text", max_tokens=1000), "bert", "longer than the model's .* positions"),
        (made_up_task("text"), "vit", "of a model of images"),
        (made_up_task("text"), "gpt2", "is a decoder"),
        (made_up_task("decoder"), "gpt2", "numbers 23 characters in its own way"),
        (made_up_task("decoder"), "bert", "has no output per token"),
        (made_up_task("images"), "bert", "of a model of text"),
        (images_of(16, 1), "vit", "do not fit the model"),
        (images_of(999, 3), "vit", "do not fit the model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    task: Task, checkpoint: str, message: str
) -> None:
    with pytest.raises(CodesignError, match=message) as refusal:
        choose_model(task, experiment_on(checkpoint))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["images", "decoder"])
def test_sizes_price_like_the_model(kind: str) -> None:
    """The closed form of `codesign cost` at full length is what dense costs on the task."""
    problem = untrained(kind)
    structure = problem.config.structure
    shape = model_shape(structure, structure.max_tokens)
    closed = costs_of(workload_from_fractions(shape, Setting()), problem.accelerator)
    examples = problem.task.part("train").first(1)
    inputs = dict(examples.inputs)
    if kind == "decoder":
        inputs["valid"] = np.ones_like(inputs["valid"])
    dense = DenseCost(structure, problem.accelerator, problem.mechanism).of(inputs)
    for scope in SCOPES:
        for metric in ("energy", "latency"):
            assert float(closed[scope][metric][0]) == pytest.approx(
                float(dense[scope][metric][0]), rel=1e-5
            )


def test_dense_models_are_told_apart_by_the_weights_they_start_from() -> None:
    tree = {"head": {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.zeros(3)}}
    same = {"head": {"bias": np.zeros(3), "kernel": np.arange(6.0).reshape(2, 3)}}
    assert contents_digest(tree) == contents_digest(same)
    for other in (
        {"head": {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.ones(3)}},
        {"head": {"kernel": np.arange(6.0).reshape(3, 2), "bias": np.zeros(3)}},
        {"tail": tree["head"]},
    ):
        assert contents_digest(other) != contents_digest(tree)


def test_a_run_knows_its_data(tmp_path: Path) -> None:
    task, other = made_up_task("text"), made_up_task("decoder")
    record_data(tmp_path, task)
    check_data(tmp_path, task)
    record_data(tmp_path, task)  # resumed
    for call in (check_data, record_data):
        with pytest.raises(RunDirectoryError, match="train and validation data of .* has changed"):
            call(tmp_path, other)
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"data.json' cannot be read"):
        check_data(tmp_path, task)
