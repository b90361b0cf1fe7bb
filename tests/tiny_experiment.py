"""Experiments that train in seconds, and problems on made-up data whose models were never trained."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from codesign.experiments.configs import DenseSettings, Experiment, ModelSettings
from codesign.experiments.data import (
    DataSettings,
    Examples,
    ImageInput,
    Part,
    Task,
    TextInput,
)
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
BUCKETS = (6,)
NUM_VALIDATION = 20
"""Examples in the validation part of what is written here; as many calibrate, so that less is compiled."""
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


def tiny_text() -> Experiment:
    """One's own reviews: up to 12 tokens, two layers of two heads; the files are given on the command line."""
    data = DataSettings(max_tokens=MAX_TOKENS, text_column="review", label_column="verdict")
    return dataclasses.replace(
        tiny(),
        task="user_text",
        data=data,
        buckets=BUCKETS,
        dense=DenseSettings(num_steps=60, batch_size=16, rate=1e-2),
        batch_size=8,
        num_calibration=NUM_VALIDATION,
    )


def tiny_decoder() -> Experiment:
    """Characters of a text in windows of 16; its folder is given on the command line."""
    return dataclasses.replace(
        tiny(),
        task="tinyshakespeare",
        data=DataSettings(max_tokens=16),
        dense=DenseSettings(num_steps=60, batch_size=16, rate=1e-2, label_smoothing=0.0),
        batch_size=8,
        num_calibration=NUM_VALIDATION,
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


GOOD, BAD = ("good", "fine", "great", "warm"), ("bad", "dull", "poor", "cold")
OTHER = ("the", "a", "film", "plot", "cast", "is", "was", "and", "so", "very")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def write_tokenizer(path: Path, num_more: int = 0) -> Path:
    """Writes a tokenizer of the words of `write_reviews` and `num_more` others, 22 in all without these."""
    words = (*SPECIAL, *GOOD, *BAD, *OTHER, *(f"word{index}" for index in range(num_more)))
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(word, numbers[word]) for word in SPECIAL[2:]]
    )
    tokenizer.save(str(path))
    return path


def write_reviews(path: Path, number: int = 5 * NUM_VALIDATION) -> Path:
    """Writes made-up reviews of 2 to 9 words, all different: one word in each, at any place, decides."""
    rng = np.random.default_rng(0)
    rows: dict[str, str] = {}
    while len(rows) < number:
        verdict = ("praise", "blame")[len(rows) % 2]
        words = list(rng.choice(OTHER, size=rng.integers(1, 9)))
        words.insert(rng.integers(len(words) + 1), rng.choice(GOOD if verdict == "praise" else BAD))
        rows.setdefault(" ".join(words), verdict)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("verdict", "review"), *((v, text) for text, v in rows.items())]
        )
    return path


def write_plays(folder: Path) -> Path:
    """Writes a text of which a tenth is `NUM_VALIDATION` windows of 16 characters."""
    folder.mkdir()
    reviews = write_reviews(folder / "reviews.csv").read_text().splitlines()
    text = "\n".join(line.partition(",")[2] for line in reviews)
    number = 10 * 16 * NUM_VALIDATION
    assert len(text) * 3 > number
    (folder / "input.txt").write_text((3 * text)[:number], encoding="utf-8")
    return folder
