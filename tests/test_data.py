"""Tasks on images: the split of digits, files of images, checks of raw data, parts, settings and what a model must hold."""

import io
import json
import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from codesign.errors import DataError, UnknownNameError
from codesign.experiments.data import DataSettings, Examples, Task
from codesign.experiments.tasks import TASKS, checked, digits, load_task, mnist


def test_digits_are_split_in_three_disjoint_stratified_parts() -> None:
    task = digits(DataSettings())
    sizes = {name: len(part) for name, part in task.parts.items()}
    # 60 / 20 / 20 of 1,797.
    assert sizes == {"train": 1078, "validation": 359, "test": 360}
    everything = np.concatenate([part.labels for part in task.parts.values()])
    shares = np.bincount(everything) / len(everything)
    for part in task.parts.values():
        pixels = part.inputs["pixels"]
        assert pixels.shape == (len(part), 8, 8) and pixels.dtype == np.int32
        assert pixels.min() == 0 and pixels.max() == 16
        np.testing.assert_allclose(np.bincount(part.labels) / len(part), shares, atol=2 / len(part))
    images = {
        name: {image.tobytes() for image in part.inputs["pixels"]}
        for name, part in task.parts.items()
    }
    assert not images["train"] & images["test"] and not images["validation"] & images["test"]
    again = digits(DataSettings())
    for name, part in task.parts.items():
        assert part.digest() == again.parts[name].digest()
    assert len({part.digest() for part in task.parts.values()}) == 3


def test_unknown_task_is_named() -> None:
    with pytest.raises(
        UnknownNameError, match="task `cifar` does not exist: choose one of digits, "
    ):
        load_task("cifar")


def test_every_task_says_what_it_is() -> None:
    assert list(TASKS) == [
        "digits",
        "mnist",
        "sst2",
        "spamassassin",
        "tinyshakespeare",
        "user_text",
    ]
    assert all(function.__doc__ and function.__name__ == name for name, function in TASKS.items())


def test_missing_part_is_named() -> None:
    task = digits(DataSettings())
    with pytest.raises(
        DataError, match="part 'test' of task 'digits' is not in scikit.*: it has train"
    ):
        Task(**(vars(task) | {"parts": {"train": task.parts["train"]}})).part("test")


@pytest.mark.parametrize(
    ("pixel", "label", "message"),
    [
        (np.nan, 0, r"x: pixel \(1, 2, 3\) is nan"),
        (-np.inf, 0, r"x: pixel \(1, 2, 3\) is -inf"),
        (0.5, 0, "whole numbers"),
        (1.0, 10, r"label 10 of image 1 is outside 0\.\.9"),
        (1.0, -1, r"label -1 of image 1 is outside 0\.\.9"),
    ],
)
def test_bad_values_are_named(pixel: float, label: int, message: str) -> None:
    pixels, labels = np.zeros((3, 8, 8)), np.zeros(3, int)
    pixels[1, 2, 3], labels[1] = pixel, label
    with pytest.raises(DataError, match=message):
        checked(pixels, labels, 10, "x")


@pytest.mark.parametrize(("images", "labels"), [(0, 0), (3, 2)])
def test_empty_or_unequal_parts_are_refused(images: int, labels: int) -> None:
    with pytest.raises(DataError, match=f"{images} images and {labels} labels"):
        checked(np.zeros((images, 8, 8)), np.zeros(labels, int), 10, "x")


def test_good_values_become_int32() -> None:
    examples = checked(np.full((2, 3, 3), 7.0), np.asarray([0, 9]), 10, "x")
    assert examples.inputs["pixels"].dtype == examples.labels.dtype == np.int32
    assert len(examples.first(1)) == 1 and len(examples.first(None)) == 2
    np.testing.assert_array_equal(examples.take(np.asarray([1, 0, 1])).labels, [9, 0, 9])


def test_a_digest_tells_values_types_and_shapes_apart() -> None:
    labels = np.zeros(4, np.int32)
    pixels = np.arange(16, dtype=np.int32).reshape(4, 2, 2)
    others = [pixels, pixels[::-1], pixels.reshape(4, 4), pixels.astype(np.int64)]
    assert len({Examples(inputs={"pixels": one}, labels=labels).digest() for one in others}) == 4


def write_mnist(folder: Path, **parts: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    images = {}
    for name, number in parts.items():
        images[name] = generator.integers(0, 256, (number, 28, 28)).astype(np.uint8)
        np.savez_compressed(
            folder / f"{name}.npz", image=images[name], label=np.arange(number, dtype=np.uint8) % 10
        )
    return images


def test_mnist_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_mnist(tmp_path, train=20, validation=5)
    task = load_task("mnist", DataSettings(data=tmp_path))
    assert (task.num_outputs, task.kind, task.quality_name) == (10, "classification", "accuracy")
    assert {name: len(part) for name, part in task.parts.items()} == {"train": 20, "validation": 5}
    np.testing.assert_array_equal(task.part("train").inputs["pixels"], images["train"])
    assert task.part("train").inputs["pixels"].dtype == np.int32
    with pytest.raises(
        DataError, match=re.escape(f"part 'test' of task 'mnist' is not in `{tmp_path}`")
    ):
        task.part("test")
    write_mnist(tmp_path, test=3)
    assert len(load_task("mnist", DataSettings(data=tmp_path)).part("test")) == 3
    root = tmp_path / "root"
    (root / "mnist").mkdir(parents=True)
    write_mnist(root / "mnist", train=4, validation=2)
    monkeypatch.setenv("CODESIGN_DATA", str(root))
    assert len(load_task("mnist").part("train")) == 4
    assert len(load_task("mnist", DataSettings(data=tmp_path)).part("train")) == 20


@pytest.mark.parametrize("damage", ["cut", "text", "name", "float", "object", "label", "lengths"])
def test_bad_image_files_are_refused(tmp_path: Path, damage: str) -> None:
    images = write_mnist(tmp_path, train=4, validation=2)["train"]
    path, labels = tmp_path / "train.npz", np.zeros(4, int)
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case "text":
            path.write_text("not an archive")
        case "name":
            np.savez(path, images=images, label=labels)
        case "float":
            np.savez(path, image=images / 255.0, label=labels)
        case "object":
            np.savez(path, image=images.astype(object), label=labels)
        case "label":
            np.savez(path, image=images, label=labels + 10)
        case "lengths":
            np.savez(path, image=images, label=labels[:3])
    messages = {
        "cut": "not a readable npz",
        "text": "not a readable npz",
        "name": r"no array `image` \(it has images, label\)",
        "float": r"float64 \[4, 28, 28\]",
        "object": "holds object, not numbers",
        "label": r"label 10 of image 0 is outside 0\.\.9",
        "lengths": "4 images and 3 labels",
    }
    with pytest.raises(DataError, match=messages[damage]):
        load_task("mnist", DataSettings(data=tmp_path))


def test_stated_size_is_checked_before_memory_is_taken(tmp_path: Path) -> None:
    write_mnist(tmp_path, train=4, validation=2)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**13, 28, 28)}
    )
    with zipfile.ZipFile(tmp_path / "train.npz", "w") as archive:
        archive.writestr("image.npy", header.getvalue() + bytes(1000))
        archive.writestr("label.npy", header.getvalue())
    with pytest.raises(DataError, match="states 7840000000000000 bytes, more than the file holds"):
        load_task("mnist", DataSettings(data=tmp_path))


def test_absent_data_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("CODESIGN_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"`--data`, or set CODESIGN_DATA .*codesign\[hub\]"):
        load_task("mnist")
    with pytest.raises(DataError, match="not here and not on the hub: give its folder"):
        load_task("spamassassin")
    with pytest.raises(DataError, match="`none` of task `mnist` does not exist: give"):
        load_task("mnist", DataSettings(data=Path("none")))
    (tmp_path / "file.csv").touch()
    with pytest.raises(DataError, match="file.csv` of task `mnist` is a file: give the task's"):
        load_task("mnist", DataSettings(data=tmp_path / "file.csv"))
    with pytest.raises(DataError, match="`train.npz` of task `mnist` is not in"):
        load_task("mnist", DataSettings(data=tmp_path))


def test_mnist_from_the_hub_holds_out_the_last_sixth(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(repository: str, *, revision: str, split: str) -> dict[str, list]:
        assert (repository, revision) == ("ylecun/mnist", "main")
        number = {"train": 60, "test": 10}[split]
        images = [np.full((28, 28), index, np.uint8) for index in range(number)]
        return {"image": images, "label": [index % 10 for index in range(number)]}

    monkeypatch.delenv("CODESIGN_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = mnist(DataSettings())
    sizes = {name: len(part) for name, part in task.parts.items()}
    assert sizes == {"train": 50, "validation": 10, "test": 10}
    np.testing.assert_array_equal(
        task.part("validation").inputs["pixels"][:, 0, 0], np.arange(50, 60)
    )


def test_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.delenv("CODESIGN_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"`stanfordnlp/sst2` .*\(ConnectionError: no route\)"):
        load_task("sst2")


def test_settings_are_checked() -> None:
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(DataError, match=r"`validation_fraction` must lie in \(0, 1\), got"):
            DataSettings(validation_fraction=fraction)
    with pytest.raises(DataError, match="`split_seed` must be at least 0, got -1"):
        DataSettings(split_seed=-1)
    with pytest.raises(DataError, match="`max_tokens` must be at least 1, got 0"):
        DataSettings(max_tokens=0)


def test_settings_are_json() -> None:
    plain = DataSettings(data=Path("a") / "b", max_tokens=3).plain()
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["data"], plain["validation_data"], plain["max_tokens"]) == (
        str(Path("a/b").absolute()),
        None,
        3,
    )
