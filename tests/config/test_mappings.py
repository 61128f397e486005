"""Settings that are mappings: of names to sections, to sums of rewards, and to any values."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config import EvaluationSet, TrainingSet, load_config, save_config
from megatron_fipo.config.task_schema import REWARDS as NAMES
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import sum_terms
from megatron_fipo.fields import free_values
from megatron_fipo.tasks.rewards import REWARDS

NEEDED = ("model.path=m", "run_dir=r")


def training(*overrides: str, file=None) -> dict[str, TrainingSet]:
    return load_config(file, [*NEEDED, *overrides]).data.sets


def test_the_schema_lists_the_rewards():
    assert set(NAMES) == REWARDS.keys()


def test_an_entry_is_a_path_or_a_section(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "data: {sets: {math: a.parquet, code: {path: b, weight: 2, reward: m.n:f}}}", encoding="utf-8"
    )
    math, code = TrainingSet("a.parquet"), TrainingSet("b", 2.0, "m.n:f")
    assert training(file=file) == {"math": math, "code": code}
    assert training("data.sets.code.weight=3", file=file)["code"] == TrainingSet("b", 3.0, "m.n:f")
    assert training("data.sets.code=c", file=file)["code"] == TrainingSet("c", 2.0, "m.n:f")
    assert training("data.sets.code=null", file=file) == {"math": math}
    assert training("data.sets.code=null", "data.sets.code=c", file=file)["code"] == TrainingSet("c")
    assert training("data.sets={code: {reward: null}}", file=file)["code"] == TrainingSet("b", 2.0)


def test_null_removes_the_entry_of_this_name_alone():
    """A name may have a dot, and be the beginning of another."""
    rewards = ("reward.by_data_source.math=exact", "reward.by_data_source.math.dapo=choice")
    config = load_config(None, [*NEEDED, *rewards, "reward.by_data_source.math=null"])
    assert config.reward.by_data_source == {"math.dapo": "choice"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sets.a.weight=2", "no value for data.sets.a.path; give it as data.sets.a=PATH"),
        ("data.sets.a.wieght=2", "unknown key 'data.sets.a.wieght'; did you mean"),
        ("data.sets={a: {path: b, weight: 0}}", "data.sets.a.weight must be above 0, not 0.0"),
        ("data.sets={a: {path: b, weight: x}}", "data.sets.a.weight must be a number, not 'x'"),
        ("data.sets={a: {path: b, path: c}}", "'data.sets.a.path' is given twice"),
        (
            "data.sets={a: {path: b, reward: chess}}",
            f"data.sets.a.reward must be {', '.join(NAMES)} or an import",
        ),
        ("data.sets={a-b: c}", "data.sets must not have the name 'a-b'"),
        ("reward.name=dapo_mat", "(did you mean 'dapo_math'?)"),
        ("reward.name=countdown + x*dapo_math", "must be a name or a sum of names as in A + 0.5*B"),
        ("reward.name=countdown + countdown", "reward.name must not have 'countdown' twice; add its weights"),
        ("reward.name=0*countdown", "must be a name or a sum of names"),
        ("reward.name=", "reward.name must be"),
        (
            "reward.by_data_source={a/b: chess}",
            f"reward.by_data_source of 'a/b' must be {', '.join(NAMES)} or",
        ),
    ],
)
def test_what_breaks_a_rule_is_refused_in_one_sentence(override, message):
    with pytest.raises(UserError) as error:
        load_config(None, [*NEEDED, override])
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("dapo_math", ((1.0, "dapo_math"),)),
        ("dapo_math + 0.2*a.b:c", ((1.0, "dapo_math"), (0.2, "a.b:c"))),
        ("1e-1*a:b+-2*c:d", ((0.1, "a:b"), (-2.0, "c:d"))),
        ("1e+2 * a:b", ((100.0, "a:b"),)),
    ],
)
def test_a_sum_of_rewards(text, terms):
    assert sum_terms(text) == terms
    assert load_config(None, [*NEEDED, f"reward.name={text}"]).reward.name == text


def test_rewards_by_data_source_have_any_names():
    config = load_config(None, [*NEEDED, "reward.by_data_source={openai/gsm8k: dapo_math, 'a.b c': x:y}"])
    assert config.reward.by_data_source == {"openai/gsm8k": "dapo_math", "a.b c": "x:y"}


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,9}", fullmatch=True),
        st.builds(
            EvaluationSet,
            path=st.sampled_from(["a", "b c", "x/é"]),
            reward=st.none() | st.sampled_from(["dapo_math", "a.b:c + 0.5*countdown"]),
            max_response_length=st.none() | st.integers(1, 99),
            environment=st.none() | st.sampled_from(["single_turn", "a.b:c"]),
            samples_per_problem=st.none() | st.integers(1, 99),
            temperature=st.none() | st.floats(0, 9),
            top_p=st.none() | st.floats(0.1, 1),
        ),
        max_size=3,
    )
)
def test_sections_are_saved_and_read_back_equal(tmp_path_factory, wanted):
    config = load_config(None, [*NEEDED])
    config.evaluation.sets = wanted
    path = tmp_path_factory.getbasetemp() / "sections.yaml"
    save_config(config, path)
    assert load_config(path, []) == config


def test_a_free_value_within_itself_is_refused():
    with pytest.raises(UserError, match=r"data\.chat_template_arguments\.b is nested too deeply"):
        load_config(None, [*NEEDED, "data.chat_template_arguments=&a {b: *a}"])


@dataclass
class Free:
    values: dict[str, Any] = free_values()


FREE = [
    ("values.a=5", {"a": 5}),
    ("values.a=-0.5", {"a": -0.5}),
    ("values.a=true", {"a": True}),
    ("values.a='5'", {"a": "5"}),
    ("values.a=fp8", {"a": "fp8"}),
    ("values.a={b: [1, x, null], c: {d: 1e-3}}", {"a": {"b": [1, "x", None], "c": {"d": 1e-3}}}),
    ("values={a: 1, b: null}", {"a": 1}),
    ("values.a=null", {}),
]


@pytest.mark.parametrize(("override", "values"), FREE)
def test_free_values_have_the_types_of_yaml(override, values):
    assert load_config(None, [override], Free).values == values
