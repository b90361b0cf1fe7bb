"""Data parallel over two devices: the same metrics as on one, for the project's models and for models of one's own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NUM_STEPS, BATCH_SIZE = 4, 8
# Sums over the batch are taken in another order: a few float32 roundings, and what four steps make of them.
RELATIVE, ABSOLUTE = 1e-4, 1e-6


@pytest.fixture(scope="module")
def results() -> Any:
    flags = (
        "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__).with_name("sharded_steps.py"))],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == 2
    return found


@pytest.mark.parametrize("kind", ["project", "foreign"])
def test_two_devices_give_the_metrics_of_one(results: Any, kind: str) -> None:
    one, mesh = results[kind]["one"], results[kind]["mesh"]
    # The examples are really cut in two, and the step compiles once either way.
    assert (one["shards"], mesh["shards"]) == ([BATCH_SIZE], [BATCH_SIZE // 2] * 2)
    assert one["compilations"] == mesh["compilations"] == 1
    assert len(one["steps"]) == NUM_STEPS
    for alone, together in zip(one["steps"], mesh["steps"], strict=True):
        assert alone.keys() == together.keys() and {"task", "ratio", "outputs"} <= alone.keys()
        assert alone["is_finite"] and together["is_finite"]
        for name in alone:
            np.testing.assert_allclose(
                together[name], alone[name], rtol=RELATIVE, atol=ABSOLUTE, err_msg=name
            )
    for name, knob in one["policy"].items():
        np.testing.assert_allclose(mesh["policy"][name], knob, rtol=RELATIVE, atol=1e-4)
    # It did train.
    assert one["steps"][0]["task"] != one["steps"][-1]["task"]
