"""Accelerator files: the shipped preset, and every fault a person can make as one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from codesign.errors import PresetError, UnknownNameError
from codesign.hw.spec import PRESET_FOLDER, json_schema, load_preset, parse_preset, preset_names

TEXT = (PRESET_FOLDER / "energon.toml").read_text()


def test_presets_load_and_have_their_file_name():
    assert "energon" in preset_names()
    for name in preset_names():
        assert load_preset(name).name == name


def test_units_are_converted():
    spec = load_preset("energon")
    assert spec.clock_hz == 1e9
    assert spec.dram_bytes_per_cycle == pytest.approx(25.6)
    assert spec.memories["key"].capacity.base == 65536
    # 45 nm against 28 nm, squared.
    assert spec.area_scale == pytest.approx(2.5829, rel=1e-4)


def test_a_path_is_read_too(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace('name = "energon"', 'name = "mine"', 1))
    assert load_preset(path).name == "mine"


FAULTS = {
    "misspelt key": (
        "lanes = { value = 8",
        "lanez = { value = 8",
        ["units.filter_array.lanez", "did you mean `lanes`"],
    ),
    "misspelt table": ("[host]", "[hosts]", ["`hosts`", "did you mean `host`"]),
    "wrong unit": (
        'unit = "lane", source = "Reconstruction: balances',
        'unit = "bit", source = "Reconstruction: balances',
        ["units.filter_array.lanes", '"bit"', 'unit = "lane"'],
    ),
    "missing unit": ('unit = "GHz", ', "", ["technology.clock.unit", "missing", "{ value, unit"]),
    "missing source": (
        ', source = "Ours: default host"',
        "",
        ["host.rows.source", "missing", "source }"],
    ),
    "empty source": (
        "Reconstruction: threshold of a row",
        " ",
        ["units.filter_array.overhead.source", "empty"],
    ),
    "bare number": (
        '{ value = 12, unit = "bit", source = "Derived: 16 d fits 12 bits at d = 64" }',
        "12",
        ["units.filter_array.accumulator", "bare number", "write { value"],
    ),
    "negative size": (
        'value = 64, unit = "KB"',
        'value = -64, unit = "KB"',
        ["memories.key.capacity", "above 0", "-64"],
    ),
    "infinite": ("value = 25.6", "value = inf", ["dram.bandwidth.value", "finite"]),
    "unknown rule": ('rule = "rows"', 'rule = "rowz"', ["units.filter_array.rule", "'flat'"]),
    "unknown memory": (
        'reads_b = "key_low"',
        'reads_b = "key_lo"',
        ["units.filter_array.reads_b", "did you mean `key_low`"],
    ),
    "unit nothing feeds": (
        'serves = ["softmax.exp", "softmax.reciprocal"]',
        'serves = ["softmax.exp", "softmax.reciprocal", "predict.mac"]',
        ["units.softmax", "no stage of `energon` feeds `predict.mac`"],
    ),
    "operation nobody serves": (
        '["pv.mac", "output.multiply"]',
        '["pv.mac"]',
        ["output.multiply", "exactly one unit", "`serves`"],
    ),
    "unit outside the pipeline": (
        ', "pv"]]',
        "]]",
        ["units.pv", "no stage", "`pipeline.stages`"],
    ),
    "pipeline names nothing": (', "pv"]]', ', "pvv", "pv"]]', ["`pvv`", "did you mean `pv`"]),
    "unknown mechanism": (
        'mechanism = "energon"',
        'mechanism = "energy"',
        ["mechanism", "`energy`", "energon"],
    ),
    "missing row statistics": ('rows = "filter*"\n', "", ["units.filter_array", "needs `rows`"]),
    "not TOML": ("[dram]", "[dram", ["not valid TOML", "line"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line_with_file_place_and_remedy(fault: str):
    old, new, parts = FAULTS[fault]
    assert old in TEXT
    with pytest.raises(PresetError) as caught:
        parse_preset(TEXT.replace(old, new, 1), origin="mine.toml")
    message = str(caught.value)
    assert message.startswith("mine.toml: ") and "\n" not in message
    assert all(part in message for part in parts), message


def test_unknown_presets_list_the_choices(tmp_path: Path):
    with pytest.raises(UnknownNameError, match="did you mean `energon`"):
        load_preset("energom")
    with pytest.raises(UnknownNameError, match="does not exist"):
        load_preset(tmp_path / "none.toml")


def test_binary_file_is_refused(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PresetError, match="UTF-8"):
        load_preset(path)


def test_schema_names_the_units_of_a_field():
    text = json.dumps(json_schema())
    assert '"pJ/bit"' in text and '"additionalProperties": false' in text


def test_spec_and_simulator_import_without_jax():
    code = (
        "import sys; sys.modules['jax'] = None; sys.modules['flax'] = None\n"
        "import codesign.hw.simulator, codesign.hw.spec as s; s.load_preset('energon')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
