"""The JAX hard path against the NumPy emulator on trained weights: more than 1e7 decisions of each mechanism and model."""

from typing import Any

import jax
import numpy as np
import pytest

from codesign.calibration import Calibration
from codesign.errors import CheckpointError
from codesign.experiments.checkpoint_sources import MINILM, checkpoint_folder
from codesign.experiments.checkpoints import load_checkpoint
from codesign.experiments.configs import digits
from codesign.experiments.data import Examples
from codesign.experiments.evaluate import hard_chunks
from codesign.experiments.problem import load_problem
from codesign.experiments.teacher import calibrate, own_ranges
from codesign.hw import emulator
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.export import first_difference
from codesign.hw.spec import load_preset
from codesign.mechanisms import mechanism_by_name
from codesign.models.config import ModelConfig
from codesign.models.deploy import harden
from codesign.policy import Policy, dense_knobs
from codesign.references import reference_by_name

MECHANISMS = pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("energon", "energon"),
        ("acceltran", "acceltran-edge"),
        ("sofa", "sofa"),
        ("lapa", "lapa"),
        ("esact", "esact"),
        ("topk", "topk"),
        ("bitserial", "bitserial"),
        ("sanger", "sanger"),
        ("a3", "a3"),
        ("spatten", "spatten"),
        ("fact", "fact"),
    ],
)
STRENGTHS = {"spatten": (0.05, 0.2)}
"""Strengths of random thresholds that leave decisions of both kinds, where shares add up over layers."""
NUM_TOKENS = 128
LENGTHS = (128, 128, 128, 128, 128, 128, 97, 64, 31, 1)


@pytest.mark.slow
@MECHANISMS
def test_minilm_agrees_in_every_bit(name: str, preset: str) -> None:
    try:
        checkpoint_folder(MINILM)
    except CheckpointError as error:
        pytest.skip(f"MiniLM is not installed: {error}")
    checkpoint = load_checkpoint(MINILM, num_outputs=2, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    lengths = np.asarray(LENGTHS)
    valid = np.arange(NUM_TOKENS)[None, :] < lengths[:, None]
    tokens = rng.integers(1000, 30000, valid.shape) * valid
    examples = Examples(
        inputs={"tokens": tokens.astype(np.int32), "valid": valid},
        labels=np.zeros(len(lengths), np.int32),
    )
    calibration = calibrated(checkpoint.params, checkpoint.config, examples, (NUM_TOKENS,), name)
    check(checkpoint.params, calibration, checkpoint.config, examples, (NUM_TOKENS,), name, preset)


@pytest.fixture(scope="module")
def dense_digits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_problem(digits(), cache=tmp_path_factory.mktemp("dense"), progress=False)


@pytest.mark.slow
@MECHANISMS
def test_digits_agree_in_every_bit(dense_digits: Any, name: str, preset: str) -> None:
    problem = dense_digits
    calibration = calibrated(
        problem.params, problem.config, problem.calibration_examples, problem.buckets, name
    )
    # A mechanism with one mask decides 26 thousand times an example.
    examples = problem.task.part("train").first(420)
    check(problem.params, calibration, problem.config, examples, problem.buckets, name, preset)


def calibrated(
    params: dict[str, Any],
    config: ModelConfig,
    examples: Examples,
    buckets: tuple[int, ...],
    name: str,
) -> Calibration:
    """The model's ranges and those of the mechanism."""
    calibration = calibrate(params, examples, config, buckets)
    mechanism, structure = mechanism_by_name(name), config.structure
    knobs = dense_knobs(
        structure.num_layers, linear_bits=8.0, attention_bits=16.0, end_sites=structure.end_sites
    )
    own = mechanism.knobs(structure.num_layers, structure.num_heads)
    policy = Policy(layers=knobs.layers | own, ends=knobs.ends)
    if not mechanism.own_ranges:
        return calibration
    return own_ranges(params, policy, calibration, mechanism, examples, config, buckets)


def check(
    params: Any,
    calibration: Calibration,
    config: ModelConfig,
    examples: Examples,
    buckets: tuple[int, ...],
    name: str,
    preset: str,
) -> None:
    """Random thresholds and odd widths: every tensor equal, and more than 1e7 decisions of both kinds."""
    structure, mechanism = config.structure, mechanism_by_name(name)
    knobs = dense_knobs(
        structure.num_layers, linear_bits=6.0, attention_bits=11.0, end_sites=structure.end_sites
    )
    own = mechanism.knobs(structure.num_layers, structure.num_heads)
    scale = mechanism.thresholds
    assert scale is not None
    low, high = STRENGTHS.get(name, (0.3, 0.7))
    strength = np.random.default_rng(1).uniform(low, high, own["threshold"].shape)
    ranges = {key: np.asarray(value, np.float64) for key, value in calibration.layers.items()}
    own["threshold"] = scale.from_strength(strength, ranges)
    policy = Policy(layers=knobs.layers | own, ends=knobs.ends)
    deployed = harden(params, policy, calibration, config, mechanism)
    accelerator = accelerator_from_spec(load_preset(preset))
    tokens = min(structure.max_tokens, NUM_TOKENS)
    most = max(2, 2**19 // (structure.num_heads * tokens**2))
    decisions = 0
    for chunk in hard_chunks(deployed, examples, accelerator, buckets, tracing=True, most=most):
        emulated = emulator.emulate(
            deployed.structure, deployed.layers, deployed.ends, chunk.inputs
        )
        assert first_difference(chunk.tensors, emulated) is None
        names = reference_by_name(name).decision_tensors
        decisions += sum(chunk.tensors[tensor].size for tensor in names)
        pruned = np.concatenate([np.ravel(chunk.tensors[tensor]) == 0 for tensor in names])
        assert 0.02 < np.mean(pruned) < 0.98  # decisions of both kinds
    assert decisions > 1e7
