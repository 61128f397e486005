"""Every setting with odd values, by file and by override: a value of exactly the declared type, or one sentence."""

import itertools
import math
import random
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin

import pytest
import yaml

from megatron_fipo.config import Config, SftConfig, load_config, save_config
from megatron_fipo.config.load import leaves
from megatron_fipo.errors import UserError

NEEDED = {Config: ["model.path=m", "run_dir=r"], SftConfig: ["model_config_path=m", "output_dir=o"]}
ODD = """
null|~|''|true|True|yes|on|y|no|false|0|1|-1|+1|2|7|1.0|1.5|-0.0|1e-6|1e5|1e400|-1e400|1e-400|0x1F|0o7|017|0b1
1_000|1,000|1:30|2026-11-28|2026_11_28|.inf|inf|-inf|.nan|NaN|infinity|'5'|"1e-6"|"true"|'null'|'~'|???|'???'
[]|[1]|[1, 2]|[1.0, 1.2]|[a, b]|[null]|[[1, 2]]|[true, false]|[1, 2, 3]|{}|{a: 1}|{path: x}|{1: 2}|[{a: 1}]|'[1, 2]'
fipo|grpo|bfloat16|float32|vllm|auto|none|NONE|a b|é|日本|😀|'a\\b'|"a\\nb"|"\\0"|"\\uD800"|~/x|~nobody-of-this-name/x|/a/b|a/../b
${seed}|${oc.env:HOME}|$HOME|%s|{}{}|!!int 5|!!str 5|!!python/object:os.system {}|&a 1|&a [1, *a]|*b|- a|a: b|#x|x # y|@a|`a`|>|
""" + "|".join(
    [str(10**18), str(10**19), "9" * 5000, "-" + "9" * 30, "x" * 3000, "[" * 40 + "]" * 40, "0." + "3" * 2000]
)
VALUES = [value for line in ODD.strip("\n").splitlines() for value in line.split("|")]


def is_exactly(value: Any, kind: Any) -> bool:
    """Strict: no bool for an int, no int for a float, no list for a tuple."""
    if kind is NoneType:
        return value is None
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if parts[-1] is Ellipsis:
            return type(value) is tuple and all(is_exactly(item, parts[0]) for item in value)
        return type(value) is tuple and len(value) == len(parts) and all(map(is_exactly, value, parts))
    if get_origin(kind) is dict:
        return type(value) is dict and all(map(is_entry, value.items(), itertools.repeat(get_args(kind)[1])))
    if parts := get_args(kind):
        return any(is_exactly(value, part) for part in parts)
    return type(value) is kind


def is_entry(entry: tuple[Any, Any], kind: Any) -> bool:
    name, value = entry
    if is_dataclass(kind):
        check_types(value)
        return type(name) is str and type(value) is kind
    return type(name) is str and (kind is Any or type(value) is kind)


def check_types(config: Any) -> None:
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(item.type):
            assert type(value) is item.type
            check_types(value)
        else:
            assert is_exactly(value, item.type), (item.name, value)


def as_declared(text: str, kind: Any, from_file: bool) -> Any:
    """What the text of a setting may become, computed without the package. Only for scalars."""
    quoted = False
    if from_file:
        events = list(yaml.parse(f"x: {text}"))
        (scalar,) = [event for event in events if isinstance(event, yaml.ScalarEvent)][1:]
        text, quoted = scalar.value, scalar.style is not None or scalar.tag is not None
    kinds = get_args(kind) or (kind,)
    if not quoted and text in ("", "~", "null"):
        return None
    return (
        text
        if str in kinds
        else float(text)
        if float in kinds
        else text == "true"
        if bool in kinds
        else int(text)
    )


def outcome(schema: type, key: str, text: str, folder, from_file: bool) -> Any:
    """The value of the setting, or None if it was refused in the required way."""
    path, overrides = None, [*NEEDED[schema], f"{key}={text}"]
    if from_file:
        section, _, name = key.rpartition(".")
        indent = "  " if section else ""
        path = folder / "odd.yaml"
        path.write_text(f"{f'{section}:' if section else ''}\n{indent}{name}: {text}\n", encoding="utf-8")
        overrides = [needed for needed in NEEDED[schema] if not needed.startswith(f"{key}=")]
    message = ""
    try:
        config = load_config(path, overrides, schema)
    except UserError as error:
        message = str(error)
    if message:
        assert len(message.splitlines()) == 1, message
        assert len(message) < 600, message
        # A rule for two settings of a section has the section's name once.
        assert key.rpartition(".")[2] in message or (from_file and "odd.yaml, line" in message), message
        return None
    check_types(config)
    if from_file:  # what was accepted is saved and read back equal
        save_config(config, folder / "again.yaml")
        assert load_config(folder / "again.yaml", [], schema) == config
    return dict(leaves(config))[key]


def cases(schema: type, from_file: bool) -> list[tuple[str, str]]:
    """Some values for every setting, and every value for some settings."""
    rng = random.Random(f"{schema.__name__} {from_file}")
    keys = [key for key, _ in leaves(schema)]
    each = [(key, value) for key in keys for value in rng.sample(VALUES, 6)]
    return each + [(rng.choice(keys), value) for value in VALUES for _ in range(2)]


@pytest.mark.parametrize("from_file", [False, True], ids=["override", "file"])
@pytest.mark.parametrize("schema", [Config, SftConfig])
def test_an_odd_value_has_the_declared_type_or_is_refused_in_one_sentence(
    schema, from_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", "/home/me")
    kinds = dict(leaves(schema))
    accepted = 0
    for key, text in cases(schema, from_file):
        value = outcome(schema, key, text, tmp_path, from_file)
        accepted += value is not None
        if value is None or isinstance(value, (tuple, dict)):
            continue
        expected = as_declared(text, kinds[key], from_file)
        if expected in ("~", "~/x") and value != expected:  # a path
            expected = expected.replace("~", "/home/me", 1)
        assert value == expected or (
            isinstance(value, bool) and text.strip("'\"").lower() == str(value).lower()
        ), (key, text)
        assert not isinstance(value, float) or not math.isnan(value)
    assert accepted > len(VALUES) // 10


@pytest.mark.parametrize("schema", [Config, SftConfig])
def test_odd_sections(schema, tmp_path):
    sections = sorted({key.partition(".")[0] for key, _ in leaves(schema) if "." in key})
    for section in sections:
        for text in VALUES:
            outcome_of_section(schema, section, text, tmp_path)


def outcome_of_section(schema: type, section: str, text: str, folder) -> None:
    for path, overrides in ((None, [f"{section}={text}"]), (folder / "odd.yaml", [])):
        if path is not None:
            path.write_text(f"{section}: {text}\n", encoding="utf-8")
        try:
            check_types(load_config(path, [*overrides, *NEEDED[schema]], schema))
            continue
        except UserError as error:
            message = str(error)
        assert len(message.splitlines()) == 1
        assert section in message or "odd.yaml, line" in message
