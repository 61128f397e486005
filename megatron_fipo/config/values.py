"""The one conversion of text to values, for YAML files and `key=value`: the declared type of a setting decides.

Numbers and booleans are those of YAML 1.2: `5`, `-1`, `1e-6`, `.inf`, `true`. `0123`, `1_000`, `1:30` and `yes` are text.
"""

import math
import re
from types import NoneType
from typing import Any, get_args, get_origin

import yaml

from megatron_fipo.config.yaml_text import LIST, MAPPING, NULL, TEXT, has_meaning
from megatron_fipo.field_rules import quoted
from megatron_fipo.fields import REQUIRED

_DIGITS = r"(?:0|[1-9][0-9]*)"
_INTEGER = re.compile(rf"[-+]?{_DIGITS}")
_NUMBER = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.?(?:inf|nan)", re.IGNORECASE)
_BOOLEANS = {
    word: value for value in (True, False) for word in (str(value), str(value).lower(), str(value).upper())
}
_YES_OR_NO = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
_NAMES = {str: "text", bool: "true or false", int: "an integer", float: "a number"}
_LARGEST = 2**63 - 1
_TAGS = {
    yaml.ScalarNode: (TEXT, NULL),
    yaml.SequenceNode: (LIST,),
    yaml.MappingNode: (MAPPING,),
}


def convert(node: yaml.Node, kind: Any) -> Any:
    """The value of a setting of type `kind`: str, bool, int, float, a tuple of these (also of any length), or one of them `| None`.

    Text is returned exactly as written. Raises ValueError, as the end of a sentence that begins with the key.
    """
    optional = NoneType in get_args(kind)
    if is_null(node):
        if not optional:
            raise ValueError(f"must be {_name(kind)}, not null")
        return None
    required = next(part for part in get_args(kind) if part is not NoneType) if optional else kind
    refuse_tag(node)
    if get_origin(required) is tuple:
        return _tuple(node, required, kind)
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(
            f"must be {_name(kind)}, not a {'list' if isinstance(node, yaml.SequenceNode) else 'section'}"
        )
    if node.style is None and node.value == REQUIRED:
        raise ValueError(f"must be {_name(kind)}; {REQUIRED} marks a value that is still to be given")
    return _CONVERSIONS[required](node, kind)


def free_value(node: yaml.Node) -> Any:
    """The value of a setting that has no declared type, by the rules of YAML 1.2: quoted text is text.

    Raises ValueError, as the end of a sentence that begins with the key.
    """
    try:
        return _free_value(node)
    except RecursionError:  # an alias within its own anchor
        raise ValueError("is nested too deeply") from None


def _free_value(node: yaml.Node) -> Any:
    refuse_tag(node)
    if isinstance(node, yaml.MappingNode):
        return {_text(name, str): _free_value(value) for name, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_free_value(item) for item in node.value]
    if is_null(node):
        return None
    assert isinstance(node, yaml.ScalarNode)
    if node.style is None:
        text = node.value.strip(" ")
        for kind, is_one in (
            (bool, text in _BOOLEANS),
            (int, _INTEGER.fullmatch(text)),
            (float, _NUMBER.fullmatch(text) or _SPECIAL.fullmatch(text)),
        ):
            if is_one:
                return _CONVERSIONS[kind](node, kind)
    return _text(node, str)


def is_list(kind: Any) -> bool:
    """Whether a setting of type `kind` takes a list."""
    return any(get_origin(part) is tuple for part in (kind, *get_args(kind)))


def is_null(node: yaml.Node) -> bool:
    """Whether the node is null: unquoted `null`, `~` or nothing."""
    return isinstance(node, yaml.ScalarNode) and node.tag == NULL


def refuse_tag(node: yaml.Node) -> None:
    """Raise ValueError for a tag such as `!!int`, which would contradict the declared type."""
    if node.tag not in _TAGS[type(node)]:
        raise ValueError(f"must not have a YAML tag such as {quoted(node.tag)}")


def _tuple(node: yaml.Node, required: Any, kind: Any) -> tuple:
    kinds = get_args(required)
    if not isinstance(node, yaml.SequenceNode):
        raise ValueError(f"must be {_name(kind)}")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(node.value)
    if len(node.value) != len(kinds):
        raise ValueError(f"must be {_name(kind)}")
    return tuple(convert(item, part) for item, part in zip(node.value, kinds, strict=True))


def _text(node: yaml.ScalarNode, kind: Any) -> str:
    text = node.value
    if node.style is None and has_meaning(text):
        raise ValueError(f"must not refer to other values as {quoted(text)} does; write the value itself")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"must be UTF-8 text, not {quoted(text)}")
    return text


def _boolean(node: yaml.ScalarNode, kind: Any) -> bool:
    text = node.value.strip(" ")
    if text not in _BOOLEANS:
        meant = _YES_OR_NO.get(text.lower())
        raise _wrong(kind, node.value, f" (did you mean {meant}?)" if meant else "")
    return _BOOLEANS[text]


def _integer(node: yaml.ScalarNode, kind: Any) -> int:
    text = node.value.strip(" ")
    if not _INTEGER.fullmatch(text):
        raise _wrong(kind, node.value)
    # Python refuses to read thousands of digits.
    if len(text) > 20 or abs(int(text)) > _LARGEST:
        raise ValueError(f"must be an integer of at most 64 bits, not {quoted(node.value)}")
    return int(text)


def _number(node: yaml.ScalarNode, kind: Any) -> float:
    text = node.value.strip(" ")
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    if not _NUMBER.fullmatch(text):
        raise _wrong(kind, node.value)
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"must be a number that fits 64 bits, not {quoted(node.value)}")
    return value


_CONVERSIONS = {str: _text, bool: _boolean, int: _integer, float: _number}


def _wrong(kind: Any, text: str, hint: str = "") -> ValueError:
    return ValueError(f"must be {_name(kind)}, not {quoted(text)}{hint}")


def _name(kind: Any) -> str:
    parts = get_args(kind)
    if NoneType in parts:
        return " or ".join("null" if part is NoneType else _name(part) for part in parts)
    if get_origin(kind) is tuple and parts[-1] is Ellipsis:
        return f"a list of values, each {_name(parts[0])}"
    if get_origin(kind) is tuple:
        return f"a list of {len(parts)} values, each {_name(parts[0])}"
    return _NAMES[kind]
