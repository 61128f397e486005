"""What the text of a setting means, in files and in overrides: the declared type decides."""

import json
import math
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_fipo.config import Config, EvaluationSet, TrainingSet, load_config, save_config
from megatron_fipo.config.keys import settings as settings_of
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import FilePath
from megatron_fipo.fields import rule_of

REQUIRED = ["model.path=m", "run_dir=r"]
LOOKS_LIKE_SOMETHING_ELSE = [
    "2026_11_28",
    "2026-11-28",
    "0123",
    "1:30",
    "1e5",
    "0x1F",
    "1_000",
    "5",
    "yes",
    "off",
    "true",
    "1.0",
    ".inf",
    "a'b",
    "2026-11-28T10:00:00Z",
]
"""Text that YAML 1.1 or Python reads as another type, and which may stand in a YAML file without quotes."""
NEEDS_QUOTES = [
    "null",
    "~",
    "",
    "- a",
    "a: b",
    "#x",
    " a ",
    "???",
    "${x}",
    "[1]",
    "{a: b}",
    "'q'",
    '"q"',
    "a\nb",
    "é\t",
]


@pytest.mark.parametrize("text", LOOKS_LIKE_SOMETHING_ELSE)
def test_text_is_taken_as_written(text, tmp_path):
    assert load_config(None, [*REQUIRED, f"run_dir={text}"]).run_dir == text
    assert load_config(None, [*REQUIRED, f"data.train_path={text}"]).data.train_path == text
    (tmp_path / "c.yaml").write_text(
        f"run_dir: {text}\nmodel: {{path: m}}\ndata:\n  train_path: {text}   # a comment\n", encoding="utf-8"
    )
    config = load_config(tmp_path / "c.yaml", [])
    assert (config.run_dir, config.data.train_path) == (text, text)


@pytest.mark.parametrize("text", ["- a", "a: b", "#x", " a ", "[1]", "{a: b}", "'q'", '"q"', "a # b", "a\nb"])
def test_an_override_knows_no_quotes_comments_or_lists_in_text(text):
    assert load_config(None, [*REQUIRED, f"tracking.wandb_project={text}"]).tracking.wandb_project == text


@pytest.mark.parametrize("text", ["null", "~", "Null", "NULL", ""])
def test_null_is_null_only_without_quotes_and_only_where_it_may_be(text, tmp_path):
    assert (
        load_config(None, [*REQUIRED, "data.train_path=x", f"data.train_path={text}"]).data.train_path is None
    )
    (tmp_path / "c.yaml").write_text(
        f"data: {{train_path: {text}}}\nray_address: '{text}'\n", encoding="utf-8"
    )
    config = load_config(tmp_path / "c.yaml", REQUIRED)
    assert (config.data.train_path, config.ray_address) == (None, text)
    with pytest.raises(UserError, match="wandb_project must be text, not null"):
        load_config(None, [*REQUIRED, f"tracking.wandb_project={text}"])
    (tmp_path / "c.yaml").write_text(f"tracking:\n  wandb_project: {text}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"c.yaml, line 2: tracking\.wandb_project must be text, not null"):
        load_config(tmp_path / "c.yaml", REQUIRED)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E-6", 1e-6),
        ("2", 2.0),
        ("+.5", 0.5),
        ("5.", 5.0),
        ("0.10", 0.1),
        (".inf", math.inf),
        ("inf", math.inf),
        ("+.Inf", math.inf),
        ("'1e-6'", 1e-6),
    ],
)
def test_numbers(text, value, tmp_path):
    (tmp_path / "c.yaml").write_text(f"objective: {{half_life: {text}}}", encoding="utf-8")
    found = [load_config(tmp_path / "c.yaml", REQUIRED).objective.half_life]
    if "'" not in text:
        found.append(load_config(None, [*REQUIRED, f"objective.half_life={text}"]).objective.half_life)
    assert all(type(number) is float and number == value for number in found)


@pytest.mark.parametrize(
    "key", ["objective.half_life", "iterations", "parallel.virtual_pipeline_model_parallel_size"]
)
@pytest.mark.parametrize(
    "text",
    [
        "0123",
        "1_000",
        "1:30",
        "0x1F",
        "0o7",
        "yes",
        "true",
        "2026-11-28",
        "٣",
        "1e999",
        "1" * 400,
        "1e",
        "--1",
    ],
)
def test_what_is_no_number(key, text, tmp_path):
    with pytest.raises(UserError, match=f"{key} must be (an integer|a number)"):
        load_config(None, [*REQUIRED, f"{key}={text}"])
    section, _, name = key.rpartition(".")
    (tmp_path / "c.yaml").write_text(
        f"{section}: {{{name}: {text}}}" if section else f"{name}: {text}", encoding="utf-8"
    )
    with pytest.raises(UserError, match=f"c.yaml, line 1: {key} must be (an integer|a number)"):
        load_config(tmp_path / "c.yaml", REQUIRED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yes", r"must be true or false, not 'yes' \(did you mean true\?\)"),
        ("off", r"must be true or false, not 'off' \(did you mean false\?\)"),
        ("1", r"must be true or false, not '1' \(did you mean true\?\)"),
        ("y", "must be true or false, not 'y'"),
        ("null", "must be true or false, not null"),
        ("[true]", "must be true or false, not (a list|'.true.')"),
    ],
)
def test_what_is_no_boolean(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_config(None, [*REQUIRED, f"deterministic={text}"])
    (tmp_path / "c.yaml").write_text(f"deterministic: {text}", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "c.yaml", REQUIRED)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False), ("FALSE", False)],
)
def test_booleans(text, value, tmp_path):
    assert load_config(None, [*REQUIRED, f"data.deduplicate={text}"]).data.deduplicate is value
    (tmp_path / "c.yaml").write_text(f"data: {{deduplicate: {text}}}", encoding="utf-8")
    assert load_config(tmp_path / "c.yaml", REQUIRED).data.deduplicate is value


@pytest.mark.parametrize("tag", ["!!int", "!!str", "!!python/name:os.system", "!mine", "!!bool"])
def test_tags_do_not_change_the_type(tag, tmp_path):
    (tmp_path / "c.yaml").write_text(f"run_dir: {tag} '5'", encoding="utf-8")
    if tag == "!!str":
        assert load_config(tmp_path / "c.yaml", REQUIRED[:1]).run_dir == "5"
        return
    with pytest.raises(UserError, match="line 1: run_dir must not have a YAML tag"):
        load_config(tmp_path / "c.yaml", REQUIRED)


@pytest.mark.parametrize("text", ["", " ", "a\0b"])
def test_a_path_names_a_file(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f'run_dir: "{text}"'.replace("\0", "\\0"), encoding="utf-8")
    with pytest.raises(UserError, match="run_dir must be the path of a file or folder"):
        load_config(tmp_path / "c.yaml", REQUIRED[:1])


def test_bytes_that_are_not_utf_8_are_refused():
    with pytest.raises(UserError, match="run_dir must be UTF-8 text"):
        load_config(None, [*REQUIRED, "run_dir=a\udcff"])


text = st.text() | st.sampled_from([*LOOKS_LIKE_SOMETHING_ELSE, *NEEDS_QUOTES])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    project=text,
    address=st.none() | text,
    folder=text.filter(lambda t: t in FilePath() and t[0] != "~" and t != "???"),
)
@example(project="null", address="null", folder="null")
@example(project="\x85", address="a\n\x85b", folder="${ \n")
@example(project="\u2028\n", address="a \n b\r", folder="'\x85'")
@example(project="\x85\u2028\ufeff\x7f", address="a " * 200, folder=" a ")
def test_any_text_is_saved_and_read_back_equal(tmp_path_factory, project, address, folder):
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    config = Config()
    config.model.path = config.run_dir = folder
    config.tracking.wandb_project, config.ray_address, config.data.train_path = project, address, folder
    save_config(config, path)
    assert load_config(path, []) == config


@settings(max_examples=150, deadline=None, derandomize=True)
@given(project=text.filter(lambda t: t not in ("", "~", "null", "Null", "NULL", "???") and "${" not in t))
def test_any_text_of_an_override_is_taken_as_written(project):
    assert (
        load_config(None, [*REQUIRED, f"tracking.wandb_project={project}"]).tracking.wandb_project == project
    )


def test_every_setting_that_names_a_file_is_declared_as_a_path():
    declared = {key for key, item in settings_of(Config) if isinstance(rule_of(item), FilePath)}
    assert declared == {"model.path", "run_dir", "data.train_path"}
    for section in (TrainingSet, EvaluationSet):
        assert {key for key, item in settings_of(section) if isinstance(rule_of(item), FilePath)} == {"path"}


@dataclass(frozen=True)
class Lists:
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] | None = None


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), max_size=10), max_size=5))
def test_a_list_of_any_length_is_read_as_written(names):
    found = load_config(
        None,
        [f"names={json.dumps(names, ensure_ascii=False)}", f"sizes={[len(name) for name in names]}"],
        Lists,
    )
    assert found == Lists(tuple(names), tuple(len(name) for name in names))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("names=a", "names must be a list of values, each text"),
        ("sizes=[1,x]", "sizes must be an integer, not 'x'"),
        ("names=[[a]]", "names must be text, not a list"),
    ],
)
def test_what_is_no_list(override, message):
    with pytest.raises(UserError) as error:
        load_config(None, [override], Lists)
    assert message in str(error.value)


@pytest.mark.parametrize(("length", "accepted"), [(255, True), (256, False)])
def test_a_path_has_names_that_a_file_system_takes(length, accepted):
    assert (f"runs/{'a' * length}/x" in FilePath()) == accepted
    assert ("é" * (length // 2) in FilePath()) == (length // 2 * 2 <= 255)
    assert "a/" * 2001 not in FilePath()
