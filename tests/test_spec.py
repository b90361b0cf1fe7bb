"""Accelerator files: the shipped preset, and every fault a person can make as one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from codesign.errors import PresetError, UnknownNameError
from codesign.hw.spec import PRESET_FOLDER, json_schema, load_preset, parse_preset, preset_names

TEXT = (PRESET_FOLDER / "energon.toml").read_text()
EDGE_TEXT = (PRESET_FOLDER / "acceltran-edge.toml").read_text()


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


def test_module_and_memory_units_are_converted():
    spec = load_preset("acceltran-edge")
    assert spec.modules["lane_16"].area.base == pytest.approx(9418.667591e-6)
    memory = spec.memories["activation"]
    # nJ per 64 byte to pJ/B, mW per MB to W/B, um2 per MB to mm2/B.
    assert memory.energy.base == pytest.approx(79.275099 / 64)
    assert memory.leakage is not None
    assert memory.leakage.base * 2**20 == pytest.approx(0.247918667)
    assert memory.area.base * 2**20 == pytest.approx(0.30330583)
    assert memory.capacity.base == 4 * 2**20


def test_extending_a_preset_changes_what_it_names():
    text = 'name = "mine"\nextends = "energon"\n[units.qk]\nlanes = { value = 3, unit = "lane", source = "Ours" }'
    mine, base = parse_preset(text, origin="mine.toml"), load_preset("energon")
    assert (mine.name, mine.units["qk"].lanes.value) == ("mine", 3)
    changed = base.units["qk"].model_copy(update={"lanes": mine.units["qk"].lanes})
    units = {**base.units, "qk": changed}
    assert mine == base.model_copy(update={"name": "mine", "units": units})
    # A number is replaced as a whole: its old source cannot stay behind a new value.
    with pytest.raises(PresetError, match="units.qk.lanes.source"):
        parse_preset(text.replace(', source = "Ours"', ""), origin="mine.toml")
    with pytest.raises(PresetError, match="unknown preset `energom`: did you mean `energon`"):
        parse_preset(text.replace('"energon"', '"energom"'), origin="mine.toml")


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
        'buffer = "key_low"',
        'buffer = "key_lo"',
        ["units.filter_array.reads.filter*.mac.buffer", "did you mean `key_low`"],
    ),
    "read of something else": (
        'reads."filter*.mac"',
        'reads."filter*.compare"',
        ["units.filter_array.reads", "`filter*.compare`", "did you mean `filter*.mac`"],
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
    "modules beside densities": (
        "accumulator = { value = 12",
        'modules = ["mac"]\naccumulator = { value = 12',
        ["units.filter_array", "remove `accumulator` and `area`"],
    ),
    "skipping in lock step": (
        'rule = "rows"',
        'skips_zeros = { value = true, source = "Ours" }\nrule = "rows"',
        ["units.filter_array", "`skips_zeros`", "another rule than"],
    ),
    "linear layers on a unit and a host": (
        'serves = ["pv.mac", "output.multiply"]',
        'serves = ["pv.mac", "output.multiply", "linear.mac"]',
        ["units.pv", "no stage of `energon` feeds `linear.mac`"],
    ),
    "query block that is gone": (
        "query_block = {",
        "# query_block = {",
        ["pipeline.query_block", "memories.query"],
    ),
}
EDGE_FAULTS = {
    "neither host nor storage": (
        "[storage]",
        "[storag]",
        ["`storag`", "did you mean `storage`"],
    ),
    "nobody runs the linear layers": (
        'serves = ["qk.mac", "pv.mac", "linear.mac", "activation.element"]\n'
        'paced_by = ["qk.mac", "pv.mac", "linear.mac", "activation.element"]',
        'serves = ["qk.mac", "pv.mac", "activation.element"]\npaced_by = ["qk.mac", "pv.mac"]',
        ["`linear.mac` of `acceltran`", "exactly one unit"],
    ),
    "unknown module": (
        '"pre_sparsity", "post',
        '"pre_sparsty", "post',
        ["units.lane.modules", "unknown module `pre_sparsty`", "did you mean `pre_sparsity`"],
    ),
    "unknown storage": (
        'weights = "weight"',
        'weights = "wieght"',
        ["storage.weights", "unknown memory `wieght`", "did you mean `weight`"],
    ),
    "unknown driver": (
        'driven_by = "lane"',
        'driven_by = "lanes"',
        ["processing_elements.driven_by", "did you mean `lane`"],
    ),
    "unknown main memory": (
        'memory = "dram_32_2_1"',
        'memory = "dram_32_2"',
        ["estimator.memory", "did you mean `dram_32_2_1`"],
    ),
    "half a multiplier": (
        "native_bits = {",
        "# native_bits = {",
        ["modules.lane_16", "`native_bits` and `multiplier_share`"],
    ),
    "unit without a price": (
        'modules = ["layer_norm_tile_16"]',
        'accumulator = { value = 20, unit = "bit", source = "Ours" }\n'
        'area = { value = 1, unit = "mm2/lane", source = "Ours" }',
        ["units.norm", "`energy_table`"],
    ),
    "pacing nothing": (
        'paced_by = "softmax.exp"',
        'paced_by = "softmax.add"',
        ["units.softmax", "`paced_by`"],
    ),
    "share above one": (
        "multiplier_share = { value = 0.8",
        "multiplier_share = { value = 1.8",
        ["modules.lane_16", "[0, 1]"],
    ),
}


@pytest.mark.parametrize("fault", [*FAULTS, *EDGE_FAULTS])
def test_faults_are_one_line_with_file_place_and_remedy(fault: str):
    text = TEXT if fault in FAULTS else EDGE_TEXT
    old, new, parts = (FAULTS | EDGE_FAULTS)[fault]
    assert old in text
    with pytest.raises(PresetError) as caught:
        parse_preset(text.replace(old, new, 1), origin="mine.toml")
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


def test_linear_layers_need_a_host_or_storage():
    host = TEXT[TEXT.index("[host]") : TEXT.index("[energy_table]")]
    with pytest.raises(PresetError, match="`host`.*or `storage`"):
        parse_preset(TEXT.replace(host, ""), origin="mine.toml")
    with pytest.raises(PresetError, match="give one of the two"):
        parse_preset(EDGE_TEXT + host, origin="mine.toml")


def test_schema_names_the_units_of_a_field():
    text = json.dumps(json_schema())
    assert '"pJ/bit"' in text and '"additionalProperties": false' in text


def test_spec_and_simulator_import_without_jax():
    code = (
        "import sys; sys.modules['jax'] = None; sys.modules['flax'] = None\n"
        "import codesign.hw.simulator, codesign.hw.spec as s; s.load_preset('energon')\n"
        "import codesign.hw.acceltran_estimator, codesign.hw.loop_order"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_memory_of_several_is_changed_and_the_file_gives_the_name() -> None:
    """A memory may be called `value`, as a number's value is."""
    text = 'extends = "energon"\n[memories.key_low]\ncapacity = { value = 32, unit = "KB", source = "test" }\n'
    spec = parse_preset(text, origin="mine.toml")
    shipped = load_preset("energon")
    assert spec.name == "mine"
    assert spec.memories["key_low"].capacity.value == 32
    assert spec.memories["value"] == shipped.memories["value"]
    assert spec.memories["key_low"].energy == shipped.memories["key_low"].energy
