"""The published JSON Schemas are those of the code."""

import json
from pathlib import Path

import pytest

from codesign.hw import hardware_config, spec
from codesign.hw.gemm import machine_file

SCHEMAS = Path(__file__).resolve().parent.parent / "docs" / "schema"


@pytest.mark.parametrize(
    ("name", "schema_fn"),
    [
        ("accelerator", spec.json_schema),
        ("dense_machine", machine_file.json_schema),
        ("export", hardware_config.json_schema),
    ],
)
def test_published_schema_is_current(name, schema_fn):
    if not SCHEMAS.is_dir():
        pytest.skip("docs/schema is not here: the tests run without the checkout")
    published = json.loads((SCHEMAS / f"{name}.json").read_text())
    assert published == json.loads(json.dumps(schema_fn())), (
        f"write `json_schema()` to docs/schema/{name}.json again"
    )
