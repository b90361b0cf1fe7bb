"""Experiments that train in seconds, and problems on made-up data whose models were never trained."""

import dataclasses
from typing import Any

import jax
import numpy as np

from codesign.experiments.configs import DenseSettings, Experiment, ModelSettings
from codesign.experiments.data import Examples, ImageInput, Part, Task, TextInput
from codesign.experiments.model_choice import sized_config
from codesign.experiments.problem import Problem
from codesign.experiments.teacher import Teacher
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.spec import load_preset
from codesign.mechanisms import mechanism_by_name
from codesign.models.parameters import init_params
from codesign.optimize import OptimizeSettings

NUM_STEPS = 6
VOCABULARY, MAX_TOKENS = 23, 12
BUCKETS = (4, 8)
KINDS = ("images", "text", "decoder")


def tiny() -> Experiment:
    """Two layers of two heads on 16 tokens."""
    return Experiment(
        model=ModelSettings(
            num_layers=2,
            num_heads=2,
            head_dim=8,
            width=16,
            hidden=48,
            patch_size=4,
            stride=2,
        ),
        dense=DenseSettings(num_steps=20),
        optimize=OptimizeSettings(num_steps=NUM_STEPS, bits_rate=0.3),
    )


def made_up_task(kind: str, num_examples: int = 10) -> Task:
    """Random images, or random padded rows of 1 to 12 tokens in no order of length."""
    rng = np.random.default_rng(KINDS.index(kind))

    def examples() -> Examples:
        if kind == "images":
            pixels = rng.integers(0, 17, (num_examples, 8, 8)).astype(np.int32)
            return Examples({"pixels": pixels}, rng.integers(0, 3, num_examples).astype(np.int32))
        lengths = rng.permutation(np.linspace(1, MAX_TOKENS, num_examples).astype(int))
        shape = (num_examples, MAX_TOKENS)
        tokens, following = rng.integers(0, VOCABULARY, (2, *shape)).astype(np.int32)
        inputs = {"tokens": tokens, "valid": np.arange(MAX_TOKENS) < lengths[:, None]}
        classes = rng.integers(0, 3, num_examples).astype(np.int32)
        return Examples(inputs, following if kind == "decoder" else classes)

    parts: dict[Part, Examples] = {"train": examples(), "validation": examples()}
    return Task(
        name=f"made-up {kind}",
        parts=parts,
        kind="language" if kind == "decoder" else "classification",
        num_outputs=VOCABULARY if kind == "decoder" else 3,
        input=ImageInput(image_size=8, channels=1, pixel_offset=8, pixel_scale=1 / 8)
        if kind == "images"
        else TextInput(
            vocabulary_size=VOCABULARY, max_tokens=MAX_TOKENS, tokenizer="characters", pad_id=0
        ),
        origin="nowhere",
    )


def untrained(
    kind: str, mechanism: str = "energon", preset: str = "energon", **changes: Any
) -> Problem:
    """The problem of a made-up task with random parameters; `changes` are fields of the experiment."""
    task = made_up_task(kind)
    fields = {"mechanism": mechanism, "preset": preset, "buckets": BUCKETS, "batch_size": 4}
    experiment = dataclasses.replace(tiny(), **(fields | changes))
    config = sized_config(task, experiment.model)
    # Far from the identity, so that every row, head and key matters.
    params = init_params(config.structure, key=jax.random.key(3))
    params = jax.tree.map(lambda leaf: 3.0 * leaf, params)
    spec = load_preset(preset)
    return Problem(
        experiment=experiment,
        task=task,
        config=config,
        mechanism=mechanism_by_name(mechanism),
        spec=spec,
        accelerator=accelerator_from_spec(spec),
        params=params,
        teacher=Teacher(params, config),
    )
