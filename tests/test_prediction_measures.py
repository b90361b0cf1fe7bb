"""Measures of predictions, against plain loops and worked rows, and the study's command."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from codesign.errors import CodesignError
from codesign.experiments import configs, prediction_claims, prediction_measures as measures
from codesign.experiments.cli import main
from codesign.experiments.configs import Experiment, ModelSettings
from codesign.experiments.problem import Problem, outline
from codesign.models.parameters import init_params
from codesign.references.integers import Integers, exact_matmul, hybrid_log, leading_one
from codesign.references.sofa import reference_segments

ALL = np.ones((3, 24), bool)


def test_hybrid_logarithms_are_the_specifications() -> None:
    every = np.arange(1, 128)
    levels = hybrid_log(every)
    listed = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128}
    assert set(levels.tolist()) == listed
    given = {5: 6, 7: 8, 9: 8, 10: 12, 13: 12, 14: 16, 23: 24, 100: 96, 112: 128, 0: 0}
    assert hybrid_log(np.asarray(list(given))).tolist() == list(given.values())
    power = leading_one(every)
    fraction = every / power - 1
    rounded = np.where(fraction < 0.25, power, np.where(fraction < 0.75, 1.5 * power, 2 * power))
    np.testing.assert_array_equal(levels, rounded)
    np.testing.assert_array_equal(hybrid_log(-every), -levels)
    np.testing.assert_array_equal(hybrid_log(levels), levels)
    assert np.all(np.diff(hybrid_log(np.arange(2**16))) >= 0)
    products = [
        int(hybrid_log(np.asarray(a)) * hybrid_log(np.asarray(b)))
        for a, b in ((5, 7), (-11, 3), (100, 23))
    ]
    assert products == [48, -36, 2304]
    # No bit is lost near the largest 16-bit code and far above it.
    np.testing.assert_array_equal(hybrid_log(np.asarray([32767, 3 << 48])), [32768, 3 << 48])


def test_hybrid_logarithms_predict_better_than_leading_ones() -> None:
    """The specification's figures on Gaussian codes: correlation with exact scores, and recall of the top 26 of 256."""
    wanted = {"both": (0.989, 0.894), "ones": (0.962, 0.805), "one": (0.981, 0.861)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in wanted}
    exists = np.ones((256, 256), bool)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        draws = [rng.standard_normal((256, 64)) for _ in range(2)]
        query, key = (np.rint(x / np.abs(x).max() * 127).astype(np.int64) for x in draws)
        exact = query @ key.T
        rank = measures.ranks(exact, exists)
        for name, scores in (
            ("both", hybrid_log(query) @ hybrid_log(key).T),
            ("ones", leading_one(query) @ leading_one(key).T),
            ("one", leading_one(query) @ key.T),
        ):
            kept = measures.ranks(scores, exists) < 26
            recall = float(measures.found_share(kept, rank).mean())
            alike = prediction_claims.correlation(np.ravel(scores) * 1.0, np.ravel(exact) * 1.0)
            found[name].append((float(alike), recall))
    for name, (alike, recall) in wanted.items():
        mean = np.mean(found[name], axis=0)
        assert mean[0] == pytest.approx(alike, abs=0.005) and mean[1] == pytest.approx(
            recall, abs=0.02
        )


def test_segments_are_those_of_the_mechanism_where_they_divide_the_row() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(-9, 9, (2, 3, 24))
    for number in (1, 2, 4, 8):
        kept, place, segment = measures.segment_winners(scores, ALL, number)
        largest, _ = reference_segments(
            scores[None],
            ALL[None, None],
            np.asarray([256, 256]),
            np.asarray([65535] * 2),
            24 // number,
        )
        np.testing.assert_array_equal(kept, largest[0])
        np.testing.assert_array_equal(segment[0], np.arange(24) // (24 // number))
        assert place.max() == 24 // number - 1
    dealt, _, segment = measures.segment_winners(scores, ALL, 4, dealt=True)
    np.testing.assert_array_equal(segment[0], np.arange(24) % 4)
    turned = np.argsort(np.arange(24) % 4, kind="stable")
    largest, _ = reference_segments(
        scores[None][..., turned],
        ALL[None, None],
        np.asarray([256, 256]),
        np.asarray([65535] * 2),
        6,
    )
    np.testing.assert_array_equal(dealt[..., turned], largest[0])


def test_rows_of_a_decoder_have_segments_of_their_own_lengths() -> None:
    exists = np.tril(np.ones((24, 24), bool))
    scores = np.broadcast_to(np.arange(24), (1, 24, 24))
    kept, _, segment = measures.segment_winners(scores, exists, 2)
    # Of 10 keys 3 are wanted, 2 of each half: the last of each.
    assert np.flatnonzero(kept[0, 9]).tolist() == [3, 4, 8, 9]
    assert segment[9].tolist() == [0] * 5 + [1] * 5 + [2] * 14
    assert not np.any(kept & ~exists)
    assert measures.number_of(0.1, exists)[[9, 10, 19, 20]].tolist() == [1, 2, 2, 3]
    np.testing.assert_array_equal(measures.ranks(scores, exists)[0, 3, :4], [3, 2, 1, 0])


def test_distances_and_critical_rows_are_the_specifications_example() -> None:
    """Two of four keys kept there; here 15 % of 13 keys, nine of which are far below."""
    matrix = np.asarray([[9, 1, 6, 0], [8, 2, 6, 1], [1, 9, 0, 7], [9, 0, 5, 1]])
    scores = np.full((1, 8, 13), -(10**6))
    scores[0, :4, :4] = matrix
    scores[0, 4:, :4] = matrix[0]
    later, earlier = measures.window_pairs()
    distances = measures.row_distances(scores, np.ones((8, 13), bool), later, earlier)
    found = {(int(t), int(c)): 15 * d for t, c, d in zip(later, earlier, distances[0], strict=True)}
    assert found[1, 0] == pytest.approx(1) and found[2, 0] == pytest.approx(31)
    assert found[3, 0] == pytest.approx(1) and found[4, 0] == 0.0
    for threshold, critical in ((4 / 64, (0, 1, 2, 3)), (5 / 64, (0, 2)), (127 / 64, (0, 2))):
        chosen = measures.critical_rows(distances, threshold)
        assert tuple(np.flatnonzero(chosen[0, :4])) == critical
        assert not chosen[0, 4:].any()


def operands(seed: int, tokens: int) -> tuple[Integers, Integers]:
    rng = np.random.default_rng(seed)
    query, key = (rng.integers(-32767, 32768, (2, tokens, 8)) for _ in range(2))
    return query, key


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_layer_counts_every_row_once(is_causal: bool) -> None:
    query, key = operands(0, 32)
    exact = exact_matmul(query, np.swapaxes(key, 1, 2))
    sample = measures.measure_layer(query, key, exact >> 16, is_causal=is_causal)
    assert sample is not None
    rows = 32 - 15 if is_causal else 32
    total, number = sample.sums["recall.0.25.one_leading_one"]
    assert number == rows and np.all((0.5 * rows < total) & (total <= rows))
    # The chain predicts the exact scores here, but for their last bits.
    assert np.all(sample.sums["recall.0.25.chain"][0] > 0.99 * rows)
    assert np.all(sample.sums["segments.exact.1"][0] == 0.0)
    assert np.all(sample.sums["segments.exact.4"][0] > 0.0)
    assert "segments.exact.16" not in sample.sums
    assert sample.distances["adjacent"]["exact"].shape == (2, rows - 1)
    assert sample.distances["window"]["exact"].shape == (2, 28 * (2 if is_causal else 4))
    kept = sample.operations["ascending_by_key"]["exp"]
    assert sample.operations["products"]["multiply"] == 2 * 8 * kept
    assert sample.loads["128.cold"] == sample.loads["8.cold"] > sample.loads["8.reuse_aware"]
    assert measures.measure_layer(query[:, :23], key[:, :23], exact, is_causal=False) is None


def test_exact_codes_lose_nothing_and_win_nothing() -> None:
    """Powers of two are their own codes: both are exact, and no head prefers either."""
    rng = np.random.default_rng(1)
    query, key = (2 ** rng.integers(8, 15, (2, 48, 8)) for _ in range(2))
    exact = exact_matmul(query, np.swapaxes(key, 1, 2))
    sample = measures.measure_layer(query, key, exact, is_causal=False)
    assert sample is not None
    figures = prediction_claims.figures([[sample], [sample]])
    for pairs in ("adjacent", "window"):
        for code in measures.CODES:
            assert np.all(figures[f"{pairs}.error.{code}"] == 0.0)
            np.testing.assert_allclose(figures[f"{pairs}.spearman.{code}"], 1.0)
            assert np.all(figures[f"{pairs}.agree.0.25.{code}"] == 1.0)
        assert np.all(figures[f"{pairs}.hybrid_log_wins.error"] == 0.5)
    assert np.all(figures["recall.0.1.two_leading_ones"] == 1.0)
    record = prediction_claims.combined([figures, figures])
    assert record["recall.0.1.chain"] == {"mean": 1.0, "deviation": 0.0, "by_seed": [1.0, 1.0]}
    assert record["operations.first_is_largest"]["mean"] == 1.0
    nothing = prediction_claims.combined([{"f1": np.asarray([np.nan])}])
    assert nothing["f1"] == {"mean": None, "deviation": None, "by_seed": [None]}


def test_published_length_saves_what_its_tiles_decide() -> None:
    """256 keys in 4 tiles of FlashAttention: 1,292 operations; in falling order 839, joined 1,300."""
    cuts = prediction_claims.published_size()
    assert cuts["cut.unit.own.descending_in_sequence.flash"] == pytest.approx(1 - 839 / 1292)
    assert cuts["cut.unit.own.descending_joined.flash"] == pytest.approx(1 - 1300 / 1292)
    assert cuts["cut.unit.whole.descending_in_sequence.flash"] < 0.01


def small() -> Experiment:
    """One layer of the digits."""
    named = configs.digits()
    return dataclasses.replace(
        named,
        model=ModelSettings(num_layers=1, num_heads=2, head_dim=8, width=16, hidden=16),
        num_calibration=8,
    )


def untrained(experiment: Experiment, **_: Any) -> Problem:
    outlined = outline(experiment)
    initial = functools.partial(init_params, outlined.config.structure, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype),
        jax.eval_shape(initial),
    )
    return dataclasses.replace(outlined, params=params)


def test_the_command_writes_its_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(configs.EXPERIMENTS, "digits", small)
    monkeypatch.setattr(prediction_claims, "load_problem", untrained)
    out = tmp_path / "study"
    command = ["reproduce", "prediction-claims", "--out", str(out), "--num-examples", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "hybrid log" in printed and "SOFA's chain" in printed and "published: 23" in printed
    record = json.loads((out / "study.json").read_text())
    (task,) = record["tasks"]
    assert task["seeds"] == [0] and task["num_examples"] == 2 and not task["is_causal"]
    assert main(command) == 2
    assert "`--overwrite`" in capsys.readouterr().err
    assert json.loads((out / "study.json").read_text()) == record
    assert main([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == record["tasks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prediction-claims", "--tasks", "nope"), "invalid choice 'nope' for argument '--tasks'"),
        (("prediction-claims", "--tasks", "digits", "digits"), "`--tasks` must differ"),
        (("prediction-claims", "--seeds", "0", "0"), "`seeds` must be different whole numbers"),
        (("prediction-claims", "--seeds", "-1"), "`seeds` must be different whole numbers"),
        (
            ("prediction-claims", "--num-examples", "0"),
            "`--num-examples` must be at least 1, got 0",
        ),
        (("prediction-claims", "--tasks", "digits", "mnist", "--data", "x"), "folder of one task"),
        (("prediction-claims", "--tasks", "mnist", "--data", "nowhere"), "nowhere"),
        (("acceltran-sst2", "--tasks", "digits"), "leave out `--tasks`"),
        (("acceltran-sst2", "--seeds", "0", "1"), "takes one seed"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *arguments, "--out", str(tmp_path / "study")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("codesign: error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tasks_of_short_examples_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prediction_claims, "load_problem", lambda *_, **__: None)
    monkeypatch.setattr(prediction_claims, "samples", lambda problem, number: iter(()))
    with pytest.raises(CodesignError, match="no example of `digits` has 24 tokens"):
        prediction_claims.study(["digits"], [0], [1], data=None, cache=tmp_path, progress=False)


def test_the_older_study_takes_its_seed_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {name: 0.5 for name in ("accuracy", "sparsity", "sparsity_with_padding")}
    row |= {f"published_{name}": 0.25 for name in ("accuracy", "sparsity")}
    seen = []

    def stub(experiment: Experiment, **_: Any) -> str:
        seen.append((experiment.task, experiment.mechanism, experiment.seed))
        return "problem"

    monkeypatch.setattr("codesign.experiments.problem.load_problem", stub)
    monkeypatch.setattr(
        "codesign.experiments.acceltran_sst2.study",
        lambda problem: [row | {"method": "top-k", "setting": 1}],
    )
    monkeypatch.setattr("codesign.experiments.acceltran_sst2.draw_study", lambda rows, path: None)
    command = ["reproduce", "acceltran-sst2", "--seeds", "3", "--out", str(tmp_path), "--json"]
    assert main(command) == 0
    assert seen == [("sst2", "acceltran", 3)]
    assert json.loads(capsys.readouterr().out)[0]["accuracy"] == 0.5
    assert main(command) == 2 and "`--overwrite`" in capsys.readouterr().err
