"""The package as installed: what it exports and that all of it imports."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import codesign

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("name", codesign.__all__)
def test_exported_name_resolves(name):
    assert getattr(codesign, name) is not None
    assert name in dir(codesign)


def test_exports_come_from_below_experiments():
    assert not [m for m in codesign._EXPORTS.values() if m.startswith("codesign.experiments")]


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = codesign.nothing_of_the_kind


def test_every_module_imports():
    modules = [m.name for m in pkgutil.walk_packages(codesign.__path__, "codesign.")]
    packages = ("mechanisms", "references", "models", "hw", "experiments")
    assert {f"codesign.{name}" for name in packages} <= set(modules)
    for name in modules:
        importlib.import_module(name)


def test_importing_the_packages_does_not_import_jax():
    program = (
        "import sys, codesign, codesign.models, codesign.hw, codesign.experiments\n"
        "assert not {'jax', 'flax', 'optax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
