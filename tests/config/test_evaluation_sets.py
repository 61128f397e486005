"""`evaluation.sets`: named files, given one by one or together, whose names can be part of metric names."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.config import EvaluationSet, load_config, save_config
from megatron_fipo.config.set_rules import check_temperatures
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import FilePath

REQUIRED = ("model.path=m", "run_dir=r")
NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,39}", fullmatch=True)
PATHS = st.text(min_size=1).filter(lambda t: t in FilePath() and t[0] != "~" and t.isprintable())


def sets(*overrides: str, file=None) -> dict[str, str]:
    entries = load_config(file, [*REQUIRED, *overrides]).evaluation.sets
    return {name: entry.path for name, entry in entries.items()}


def test_overrides_add_replace_and_remove_sets_of_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("evaluation:\n  sets:\n    aime24: a.parquet\n    aime25: b.parquet\n", encoding="utf-8")
    assert sets(file=file) == {"aime24": "a.parquet", "aime25": "b.parquet"}
    assert sets("evaluation.sets.aime25=c", file=file) == {"aime24": "a.parquet", "aime25": "c"}
    assert sets("evaluation.sets.math=d", file=file) == {
        "aime24": "a.parquet",
        "aime25": "b.parquet",
        "math": "d",
    }
    assert sets("evaluation.sets.aime24=null", file=file) == {"aime25": "b.parquet"}
    assert sets("evaluation.sets={aime24: null, math: d}", file=file) == {"aime25": "b.parquet", "math": "d"}
    assert sets("evaluation={every: 3, sets: {math: d}}") == {"math": "d"}
    assert sets() == sets("evaluation.sets=") == sets("evaluation.sets={}") == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evaluation.sets.aime-24=a",
            "evaluation.sets must not have the name 'aime-24'; use at most 40 letters",
        ),
        ("evaluation.sets.a/b=a", "must not have the name 'a/b'"),
        ("evaluation.sets.a.b=a", "unknown key 'evaluation.sets.a.b'"),
        ("evaluation.sets.24=a", "must not have the name '24'"),
        ("evaluation.sets.é=a", "must not have the name 'é'"),
        ("evaluation.sets.=a", "must not have the name ''"),
        (f"evaluation.sets.{'a' * 41}=a", "must not have the name"),
        ("evaluation.sets.a= ", "evaluation.sets.a.path must be the path of a file or folder, not ' '"),
        ("evaluation.sets={a: b, a: c}", "'evaluation.sets.a' is given twice; remove one"),
        (
            "evaluation.sets=a.parquet",
            "evaluation.sets must be names with values, as evaluation.sets.NAME=VALUE",
        ),
        ("evaluation.sets=[a, b]", "evaluation.sets must be names with values"),
        ("evaluation.sets={a: [b]}", "evaluation.sets.a must be text, not a list"),
        ("evaluation.sets={[a]: b}", "a key must be a name"),
        ("evaluation.sets={a: b", "not valid YAML"),
        ("evaluation.sets.a=~nobody-of-this-name/x", "evaluation.sets.a.path: there is no home folder"),
        (
            "data.evaluation_path=a.parquet",
            "data.evaluation_path is now evaluation.sets: give each file a name",
        ),
    ],
)
def test_what_is_no_named_file_is_refused(override, message):
    with pytest.raises(UserError) as error:
        sets(override)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_name_given_twice_in_a_file_is_named_with_its_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("evaluation:\n  sets:\n    a: 1.parquet\n    a: 2.parquet\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"c.yaml, line 4: 'evaluation.sets.a' is given twice"):
        sets(file=file)


@settings(deadline=None)  # each case is synced to the disk
@given(st.dictionaries(NAMES, PATHS, max_size=4))
def test_any_sets_are_saved_and_read_back_equal_and_in_order(tmp_path_factory, wanted):
    config = load_config(None, [*REQUIRED])
    config.evaluation.sets = {name: EvaluationSet(path) for name, path in wanted.items()}
    path = tmp_path_factory.getbasetemp() / "sets.yaml"
    save_config(config, path)
    assert list(load_config(path, []).evaluation.sets.items()) == list(config.evaluation.sets.items())


def test_a_temperature_that_vllm_would_raise_is_refused_by_set():
    def check(temperature: str) -> None:
        check_temperatures(
            load_config(None, [*REQUIRED, f"evaluation.sets.aime24={{path: a, temperature: {temperature}}}"])
        )

    check("0")
    check("0.01")
    with pytest.raises(UserError, match=r"evaluation\.sets\.aime24\.temperature=0\.001 must be 0"):
        check("0.001")
