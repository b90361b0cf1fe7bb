"""Exports: round trip, replay, and what is said about damaged ones."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_deployment

from codesign.errors import DataError, ExportError, RunDirectoryError
from codesign.hw import emulator
from codesign.hw.export import Export, first_difference, read_export, replay, write_export
from codesign.hw.hardware_config import (
    Expected,
    ExpectedCost,
    HardwareConfig,
    IntegerPolicy,
    Scales,
    json_schema,
)
from codesign.hw.spec import load_preset
from codesign.references import LAYER_TENSORS

FILES = ("config.json", "weights.npz", "golden.npz")


PRESETS = {"acceltran": "acceltran-edge", "dense": "energon"}
"""Machine of a mechanism, where its name differs."""


def make_export(variant: str = "patches", mechanism: str = "energon", **changes: Any) -> Export:
    """A valid export of the random deployment, golden vectors from the emulator."""
    shape = random_deployment.structure(variant, mechanism, **changes)
    deployment, inputs = random_deployment.build(shape, threshold=-10)
    layers, ends = deployment.layers, deployment.ends
    cost = ExpectedCost(energy_pj=1.5e6, latency_cycles=1234.5)
    is_decoder = shape.pooling == "all"
    config = HardwareConfig(
        generator="codesign 0.1.0",
        structure=shape,
        policy=IntegerPolicy.from_arrays(shape, layers, ends),
        scales=Scales(
            activation_scales={"qkv": [1 / 3] * shape.num_layers, "embed": 0.1},
            residual_scale=deployment.scales["residual"],
            logit_scale=deployment.scales["logits"],
        ),
        accelerator=load_preset(PRESETS.get(mechanism, mechanism)),
        expected=Expected(
            part="validation",
            num_examples=100,
            quality_name="bits_per_token" if is_decoder else "accuracy",
            quality=2.5 if is_decoder else 0.97,
            kl_nats=0.1,
            attention=cost,
            end_to_end=cost,
            area_mm2=4.2,
        ),
    )
    tensors = emulator.emulate(shape, layers, ends, inputs)
    return Export(config=config, layers=layers, ends=ends, inputs=inputs, tensors=tensors)


def write(export: Export, directory: Path) -> None:
    write_export(
        *(directory, export.config, export.layers, export.ends),
        inputs=export.inputs,
        tensors=export.tensors,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exports") / "point"
    write(make_export(), directory)
    return directory


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def rewrite_arrays(
    directory: Path, file: str, change: Callable[[dict[str, np.ndarray]], None], *, sign: bool
) -> None:
    """Changes the arrays of a file; with `sign`, the configuration's SHA-256 follows."""
    with np.load(directory / file) as loaded:
        arrays = dict(loaded)
    change(arrays)
    np.savez(directory / file, **arrays)
    if sign:
        digest = hashlib.sha256((directory / file).read_bytes()).hexdigest()
        edit_config(directory, lambda config: config["files"].update({file: digest}))


def edit_config(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.smoke
@pytest.mark.parametrize("variant", random_deployment.VARIANTS)
@pytest.mark.parametrize("mechanism", random_deployment.MECHANISMS)
def test_export_load_export_is_the_identity(variant: str, mechanism: str, tmp_path: Path) -> None:
    export = make_export(variant, mechanism)
    write(export, tmp_path / "first")
    loaded = read_export(tmp_path / "first")
    write(loaded, tmp_path / "second")
    for file in FILES:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    for group in ("layers", "ends", "inputs", "tensors"):
        before, after = getattr(export, group), getattr(loaded, group)
        assert before.keys() == after.keys()
        for name, values in after.items():
            np.testing.assert_array_equal(values, before[name])
    assert loaded.config.structure == export.config.structure
    assert loaded.config.scales == export.config.scales
    assert loaded.config.accelerator == export.config.accelerator
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    assert replay(tmp_path / "second").is_exact


@pytest.mark.smoke
def test_replay_is_exact(written: Path) -> None:
    report = replay(written)
    # 2 layers, 2 rounds, 8 examples, 2 heads, 9 x 9 pairs.
    assert report.is_exact and report.num_examples == 8
    assert report.num_decisions == 2 * 2 * 8 * 2 * 81
    assert report.num_values > 3 * report.num_decisions


def test_every_element_of_a_pruned_tensor_is_a_decision(tmp_path: Path) -> None:
    write(make_export("decoder", "acceltran"), tmp_path / "pruned")
    report = replay(tmp_path / "pruned")
    # 2 layers, 8 examples of 10 tokens: Q, K, V and context of 16 values each, both branches of 16,
    # the gate of 32; raw scores and probabilities of 2 heads, 10 x 10 pairs.
    assert report.num_decisions == 2 * 8 * (10 * (4 * 16 + 2 * 16 + 32) + 2 * 2 * 100)
    write(make_export("decoder", "dense"), tmp_path / "dense")
    assert replay(tmp_path / "dense").num_decisions == 0


def test_all_tokens_valid_by_default(tmp_path: Path) -> None:
    export = make_export("bert")
    config = export.config
    inputs = {"tokens": export.inputs["tokens"][:3, :4]}
    tensors = emulator.emulate(config.structure, export.layers, export.ends, inputs)
    write(dataclasses.replace(export, inputs=inputs, tensors=tensors), tmp_path / "short")
    loaded = read_export(tmp_path / "short")
    assert loaded.inputs["valid"].shape == (3, 4) and loaded.inputs["valid"].all()
    assert loaded.tensors["keep"].shape == (2, 2, 3, 2, 4, 4)


def test_arrays_take_the_smallest_type(written: Path) -> None:
    with np.load(written / "weights.npz") as weights:
        assert weights["layers/qkv_weight"].dtype == np.int8
        assert weights["layers/activation_table"].dtype == np.int8
        assert weights["ends/position"].dtype == np.int16
        assert weights["tables/exp_table"].dtype == np.int32
    with np.load(written / "golden.npz") as golden:
        assert golden["keep"].dtype == np.bool_ and golden["inputs/pixels"].dtype == np.int8
    loaded = read_export(written)
    assert loaded.layers["qkv_weight"].dtype == np.int8
    assert loaded.tensors["query"].dtype == np.int16


def test_config_holds_integers_and_accelerator(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    assert config["policy"]["mechanism"] == {
        "threshold": [[[-10, -10]] * 2] * 2,
        "query_bits": [4, 4],
        "key_bits": [[2, 4]] * 2,
    }
    assert config["policy"]["weight_bits"] == {
        **{site: [8, 8] for site in ("qkv", "out", "up", "down")},
        **{site: [8] for site in ("embed", "head")},
    }
    assert config["accelerator"]["name"] == load_preset("energon").name
    assert set(config["tables"]) == {"exp_table", "reciprocal_table", "activation_table"}
    assert set(json_schema()["properties"]) == set(config)


def test_config_of_a_text_model(tmp_path: Path) -> None:
    write(make_export("pooler", "acceltran"), tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert config["structure"]["input"] == {
        "kind": "tokens",
        "vocabulary_size": 23,
        "max_tokens": 10,
    }
    assert np.shape(config["policy"]["mechanism"]["threshold"]) == (2, 9)
    assert set(config["policy"]["activation_bits"]) == {"qkv", "out", "up", "down", "pool", "head"}
    assert {"activation_table", "pool_table"} < set(config["tables"])


def test_existing_directory_is_refused(written: Path, tmp_path: Path) -> None:
    export = make_export()
    before = (written / "config.json").read_bytes()
    with pytest.raises(RunDirectoryError, match="exists already"):
        write(export, written)
    assert (written / "config.json").read_bytes() == before
    with pytest.raises(RunDirectoryError, match="not a directory"):
        write(export, tmp_path / "absent" / "point")


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    export = make_export()
    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(RunDirectoryError, match="No space left"):
        write(export, tmp_path / "point")
    assert not list(tmp_path.iterdir())


def test_inconsistent_arguments_are_refused(tmp_path: Path) -> None:
    export = make_export()
    layers, tensors = export.layers, export.tensors

    def policy(**update: Any) -> Export:
        changed = export.config.policy.model_copy(update=update)
        return dataclasses.replace(
            export, config=export.config.model_copy(update={"policy": changed})
        )

    def without(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
        return {key: values for key, values in arrays.items() if key != name}

    widths = export.config.policy.weight_bits
    real_logits = tensors | {"logits": tensors["logits"] * 1.0}
    own = export.config.policy.mechanism
    cases: list[tuple[str, Export]] = [
        ("`policy.weight_bits` disagrees", policy(weight_bits=widths | {"up": [8, 7]})),
        ("`policy.qk_bits` disagrees", policy(qk_bits=[12, 13])),
        ("`policy.mechanism` disagrees", policy(mechanism=own | {"query_bits": [4, 5]})),
        (
            "`layers/up_bias` is missing",
            dataclasses.replace(export, layers=without(layers, "up_bias")),
        ),
        ("`hidden` is missing", dataclasses.replace(export, tensors=without(tensors, "hidden"))),
        ("`logits` must hold integers", dataclasses.replace(export, tensors=real_logits)),
        (
            "inputs are empty",
            dataclasses.replace(export, inputs={"pixels": export.inputs["pixels"][:0]}),
        ),
    ]
    for message, wrong in cases:
        with pytest.raises(ExportError, match=message):
            write(wrong, tmp_path / "point")
    with pytest.raises(DataError, match="input `pixels` is missing"):
        write(dataclasses.replace(export, inputs={}), tmp_path / "point")
    assert not list(tmp_path.iterdir())


def test_flipped_weight_is_named_by_replay(copy: Path) -> None:
    def flip(arrays: dict[str, np.ndarray]) -> None:
        arrays["layers/up_weight"][1, 3, 5] ^= 64

    rewrite_arrays(copy, "weights.npz", flip, sign=True)
    difference = replay(copy).difference
    assert difference is not None
    assert (difference.tensor, difference.layer, difference.index[-1]) == ("hidden", 1, 5)
    assert difference.expected != difference.got
    assert str(difference).startswith("tensor `hidden` of layer 1 at [")


def test_changed_file_is_refused(copy: Path) -> None:
    def flip(arrays: dict[str, np.ndarray]) -> None:
        arrays["layers/up_weight"][1, 3, 5] ^= 64

    rewrite_arrays(copy, "weights.npz", flip, sign=False)
    with pytest.raises(ExportError, match="weights.npz` has changed since it was exported"):
        read_export(copy)


def test_flipped_bit_in_the_file_names_the_array(copy: Path) -> None:
    path = copy / "weights.npz"
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("layers/qkv_weight.npy")
    content = bytearray(path.read_bytes())
    content[entry.header_offset + entry.file_size // 2 + 200] ^= 4
    path.write_bytes(content)
    with pytest.raises(ExportError, match="`layers/qkv_weight`: Bad CRC-32"):
        read_export(copy)


@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_truncated_file_is_refused(copy: Path, kept: int) -> None:
    path = copy / "weights.npz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ExportError, match="weights.npz` is damaged"):
        read_export(copy)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("weights.npz", {"layers/extra": np.zeros(3, int)}, "array `layers/extra` is unknown"),
        ("golden.npz", {"query": None}, "array `query` is missing"),
        ("weights.npz", {"ends/position": np.zeros((9, 15), int)}, r"`ends/position` must have sh"),
        ("golden.npz", {"logits": np.zeros((7, 5), int)}, r"array `\w+` must have shape"),
        ("weights.npz", {"ends/head_bias": np.zeros(5)}, "`ends/head_bias`: stored as float64"),
        (
            "weights.npz",
            {"ends/head_bias": np.asarray([{}] * 5)},
            "`ends/head_bias`: stored as obj",
        ),
        ("weights.npz", {"layers/qk_bits": np.asarray([12, 40])}, r"`layers/qk_bits` must lie in"),
        ("weights.npz", {"layers/qk_bits": np.asarray([12, 13])}, "`policy.qk_bits` disagrees"),
        ("weights.npz", {"tables/exp_table": np.zeros(4096, int)}, "`tables/exp_table` is not the"),
        (
            "weights.npz",
            {"layers/activation_table": np.zeros((2, 1023), int)},
            "`tables` in the config",
        ),
        ("golden.npz", {"keep": np.zeros((2, 2, 8, 2, 9, 9), int)}, "`keep` must hold bools"),
        ("golden.npz", {"inputs/pixels": None}, "array `inputs/pixels` is missing"),
        ("golden.npz", {"inputs/valid": np.ones((8, 9), bool)}, "`inputs/valid` is unknown"),
    ],
)
def test_wrong_array_is_named(copy: Path, file: str, change: dict[str, Any], message: str) -> None:
    def apply(arrays: dict[str, np.ndarray]) -> None:
        arrays.update(change)
        for name in [name for name, values in change.items() if values is None]:
            del arrays[name]

    rewrite_arrays(copy, file, apply, sign=True)
    with pytest.raises(ExportError, match=message) as error:
        read_export(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Files hold the inputs first: their sizes are those that the tensors must have.
        ({"inputs/tokens": np.zeros((8, 9), int)}, r"`inputs/valid` must have shape \(8, 9\)"),
        ({"logits": np.zeros((8, 9, 23), int)}, r"`logits` must have shape \(8, 10, 23\)"),
        ({"query": np.zeros((2, 7, 2, 10, 8), int)}, r"`query` must have shape \(2, 8, 2, 10, 8\)"),
        ({"inputs/tokens": np.full((8, 10), 23)}, r"`tokens` must lie in \[0, 22\], got 23"),
        ({"inputs/valid": np.zeros((8, 10), bool)}, "at least one token"),
    ],
)
def test_wrong_golden_array_of_a_text_model(
    tmp_path: Path, change: dict[str, np.ndarray], message: str
) -> None:
    write(make_export("decoder", "acceltran"), tmp_path / "text")
    rewrite_arrays(tmp_path / "text", "golden.npz", lambda arrays: arrays.update(change), sign=True)
    with pytest.raises(ExportError, match=message) as error:
        read_export(tmp_path / "text")
    assert "\n" not in str(error.value)


def test_compressed_file_is_refused_unread(copy: Path) -> None:
    path = copy / "weights.npz"
    with np.load(path) as loaded:
        arrays = dict(loaded)
    np.savez_compressed(path, **arrays)
    with pytest.raises(ExportError, match="is not stored in"):
        read_export(copy)


def set_version(config: dict[str, Any]) -> None:
    config["schema_version"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_version, "`schema_version` must be 2, got 1: read it with"),
        (lambda config: config.pop("schema_version"), "`schema_version` must be 2, got None"),
        (lambda config: config.update(extra=1), "`extra`: Extra inputs are not permitted"),
        (lambda config: config["structure"].update(depth=1), "`structure.depth`: Unexpected"),
        (lambda config: config["structure"].update(mechanism="top"), "one of a3, acceltran, bits"),
        (lambda config: config["structure"].update(norm="both"), "`structure.norm`"),
        (
            lambda config: config["structure"].update(mechanism="dense"),
            "array `layers/key_bits` is unknown",
        ),
        (
            lambda config: config["structure"]["input"].update(stride=0),
            "`structure.input.PatchInput`: Value error, `stride` must be at least 1, got 0",
        ),
        (
            lambda config: config["structure"].update(input={"kind": "tokens", "max_tokens": 9}),
            "`structure.input.TokenInput.vocabulary_size`",
        ),
        (lambda config: config["structure"].update(width=17), r"array `\w+/\w+` must have shape"),
        (lambda config: config["scales"].update(logit_scale=0), "`scales.logit_scale`"),
        (lambda config: config["expected"].update(quality=float("nan")), "`expected.quality`"),
        (lambda config: config["expected"].update(quality=1.5), "it must lie in .0, 1., got 1.5"),
        (lambda config: config.update(files={}), "`files` must name"),
    ],
)
def test_wrong_config_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_config(copy, change)
    with pytest.raises(ExportError, match=message) as error:
        read_export(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "\ud800"])
def test_config_that_is_not_json_is_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ExportError, match="config.json`"):
        read_export(copy)


@pytest.mark.parametrize("file", FILES)
def test_missing_file_is_named(copy: Path, file: str) -> None:
    (copy / file).unlink()
    with pytest.raises(ExportError, match=f"{file}` does not exist"):
        read_export(copy)


def test_first_difference_follows_the_computation() -> None:
    tensors = make_export().tensors
    assert first_difference(tensors, tensors) is None

    def changed(name: str, index: tuple[int, ...]) -> dict[str, np.ndarray]:
        values = other[name].copy()
        values[index] = ~values[index] if values.dtype == bool else values[index] + 1
        return other | {name: values}

    # From last to first in order of computation: each change hides the ones before.
    other = tensors
    steps: list[tuple[str, tuple[int, ...]]] = [
        ("logits", (3, 2)),
        ("query", (1, 0, 1, 2, 3)),
        ("residual", (0, 4, 5, 6)),
        ("keep", (0, 1, 7, 1, 8, 8)),
        ("key", (0, 0, 0, 0, 1)),
        ("embedded", (2, 0, 0)),
    ]
    for name, index in steps:
        other = changed(name, index)
        found = first_difference(tensors, other)
        assert found is not None
        is_layered = name in LAYER_TENSORS
        assert (found.tensor, found.layer) == (name, index[0] if is_layered else None)
        assert found.index == (index[1:] if is_layered else index)
        assert found.got == other[name][index] and found.expected == tensors[name][index]


def test_first_difference_needs_equal_shapes() -> None:
    logits = np.zeros((2, 3))
    with pytest.raises(ExportError, match="`logits` cannot be compared"):
        first_difference({"logits": logits}, {"logits": logits[:1]})
    with pytest.raises(ExportError, match="got none"):
        first_difference({"logits": logits}, {})
    assert (
        first_difference({"logits": logits, "keep": np.zeros((1, 0))}, {"logits": logits}) is None
    )


def test_imports_without_jax() -> None:
    code = "import sys; sys.modules['jax'] = None; import codesign.hw.export"
    subprocess.run([sys.executable, "-c", code], check=True)
