"""Files of dense machines: parsed strictly, faults in one line; mappings in Timeloop's form."""

import dataclasses
import json

import numpy as np
import pytest

from codesign.errors import DataError, PresetError, UnknownNameError
from codesign.hw.gemm.machine import machine_from_file
from codesign.hw.gemm.machine_file import (
    MACHINE_FOLDER,
    GemmSwitches,
    MachineFile,
    json_schema,
    load_machine,
    machine_names,
    parse_machine,
)
from codesign.hw.gemm.names import CONVOLUTION, MATMUL
from codesign.hw.gemm.timeloop import parse_mappings

TEXT = (MACHINE_FOLDER / "gemmini.toml").read_text()


@pytest.mark.parametrize("name", machine_names())
def test_shipped_machines_load(name: str):
    file = load_machine(name)
    machine = machine_from_file(file)
    assert file.name == name == machine.structure.name
    assert [level.name for level in machine.structure.levels] == list(file.levels)
    assert {f.name for f in dataclasses.fields(machine.structure.switches)} == set(
        GemmSwitches.model_fields
    )


def test_sizes_are_those_of_the_file():
    sizes = {
        name: float(size) for name, size in machine_from_file(load_machine("gemmini")).sizes.items()
    }
    assert sizes == {
        "side": 16.0,
        "registers.words_per_cycle": 10_000.0,
        "accumulator.bytes": 32 * 1024.0,
        "accumulator.words_per_cycle": 2.0,
        "scratchpad.bytes": 128 * 1024.0,
        "scratchpad.words_per_cycle": 2.0,
        "dram.words_per_cycle": 8.0,
    }


def test_prices_and_rates_may_be_by_byte():
    """A word of the accumulator has 4 byte."""
    text = TEXT.replace('value = 1.94, unit = "pJ/word"', 'value = 0.485, unit = "pJ/B"')
    text = text.replace('value = 2, unit = "word/cycle/instance"', 'value = 8, unit = "B/cycle"')
    machine = machine_from_file(parse_machine(text, origin="mine.toml"))
    level = machine.structure.levels[1]
    assert (level.base_pj, level.rate_per) == (1.94, "machine")
    assert float(machine.sizes["accumulator.words_per_cycle"]) == 2.0


FAULTS = {
    "no unit": ('{ value = 16, unit = "1", source', "16 #", ["mesh.side.size", "has no unit"]),
    "wrong unit": ('unit = "pJ/word/KB"', 'unit = "pJ"', ["energy_slope", '"pJ/word/KB" or']),
    "stray key": ("tiles = ", "tile = ", ["levels.registers.tile", "did you mean `tiles`?"]),
    "missing switch": ("whole_steps = ", "# ", ["switches.whole_steps", "add `whole_steps`"]),
    "unknown tensor": ('holds = ["weights"]', 'holds = ["weight"]', ["`weight`", "`weights`?"]),
    "unknown side": ('fanout = "side"', 'fanout = "sides"', ["unknown side `sides`", "`side`?"]),
    "fan-out of nothing": ('spreads = ["C"]', "spreads = []", ["`fanout` and `spreads` belong"]),
    "no main memory": (
        'holds = ["weights", "inputs", "outputs"]',
        'holds = ["weights"]',
        ["the last one is main memory"],
    ),
    "unknown loop": ('spreads = ["C"]', 'spreads = ["X"]', ["unknown name `X`", "use one of R"]),
    "share above one": ("value = 0.654", "value = 6.54", ["`multiplier_share`", "[0, 1]"]),
    "not TOML": ("[mesh.side]", "[mesh.side", ["not valid TOML"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line_with_file_place_and_remedy(fault: str):
    old, new, words = FAULTS[fault]
    assert old in TEXT
    with pytest.raises(PresetError, match="mine.toml: ") as caught:
        parse_machine(TEXT.replace(old, new), origin="mine.toml")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_fill_and_drain_needs_its_table():
    start, end = TEXT.index("[exchange]"), TEXT.index("[switches]")
    text = TEXT[:start] + TEXT[end:]
    parse_machine(text, origin="mine.toml")
    text = text.replace("fill_and_drain = { value = false", "fill_and_drain = { value = true")
    with pytest.raises(PresetError, match="`switches.fill_and_drain` needs `exchange`: add it"):
        parse_machine(text, origin="mine.toml")


def test_unknown_machines_are_named():
    with pytest.raises(
        UnknownNameError, match="unknown dense machine `gemini`: did you mean `gemmini`"
    ):
        load_machine("gemini")
    with pytest.raises(UnknownNameError, match="machine file `nowhere.toml` does not exist"):
        load_machine("nowhere.toml")


def test_every_number_has_a_source():
    sources = [
        part["source"]
        for part in walk(
            MachineFile.model_validate(load_machine("gemmini").model_dump()).model_dump()
        )
    ]
    assert len(sources) > 25 and all(len(source) > 8 for source in sources)


def test_schema_names_units_and_refuses_other_keys():
    text = json.dumps(json_schema())
    for part in ('"word/cycle/child"', '"pJ/word/KB"', '"mm2/KB"', '"additionalProperties": false'):
        assert part in text


def walk(tables: object) -> list[dict[str, str]]:
    """All tables with a source."""
    if isinstance(tables, dict):
        own = [tables] if "source" in tables else []
        return own + [part for value in tables.values() for part in walk(value)]
    return []


def test_mappings_of_timeloop_are_read():
    texts = [
        "L3[WIO] P14 R7 K32 Q56 - L2[WI] N1 K4X - L1[O] K2 S7 C3X - L0[W] P8",
        "L3[WIO] C12544 - L2[WI] N1 - L1[O] N1 - L0[W] N1",
    ]
    temporal, spatial, order = parse_mappings(texts, CONVOLUTION, 4)
    one = np.ones((4, 7))
    one[3, [2, 0, 5, 3]] = 14, 7, 32, 56
    one[1, [5, 1]], one[0, 2] = (2, 7), 8
    np.testing.assert_array_equal(temporal[0], one)
    sides = np.ones((4, 7))
    sides[2, 5], sides[1, 4] = 4, 3
    np.testing.assert_array_equal(spatial[0], sides)
    # From the innermost loop: Q, K, R, P, then those that are not there.
    assert [CONVOLUTION[dim] for dim in order[0, 3]] == ["Q", "K", "R", "P", "S", "C", "N"]
    assert [CONVOLUTION[dim] for dim in order[0, 1]][:2] == ["S", "K"]
    assert temporal[1, 3, 4] == 12544.0 and temporal[1].sum() == 12544.0 + 27.0


@pytest.mark.parametrize("text", ["", "L4[WIO] P2 - L0[W] N1", "L3[WIO] P2 R3", "P4"])
def test_unreadable_mappings_are_shown(text: str):
    with pytest.raises(DataError, match="mapping 1, `.*`, is not of 4 levels"):
        parse_mappings(["L3[WIO] P2 - L0[W] P4", text], MATMUL, 4)
