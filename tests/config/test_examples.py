"""The examples keep their values: `examples.json` lists those that differ from the defaults."""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import Config, SftConfig, load_config
from megatron_fipo.config.load import leaves

ROOT = Path(__file__).parents[2]
EXPECTED = json.loads((Path(__file__).parent / "examples.json").read_text(encoding="utf-8"))


def test_every_example_is_listed():
    """Studies are apart: tests/study/test_grid.py."""
    files = [path for path in ROOT.glob("examples/*/*.yaml") if path.parent.name != "studies"]
    assert EXPECTED.keys() == {path.relative_to(ROOT).as_posix() for path in files}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_has_these_values(name):
    schema = SftConfig if name.endswith("sft.yaml") else Config
    default = dict(leaves(schema()))
    found = dict(leaves(load_config(ROOT / name, [], schema)))
    changed = {key: _plain(value) for key, value in found.items() if value != default[key]}
    assert json.loads(json.dumps(changed)) == EXPECTED[name]
    assert all(
        type(value) is type(json.loads(json.dumps(value))) or isinstance(value, tuple)
        for value in changed.values()
    )


def _plain(value: Any) -> Any:
    """Sections of a mapping as the values that differ from their defaults."""
    if not isinstance(value, dict):
        return value
    return {
        name: {key: part for key, part in asdict(entry).items() if part not in (None, {})}
        if is_dataclass(entry)
        else entry
        for name, entry in value.items()
    }
