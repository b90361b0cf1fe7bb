"""Layers, imports, file sizes and packaging, read from the sources without importing them."""

import ast
import graphlib
import importlib.util
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
PACKAGE_DIR: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]

ENTRY_POINT = "codesign.__main__"  # above all layers, though it stands in the core's folder
# What each layer may import of the others; every layer may import itself.
LAYERS = {
    "codesign": set(),
    "codesign.models": {"codesign"},
    "codesign.hw": {"codesign"},
    "codesign.experiments": {"codesign", "codesign.models", "codesign.hw"},
    ENTRY_POINT: {"codesign.experiments"},
}

# Inside `codesign`: a module imports from its own line or from those above, never from below.
ORDER = [
    {"units", "errors", "vocabulary", "backward", "tables"},
    {"quantize", "gates"},
    {"tile_statistics"},
    {
        "workload",
        "policy",
        "structure",
        "references",
        "calibration",
        "thresholds",
        "log_codes",
        "similarity",
    },
    {"fake_quantize", "segments", "parts"},
    {"mechanisms"},
    {"applied", "layer_counts"},
    {"layers"},
    {"objective", "rounding", "watch"},
    {"optimize"},
    {"fitting"},
]
RANK = {f"codesign.{name}": rank for rank, names in enumerate(ORDER) for name in names}

CORE_LIBRARIES = {"jax", "flax", "optax", "numpy", "chex"}
IMPORT_NAMES = {  # where they differ
    "huggingface-hub": "huggingface_hub",
    "orbax-checkpoint": "orbax",
    "scikit-learn": "sklearn",
}
EXTRAS = PROJECT["project"]["optional-dependencies"]
DECLARED = {
    IMPORT_NAMES.get(name, name)
    for requirement in [*PROJECT["project"]["dependencies"], *EXTRAS["hub"], *EXTRAS["parquet"]]
    for name in re.findall(r"^[\w-]+", requirement)
}
LIBRARIES = {
    "codesign": CORE_LIBRARIES,
    "codesign.models": CORE_LIBRARIES,
    "codesign.hw": CORE_LIBRARIES | {"pydantic"},
    "codesign.experiments": DECLARED,
    ENTRY_POINT: set(),
}
JAX_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "chex"}
NUMPY_ONLY = [
    "codesign.references",
    "codesign.hw.acceltran_cycle",
    "codesign.hw.acceltran_cycle_energy",
    "codesign.hw.acceltran_estimator",
    "codesign.hw.emulator",
    "codesign.hw.export",
    "codesign.hw.gemm.machine_file",
    "codesign.hw.gemm.timeloop",
    "codesign.hw.loop_order",
    "codesign.hw.row_counts",
    "codesign.hw.row_simulator",
    "codesign.hw.sanger_estimator",
    "codesign.hw.scaling",
    "codesign.hw.simulation",
    "codesign.hw.simulator",
    "codesign.hw.spec",
    "codesign.hw.tile_counts",
    "codesign.hw.tile_simulator",
    "codesign.hw.tool_models",
    "codesign.experiments.peer_tools",
]

FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "misc.py"}
MAX_LINES = 500


def folder(package: str) -> Path:
    """Where the packaging takes `package` from."""
    if package in PACKAGE_DIR:
        return ROOT / PACKAGE_DIR[package]
    parent, _, name = package.rpartition(".")
    return folder(parent) / name


def module_name(package: str, path: Path) -> str:
    return package if path.stem == "__init__" else f"{package}.{path.stem}"


SOURCES = {
    module_name(package, path): path
    for package in PACKAGES
    for path in sorted(folder(package).glob("*.py"))
}
MODULES = {*SOURCES, *PACKAGES, *RANK}
TESTS = sorted((ROOT / "tests").glob("*.py"))


def layer_of(module: str) -> str:
    """The layer a module of ours belongs to: the longest package name that leads to it."""
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len)


def imported_names(source: str) -> list[tuple[int, str]]:
    """Line and full dotted name of every import, `from . import x` as `.x`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                found += [(node.lineno, alias.name) for alias in node.names]
            case ast.ImportFrom():
                base = "." * node.level + (node.module or "")
                base += "" if base.endswith(".") else "."
                found += [(node.lineno, base + alias.name) for alias in node.names]
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found.append((node.lineno, name))
    return found


def target_module(name: str) -> str:
    """The module of ours that a dotted name lives in: `codesign.a.f` gives `codesign.a`."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


def rank_of(module: str) -> int | None:
    """The place of a module of the core layer in `ORDER`."""
    return RANK.get(".".join(module.split(".")[:2]))


def violations(module: str, source: str) -> list[str]:
    """Every import in `source` that `module` may not make."""
    found = []
    layer = layer_of(module)
    for line, name in imported_names(source):
        top = name.split(".")[0]
        if name.startswith("."):
            found.append(f"{module}:{line}: relative import of `{name}`")
        elif top != "codesign":
            if top not in sys.stdlib_module_names and top not in LIBRARIES[layer]:
                found.append(f"{module}:{line}: `{top}` is not among the libraries of {layer}")
        elif (target := target_module(name)) == "codesign":
            if name != "codesign.__version__":
                found.append(f"{module}:{line}: `{name}` must come from the module that defines it")
        elif layer_of(target) != layer and layer_of(target) not in LAYERS[layer]:
            found.append(f"{module}:{line}: {layer} must not import {layer_of(target)}")
        elif layer == layer_of(target) == "codesign":
            own, other = rank_of(module), rank_of(target)
            if own is not None and other is not None and other > own:
                found.append(f"{module}:{line}: upward import of `{target}`")
    return found


def imported_modules(module: str) -> set[str]:
    """Our modules that importing `module` runs directly, parent packages included."""
    names = {name for _, name in imported_names(SOURCES[module].read_text())}
    direct = {target_module(name) for name in names if name.split(".")[0] == "codesign"}
    parents = {
        ".".join(name.split(".")[:depth])
        for name in direct | {module}
        for depth in range(1, name.count(".") + 1)
    }
    return (direct | parents) - {module}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    assert not violations(module, SOURCES[module].read_text())


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("codesign.gates", "from . import units", "relative"),
        ("codesign.gates", "from .units import BITS_PER_BYTE", "relative"),
        ("codesign.errors", "import codesign.workload", "upward"),
        ("codesign.workload", "def f():\n    from codesign.mechanisms import x", "upward"),
        ("codesign.policy", "from codesign import mechanisms", "upward"),
        ("codesign.workload", "from codesign.hw import x", "must not import codesign.hw"),
        ("codesign.models.a", "import codesign.hw", "must not import codesign.hw"),
        ("codesign.hw.a", "from codesign import models", "must not import codesign.models"),
        ("codesign.hw.a", "import codesign.experiments", "must not import"),
        ("codesign.hw.a", "import_module('codesign.models')", "must not import"),
        ("codesign.models.a", "from codesign import CodesignError", "that defines it"),
        ("codesign.models.a", "import pydantic", "not among the libraries"),
        ("codesign.hw.a", "from scipy import special", "not among the libraries"),
        ("codesign.experiments.a", "import models", "not among the libraries"),
        ("codesign.experiments.a", "import pandas", "not among the libraries"),
    ],
)
def test_bad_import_is_found(module, source, message):
    (found,) = violations(module, source)
    assert message in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("codesign.workload", "import json, jax\nfrom codesign.errors import CodesignError"),
        ("codesign.mechanisms.a", "from codesign.workload import x"),
        ("codesign.hw.a", "import pydantic\nfrom codesign import workload, __version__"),
        ("codesign.experiments.a", "import tyro, sklearn\nfrom codesign import hw, models"),
    ],
)
def test_good_import_passes(module, source):
    assert not violations(module, source)


def test_core_modules_are_ranked():
    names = {name.split(".")[1] for name in SOURCES if layer_of(name) == "codesign" != name}
    assert names <= set().union(*ORDER), "place new modules of the core layer in ORDER"


def test_imports_have_no_cycle():
    # A package's `__init__` runs before its modules, so only what it imports itself can loop.
    graph = {
        module: {
            target_module(name)
            for _, name in imported_names(path.read_text())
            if name.split(".")[0] == "codesign"
        }
        for module, path in SOURCES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_numpy_only_modules_reach_no_jax():
    for start in NUMPY_ONLY:
        reached, waiting = set(), [start]
        while waiting:
            module = waiting.pop()
            if module not in reached:
                reached.add(module)
                waiting += imported_modules(module)
        for module in sorted(reached):
            libraries = {
                name.split(".")[0] for _, name in imported_names(SOURCES[module].read_text())
            }
            assert not libraries & JAX_LIBRARIES, f"{start} reaches JAX through {module}"


@pytest.mark.parametrize("path", [*SOURCES.values(), *TESTS], ids=lambda path: path.name)
def test_file_is_one_idea(path):
    assert path.name not in FORBIDDEN_NAMES
    assert len(path.read_text().splitlines()) <= MAX_LINES, "split the file"


def test_every_source_file_is_packaged():
    on_disk = {
        Path(directory) / name
        for package in PACKAGE_DIR
        for directory, _, names in os.walk(folder(package), followlinks=False)
        for name in names
        if name.endswith(".py")
    }
    assert on_disk == set(SOURCES.values())


@pytest.mark.parametrize("package", PACKAGES)
def test_package_has_docstring(package):
    assert ast.get_docstring(ast.parse(SOURCES[package].read_text()))


def test_package_data_exists():
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list(folder(package).glob(pattern)), f"{package}: nothing matches {pattern}"


def test_links_and_packaging_agree():
    links = {
        f"codesign.{path.name}": os.readlink(path)
        for path in (ROOT / "codesign").iterdir()
        if path.is_symlink()
    }
    mapping = {name: f"../{path}" for name, path in PACKAGE_DIR.items() if name != "codesign"}
    assert links == mapping
    assert set(LAYERS) - {ENTRY_POINT} == set(PACKAGE_DIR) <= set(PACKAGES)


@pytest.mark.parametrize("name", ["models", "hw", "experiments"])
def test_folder_refuses_to_be_imported_by_its_own_name(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / name / "__init__.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=f"`codesign.{name}`"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
