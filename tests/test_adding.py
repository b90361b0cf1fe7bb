"""The page on adding a mechanism and a machine does what it says, as it stands there."""

import re
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import fast_cost

from codesign.experiments.traced import gemm_shapes, trace_of
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import ModelShape
from codesign.hw.operating_points import closed_form_workload, published_setting
from codesign.hw.simulator import simulate
from codesign.hw.spec import load_preset
from codesign.hw.surrogate import SCOPES
from codesign.mechanisms import MECHANISMS
from codesign.references import REFERENCES
from codesign.vocabulary import ATTENTION_OPERATIONS, MECHANISM_OPERATIONS

PAGE = Path(__file__).parents[1] / "docs" / "adding.md"
SHAPE = ModelShape(num_layers=1, num_tokens=512, num_heads=1, head_dim=64, width=64, hidden=64)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.S | re.M)


def module(name: str, text: str) -> types.ModuleType:
    made = types.ModuleType(name)
    exec(compile(text, f"{PAGE.name}: {name}", "exec"), made.__dict__)
    return made


@pytest.fixture
def tests_of_the_page(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    source, reference, line, tests = blocks("python")
    entry = eval(f"{{{line}}}", {"ATTENTION_OPERATIONS": ATTENTION_OPERATIONS})
    for name, operations in entry.items():
        monkeypatch.setitem(MECHANISM_OPERATIONS, name, operations)
        monkeypatch.setitem(MECHANISMS, name, getattr(module(name, source), name))
        monkeypatch.setitem(REFERENCES, name, getattr(module(name, reference), name))
    return module("test_window", tests)


def test_the_tests_of_the_page_pass(tests_of_the_page: Any) -> None:
    found = [
        getattr(tests_of_the_page, name) for name in dir(tests_of_the_page) if name[:5] == "test_"
    ]
    assert len(found) == 4
    for test in found:
        test()


def test_the_machines_of_the_page_load(tests_of_the_page: Any, tmp_path: Path) -> None:
    window, wide = (tmp_path / name for name in ("window.toml", "energon-wide.toml"))
    for path, text in zip((window, wide), blocks("toml"), strict=True):
        path.write_text(text)
    spec = load_preset(window)
    price = fast_cost(
        closed_form_workload(spec, SHAPE, published_setting(spec)), accelerator_from_spec(spec)
    )
    area = spec.operating_point.area
    assert float(price.area_mm2("attention")) == pytest.approx(area.value, abs=1e-3)
    sizes = {
        name: accelerator_from_spec(load_preset(name)).sizes for name in ("energon", str(wide))
    }
    ratios = {name: float(sizes[str(wide)][name] / size) for name, size in sizes["energon"].items()}
    changed = {name: ratio for name, ratio in ratios.items() if ratio != 1.0}
    assert changed == {"qk.lanes": 2.0, "dram.bytes_per_cycle": 0.5}
    # The simulator takes the mask of a mechanism that it has no rule for.
    model = tiny_model.random_model("decoder")
    policy = tests_of_the_page.policy_of(model, 2.0)
    deployment, output = tiny_model.run_hard(model, policy, model.inputs, mechanism="window")
    shape = deployment.structure
    batch: Any = SimpleNamespace(tensors=output.trace, inputs=model.inputs)
    found = simulate(
        trace_of(deployment, batch), spec, gemm_shapes(shape), is_causal=shape.is_causal
    )
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), output.workload)
    expected = fast_cost(single, accelerator_from_spec(spec))
    for scope in SCOPES:
        np.testing.assert_allclose(found.energy_pj(scope), expected.energy_pj(scope), rtol=1e-5)
