"""AccelTran's cycle-level simulator: published runs, its slips one by one, the same machine cycle by cycle, refusals."""

import dataclasses
import json
import math
import os
import random
from pathlib import Path

import pytest
from acceltran_ticks import Stuck, Ticks

from codesign.errors import CodesignError, PresetError, UnknownNameError
from codesign.experiments.cli import main
from codesign.experiments.reference_tables import read_table
from codesign.experiments.validate_acceltran import bert
from codesign.experiments.validate_acceltran_cycle import CYCLE_COLUMNS, simulated
from codesign.hw.acceltran_buffers import Buffer
from codesign.hw.acceltran_cycle import Activity, simulate
from codesign.hw.acceltran_cycle_energy import cycle_energy_nj
from codesign.hw.acceltran_estimator import Layer, Machine
from codesign.hw.acceltran_issue import Pool
from codesign.hw.acceltran_program import lower
from codesign.hw.spec import load_preset

EDGE, LOW_POWER, SERVER = (
    Machine.from_spec(load_preset(f"acceltran-{name}")) for name in ("edge", "edge-lp", "server")
)
NUM_TOKENS = 128
WORD_BITS = 20


def run(
    layers: list[Layer], machine: Machine = EDGE, *, activations: float = 0.5, weights: float = 0.5
) -> Activity:
    return simulate(
        layers,
        machine,
        num_tokens=NUM_TOKENS,
        activation_sparsity=activations,
        weight_sparsity=weights,
    )


# --- published runs of the repository jha-lab/acceltran (commit ea7ba16)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("layers", "machine", "cycles"),
    [
        (bert("bert_tiny"), EDGE, 79_324),
        (bert("bert_tiny"), LOW_POWER, 93_540),
        (bert("bert_tiny"), SERVER, 9_514),
        (bert("bert_nano"), EDGE, 15_046),
        (bert("bert_base")[:1], SERVER, 73_020),
    ],
)
def test_published_cycles(layers: list[Layer], machine: Machine, cycles: int):
    assert run(layers, machine).cycles == cycles


def test_published_energies_of_bert_tiny_on_edge():
    spent = cycle_energy_nj(run(bert("bert_tiny")), EDGE, weight_sparsity=0.5)
    assert sum(spent.values()) == pytest.approx(1_425_719.5, abs=0.05)
    for part, published in (
        ("mac_dynamic", 58_387.65),
        ("softmax_leakage", 1_999.48),
        ("mask_store", 2_519.25),
        ("weight_buffer_leakage", 168_309.31),
    ):
        assert spent[part] == pytest.approx(published, abs=0.005), part


def test_every_run_of_the_reference_results():
    folder = os.environ.get("CODESIGN_VALIDATION")
    if not folder:
        pytest.skip("set CODESIGN_VALIDATION to the folder of reference results")
    table = read_table(Path(folder) / "acceltran_runs.csv").where("simulator_mode", "cycle")
    for wanted in table:
        (name,) = wanted.texts("name")
        found = simulated(wanted)
        assert found.activity.cycles == wanted.size("cycles"), name
        transfers = found.activity.transfer_cycles
        assert transfers["weight"] == wanted.size("wgt_load_busy_cycles"), name
        assert transfers["activation"] == wanted.size("act_store_busy_cycles"), name
        for column, part in CYCLE_COLUMNS.items():
            # Half the last of two decimals, and buffer sizes that are given to four.
            published = pytest.approx(wanted.number(column), abs=0.005, rel=1e-4)
            assert found.energy_nj[part] == published, (name, part)


# --- slips, each by a case worked by hand


def test_weight_sparsity_never_shortens_computation():
    dense, sparse = (run(bert("bert_tiny"), weights=weights) for weights in (0.4, 0.9))
    assert dense.busy_cycles == sparse.busy_cycles
    assert dense.transfer_cycles["weight"] > 5 * sparse.transfer_cycles["weight"]


def test_memory_bound_and_a_mask_priced_as_its_weights():
    activity = run(bert("bert_tiny"))
    # Embedding 30,650 x 128; per head 4 weights of 128 x 64 and per layer 2 of 128 x 512, all times the batch of 4.
    elements = 30_650 * 128 + 2 * (2 * 4 * 4 * 128 * 64 + 2 * 4 * 128 * 512)
    assert activity.loaded == elements
    # At 10 bits an element and 785.365 bits a cycle.
    assert activity.transfer_cycles["weight"] == 49_954 + 16 * 418 + 4 * 3_338
    spent = cycle_energy_nj(activity, EDGE, weight_sparsity=0.5)
    assert spent["weight_load"] == pytest.approx(13.43777522 * elements * 0.5 / 64)
    assert spent["mask_load"] == spent["weight_load"]


def test_every_ninth_operation_outside_heads_runs_twice():
    busy = run(bert("bert_tiny")).busy_cycles
    # 4,096 MACs on 16 multipliers, half of them zero: 128 cycles. A head has 6 products of 1,024 tile operations.
    heads = 2 * 2 * 6 * 1024 * 128
    # A run of n outside heads is issued 9 for every 8, but for the last group, which the next kind cuts to 8.
    products = 2 * 2 * (8192 // 8 * 9 - 1) * 128
    nonlinearities = 2 * ((256 // 8 * 9 - 1) + (1024 // 8 * 9 - 1))
    assert busy["lane"] == heads + products + nonlinearities == 7_866_684
    # Two norms of 256 in each layer, and the program's last tile operation once more; 32 / 2 cycles each.
    assert busy["norm"] == (4 * (256 // 8 * 9 - 1) + 1) * 16


def test_a_softmax_operation_occupies_its_processing_element():
    # 256 tile operations for each of 4 heads take 16 x 16 / 2 cycles of all 4 units of an element.
    assert run(bert("bert_tiny")).busy_cycles["softmax"] == 4 * 256 * 4 * 128
    pool = Pool(size=2, width=4)
    assert pool.has_free(2) and not pool.has_free(9)
    with pytest.raises(CodesignError, match="3 softmax operations need a processing element each"):
        pool.has_free(3)


def test_a_unit_is_held_one_cycle_longer_than_it_is_paid_for():
    pool = Pool(size=1)
    pool.take(1, 3, now=10)
    free = []
    for now in range(10, 16):
        pool.advance(now)
        free.append(pool.has_free(1))
    assert free == [False] * 4 + [True] * 2
    assert pool.busy == 3


def test_room_is_compared_with_the_wrong_data_and_the_oldest_leave_first():
    def buffer() -> Buffer:
        one = Buffer(
            name="weight", capacity=100.0, element_bits=1.0, load_bandwidth=7, store_bandwidth=50
        )
        # 51 / 7 rounded up; stores go at the buffer's own bandwidth.
        assert one.enter("old", 51, 0, lambda data: False, is_load=True) == 8
        assert one.enter("new", 30, 8, lambda data: False, is_load=False) == 1
        return one

    one = buffer()
    assert not one.has_room("large", 60, lambda data: True)
    # 49 of 100 are not required; the last data are of 30, so 60 are let in, for which there is no room.
    assert one.has_room("large", 60, lambda data: data == "old")
    with pytest.raises(CodesignError, match="no room for `large`"):
        one.enter("large", 60, 9, lambda data: data == "old", is_load=True)
    one = buffer()
    one.enter("large", 60, 9, lambda data: False, is_load=True)
    assert list(one.held) == ["new", "large"] and one.used == 90
    with pytest.raises(CodesignError, match="`huge` of 13 bytes does not fit"):
        one.has_room("huge", 101, lambda data: False)


def test_a_bandwidth_does_not_know_the_word():
    wide, narrow = (
        simulate(
            bert("bert_tiny"),
            EDGE,
            num_tokens=NUM_TOKENS,
            activation_sparsity=0.5,
            weight_sparsity=0.5,
            word_bits=bits,
        )
        for bits in (20.0, 10.0)
    )
    assert wide.busy_cycles == narrow.busy_cycles
    assert wide.transfer_cycles["weight"] == pytest.approx(
        2 * narrow.transfer_cycles["weight"], rel=1e-3
    )


# --- conservation


@pytest.mark.parametrize("group", [2, 8, 32])
@pytest.mark.parametrize("model", ["bert_nano", "bert_tiny"])
def test_work_is_that_of_the_program(model: str, group: int):
    machine = dataclasses.replace(EDGE, issue_group=group)
    layers = bert(model)
    activity = run(layers, machine, activations=0.3)
    program = lower(layers, machine, num_tokens=NUM_TOKENS, activation_sparsity=0.3)
    streams = [stream for block in program.blocks for stream in block]
    transfers = [one for stream in streams for one in stream.transfers]
    stored = [one.elements for one in transfers if one.producer is not None]
    loaded = [one.elements for one in transfers if one.producer is None]
    loaded.append(program.embedding.elements)
    assert activity.stored == sum(stored) and activity.loaded == sum(loaded)
    bits, bandwidth = WORD_BITS * 0.7, EDGE.constants.buffer_bandwidth.value
    assert activity.transfer_cycles["activation"] == sum(
        math.ceil(elements * bits / bandwidth) for elements in stored
    )
    lanes = 0
    for block in program.blocks:
        for one in (one for stream in block for one in stream.operations):
            if one.kind in ("product", "nonlinearity"):
                assert one.count % group == 0
                issued = one.count if len(block) > 1 else one.count // group * (group + 1) - 1
                lanes += issued * one.service
    assert activity.busy_cycles["lane"] == lanes
    # Every issue holds a lane for a cycle more than it is paid for, and lanes are finite.
    assert lanes < EDGE.processing_elements * EDGE.lanes * activity.cycles


# --- the same machine cycle by cycle


def small_case(seed: int) -> tuple[list[Layer], Machine, int, float, float]:
    """A small model on a small machine: buffers that overflow, groups that do not divide the tile operations."""
    draw = random.Random(seed)
    spec = EDGE.spec
    assert spec.estimator is not None
    few = spec.estimator.vocabulary.model_copy(update={"value": 40})
    estimator = spec.estimator.model_copy(update={"vocabulary": few})
    tile = draw.choice([8, 16])
    machine = dataclasses.replace(
        EDGE,
        spec=spec.model_copy(update={"estimator": estimator}),
        processing_elements=draw.choice([2, 4, 6]),
        lanes=draw.choice([2, 4]),
        softmax_units=draw.choice([1, 2, 3]),
        tile_b=draw.choice([1, 1, 2]),
        tile_x=tile,
        tile_y=tile,
        batch=draw.choice([1, 2, 3]),
        activation_mb=draw.uniform(0.01, 0.06),
        weight_mb=draw.uniform(0.01, 0.08),
        mask_mb=draw.uniform(0.001, 0.01),
        issue_group=draw.choice([1, 2, 2, 3]),
        bandwidth=draw.choice([100.0, 785.365, 7853.65]),
    )
    heads = draw.choice(
        [["sa_sdp_16"], ["sa_sdp_16", "sa_wma_8"], ["sa_sdp_16", "l_dft_8", "c_5_8"]]
    )
    width = draw.choice([16, 32, 48])
    layers = [
        Layer(
            width=own,
            heads=tuple(draw.choice(heads) for _ in range(draw.choice([2, 3]))),
            hidden=tuple(draw.choice([32, 64]) for _ in range(draw.choice([1, 2]))),
        )
        for own in draw.choice([(width, width), (width, 2 * width)])
    ]
    sparsity = draw.choice([0.0, 0.5, 0.9])
    return layers, machine, draw.choice([16, 20, 32]), draw.choice([0.0, 0.3, 0.9]), sparsity


def ticks(seed: int) -> Ticks:
    layers, machine, tokens, activations, weights = small_case(seed)
    program = lower(layers, machine, num_tokens=tokens, activation_sparsity=activations)
    return Ticks(program, machine, WORD_BITS * (1.0 - activations), WORD_BITS * (1.0 - weights))


def jumps(seed: int) -> Activity:
    layers, machine, tokens, activations, weights = small_case(seed)
    return simulate(
        layers,
        machine,
        num_tokens=tokens,
        activation_sparsity=activations,
        weight_sparsity=weights,
    )


# All evict; in 12 groups of 3 pass tile operations over; 1, 22 and 56 go on to another width.
@pytest.mark.parametrize("seed", [1, 11, 12, 22, 27, 34, 50, 56])
def test_jumping_equals_every_cycle(seed: int):
    expected, found = ticks(seed), jumps(seed)
    assert found.cycles == expected.cycles
    assert found.busy_cycles == expected.busy
    assert found.transfer_cycles == expected.moved


# Waits without end, no room beside what is required, data too large, softmax without an element.
@pytest.mark.parametrize("seed", [0, 6, 17, 45, 5, 52])
def test_what_stops_or_never_ends_is_refused(seed: int):
    with pytest.raises(Stuck):
        ticks(seed)
    with pytest.raises(CodesignError):
        jumps(seed)


# --- refusals


def refuse(layers: list[Layer], machine: Machine, words: str) -> None:
    with pytest.raises(CodesignError, match=words):
        run(layers, machine)


def test_what_its_simulator_cannot_run_is_refused():
    refuse(bert("bert_base")[:1], EDGE, "`embedding` of 29,424,000 bytes does not fit the weight")
    refuse([Layer(width=64, heads=("sa_sdp_64",), hidden=(64,))], EDGE, "1 head")
    refuse([Layer(width=64, heads=("c_9_8",) * 2, hidden=(64,))], edge(tile=8), "never ends")
    # 64 tile operations of a projection do not fill a group of 128, which takes half of the next along.
    refuse(bert("bert_nano"), SERVER, "never ends here")
    # 21 groups of 3 leave one of 64 processing elements, whose 4 softmax units pass for room for another 3.
    refuse(bert("bert_tiny"), dataclasses.replace(EDGE, issue_group=3), "a processing element each")
    with pytest.raises(CodesignError, match=r"`weight_sparsity` must lie in \[0, 1\)"):
        run(bert("bert_tiny"), weights=1.0)
    with pytest.raises(PresetError, match=r"estimator\.issue_group"):
        run(bert("bert_tiny"), dataclasses.replace(EDGE, issue_group=None))
    with pytest.raises(UnknownNameError, match="unknown operator `sa_foo_8`"):
        run([Layer(width=64, heads=("sa_foo_8",) * 2, hidden=(64,))])


def edge(*, tile: int) -> Machine:
    return dataclasses.replace(EDGE, tile_x=tile, tile_y=tile)


BERT_TINY = ("--tokens", "128", "--layers", "2", "--heads", "2", "--head-dim", "64") + (
    *("--width", "128", "--hidden", "512"),
)


def test_command_prints_the_run(capsys: pytest.CaptureFixture[str]):
    arguments = ["cost", "acceltran-edge", "--simulator", "acceltran", *BERT_TINY]
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["latency_cycles"] == 79_324 and record["batch"] == 4
    assert record["energy_pj"] == pytest.approx(1_425_719.5e3, abs=50.0)
    assert sum(record["energy_pj_by_part"].values()) == pytest.approx(record["energy_pj"])
    # Published: 0.09685 and 0.819.
    assert record["utilisation_by_unit"]["lane"] == pytest.approx(0.09685, abs=5e-6)
    assert record["peak_use_by_buffer"]["weight"] == pytest.approx(0.819, abs=5e-5)
    assert main([*arguments, "--batch", "1"]) == 0
    assert "58,244 cycles" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "options", "words"),
    [
        ("acceltran-edge", ("--simulator", "acceltran", "--width", "768"), "does not fit"),
        ("acceltran-edge", ("--batch", "2"), "goes with `--simulator acceltran`"),
        ("acceltran-edge", ("--simulator", "acceltran", "--batch", "0"), "at least 1, got 0"),
        ("energon", ("--simulator", "acceltran"), "needs the tables `estimator`"),
    ],
)
def test_command_refuses(
    capsys: pytest.CaptureFixture[str], preset: str, options: tuple[str, ...], words: str
):
    assert main(["cost", preset, *options]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert not printed.out and words in line
