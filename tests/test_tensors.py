"""Reading of safetensors: values, shards, names and shapes that do not fit, and files that are damaged in every way."""

import json
import pickle
import resource
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from codesign.errors import CheckpointError
from codesign.experiments.tensors import read_tensors, tensor_shapes

WANTED = {"a.weight": (2, 3), "b": (4,), "scalar": (), "none": (0, 5)}


def tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        name: np.asarray(generator.standard_normal(shape), np.float32)
        for name, shape in WANTED.items()
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path, metadata={"format": "pt"})
    return path


def raw(header: object, values: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


def test_values_of_a_file_and_of_its_folder(file: Path) -> None:
    for path in (file, file.parent):
        read = read_tensors(path, WANTED)
        assert list(read) == list(WANTED)
        for name, values in tensors().items():
            assert read[name].dtype == np.float32
            np.testing.assert_array_equal(read[name], values)
    assert tensor_shapes(file) == WANTED


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_narrow_types_widen_without_loss(tmp_path: Path, dtype: type) -> None:
    values = np.asarray([1.0, -0.3, 1e-6, 300.0]).astype(dtype)
    save_file({"x": values}, tmp_path / "x.safetensors")
    read = read_tensors(tmp_path / "x.safetensors", {"x": (4,)})["x"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.astype(np.float32))


def shard(folder: Path) -> Path:
    """Splits `tensors()` into two files with an index."""
    parts = {"one.safetensors": ["a.weight", "none"], "two.safetensors": ["b", "scalar"]}
    for name, own in parts.items():
        save_file({key: tensors()[key] for key in own}, folder / name)
    index = folder / "model.safetensors.index.json"
    places = {key: name for name, own in parts.items() for key in own}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_sharded_checkpoints_are_put_together(tmp_path: Path) -> None:
    index = shard(tmp_path)
    for path in (index, tmp_path):
        for name, values in read_tensors(path, WANTED).items():
            np.testing.assert_array_equal(values, tensors()[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"{", "is not an index"),
        (b"[]", "is not an index"),
        (b'{"weight_map": [1]}', "is not an index"),
        (b'{"weight_map": {"b": "../two.safetensors"}}', "not a safetensors file beside it"),
        (b'{"weight_map": {"b": "/etc/two.safetensors"}}', "not a safetensors file beside it"),
        (b'{"weight_map": {"b": "two.bin"}}', "not a safetensors file beside it"),
        (b'{"weight_map": {"b": "three.safetensors"}}', "three.safetensors` does not exist"),
        (b'{"weight_map": {"b": "one.safetensors"}}', "one.safetensors` holds no tensor `b`"),
    ],
)
def test_bad_indices_are_refused(tmp_path: Path, change: bytes, message: str) -> None:
    index = shard(tmp_path)
    index.write_bytes(change)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(index, {"b": (4,)})


def test_tensors_that_do_not_fit_are_named(file: Path) -> None:
    wanted = {"a.weight": (3, 2), "b": (4,), "c": (1,), "d": (1,), "e": (1,), "f": (1,)}
    with pytest.raises(CheckpointError) as caught:
        read_tensors(file, wanted, ignorable=("no",))
    message = str(caught.value)
    assert "4 missing: `c`, `d`, `e`, ...;" in message
    assert "1 not part of the model: `scalar`;" in message
    assert "1 of another shape: `a.weight` [2, 3] instead of [3, 2])" in message
    assert "\n" not in message
    for ignorable in (("a.", "scalar", "none"), None):
        assert list(read_tensors(file, {"b": (4,)}, ignorable=ignorable)) == ["b"]
    with pytest.raises(CheckpointError, match="3 not part of the model: "):
        read_tensors(file, {"b": (4,)}, ignorable=())


def test_ignorable_tensors_may_be_of_any_type_and_wanted_ones_not(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"ids": np.arange(3), "x": np.ones(2, np.float32)}, path)
    assert list(read_tensors(path, {"x": (2,)}, ignorable=("ids",))) == ["x"]
    with pytest.raises(CheckpointError, match="1 not of type F32/F16/BF16: `ids` I64"):
        read_tensors(path, {"x": (2,), "ids": (3,)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    save_file({"x": np.asarray([1.0, value], np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="tensor `x` of .* not finite"):
        read_tensors(tmp_path / "x.safetensors", {"x": (2,)})


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".PTH", ".ckpt", ".pkl", ".safetensors"])
def test_pickles_are_never_loaded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    message = "not a whole safetensors" if suffix == ".safetensors" else "can run code .* convert"
    with pytest.raises(CheckpointError, match=message):
        read_tensors(path, {})
    if suffix != ".safetensors":
        with pytest.raises(CheckpointError, match="can run code .* convert"):
            read_tensors(tmp_path, {})
    assert not (tmp_path / "sprung").exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="`none.safetensors` does not exist"):
        read_tensors(Path("none.safetensors"), {})
    with pytest.raises(CheckpointError, match="holds neither `model.safetensors` nor"):
        read_tensors(tmp_path, {})


def entry(**changes: object) -> dict:
    return {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header of 0 bytes does not fit its 0"),
        (b"\x01\x02", "does not fit its 2 bytes"),
        (b"PK\x03\x04" + bytes(100), "header of .* does not fit"),
        (raw({}, length=3), "header of 3 bytes does not fit its 10"),
        (raw({}, length=2**63), "header of 9223372036854775808 bytes does not fit"),
        (raw(b"{"), "header is not JSON"),
        (raw(b"\xff\xfe\xfd\xfc"), "header is not JSON"),
        (raw(b"[" * 50_000), "header is not JSON"),
        (raw(b"[]"), "not an object"),
        (raw(b'{"x": 1}'), "`x` lacks a type, a shape or offsets"),
        (raw(b'{"x": {"dtype": "F32"}}'), "`x` lacks"),
        (raw(b'{"x": {}, "x": {}}'), "`x` comes twice"),
        (raw(entry(dtype=3), bytes(16)), "`x` lacks"),
        (raw(entry(dtype="F31"), bytes(16)), "unknown type `F31`"),
        (raw(entry(shape=[2, 3]), bytes(16)), "shape that its 16 bytes do not hold"),
        (raw(entry(shape=[2, -2]), bytes(16)), "are not sizes"),
        (raw(entry(shape=[2, 2.0]), bytes(16)), "are not sizes"),
        (raw(entry(shape=[2, True]), bytes(16)), "are not sizes"),
        (raw(entry(shape=[2**62, 2**62, 2]), bytes(16)), "do not hold"),
        (raw(entry(shape=[0, 10**400]), bytes(16)), "are not sizes"),
        (raw(entry(data_offsets=[16, 0]), bytes(16)), "do not hold"),
        (raw(entry(data_offsets=[4, 20]), bytes(20)), "begins at byte 4, not 0"),
        (raw(entry(data_offsets=[0, 16]), bytes(15)), "take 16 bytes, it has 15"),
        (raw(entry(data_offsets=[0, 16]), bytes(17)), "take 16 bytes, it has 17"),
        (raw(entry() | {"y": entry()["x"]}, bytes(16)), "begins at byte 0, not 16"),
        (
            raw(entry(shape=[10**11], data_offsets=[0, 4 * 10**11]), bytes(16)),
            "take 400000000000 bytes, it has 16",
        ),
    ],
    ids=range(26),
)
def test_headers_that_do_not_fit_their_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(path, {"x": (2, 2)})
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_every_truncation_is_refused(file: Path) -> None:
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            read_tensors(file, WANTED)


@pytest.mark.parametrize("seed", range(300))
def test_random_damage_is_one_line_or_harmless(file: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    content = bytearray(file.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(generator.integers(1, 4)):
        content[generator.integers(header_end)] = generator.integers(256)
    file.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read = read_tensors(file, WANTED)
    except CheckpointError as error:
        assert str(file) in str(error)
    else:
        # What is read in spite of it (damage to metadata or spaces) has the shapes asked for.
        assert {name: values.shape for name, values in read.items()} == WANTED
    # No memory is taken for what a header states: the file has a few hundred bytes (ru_maxrss is in KiB).
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
