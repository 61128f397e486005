"""Sets of rows as people have them: columns of other names, answers within solutions, functions, prompts, several in one run."""

import json
import sys

import pytest

from megatron_fipo.config import Config, DataConfig, EvaluationSet, ModelConfig, RolloutConfig, TrainingSet
from megatron_fipo.errors import UserError
from megatron_fipo.hooks import HookError
from megatron_fipo.tasks.countdown.tokenizer import build_tokenizer
from megatron_fipo.tasks.prompt_encoder import PromptEncoder
from megatron_fipo.tasks.prompt_file import RowSettings, read_problems
from megatron_fipo.tasks.registry import load_datasets, load_evaluation
from megatron_fipo.tasks.row import ColumnNames, last_boxed, parse_row
from tests.tasks.files import NOW, read, row, write

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + '=' + m.content + ',' }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking %}*{% endif %}{% if bos_token %}{% endif %}"
)


def config(tmp_path, limit=50, **data):
    return Config(
        ModelConfig("m"),
        str(tmp_path),
        data=DataConfig(**data),
        rollout=RolloutConfig(max_prompt_length=limit, max_response_length=100),
    )


def texts(problems):
    return [(problem.problem_id, problem.prompt_text, problem.ground_truth) for problem in problems]


# -- columns


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_columns_have_the_names_that_the_mapping_gives(tmp_path, name):
    rows = [
        {"problem": f"{i}+1", "meta": {"out": {"answer": i}, "key": f"k{i}"}, "src": "s"} for i in range(3)
    ]
    names = ColumnNames("problem", "meta.out.answer", "src", "meta.key")
    problems = read(write(tmp_path / name, rows), names=names)
    assert texts(problems) == [(f"k{i}", f"{i}+1", str(i)) for i in range(3)]
    assert {problem.data_source for problem in problems} == {"s"}


def test_a_column_whose_name_has_a_dot_is_read(tmp_path):
    assert parse_row("row 0", {"a.b": "1", "a": {"b": "2"}, "c": 3}, ColumnNames("a.b", "c")).prompt == "1"


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize(
    ("columns", "setting"),
    [
        ({"problem": "1", "answer": "2"}, "data.columns.prompt=problem"),
        ({"Question": "1", "solution": "2"}, "data.columns.prompt=Question"),
        ({"prompt": "1", "Answer": "2", "solution": "3"}, "data.columns.ground_truth=Answer"),
        ({"prompt": "1", "solution": "3"}, "data.columns.ground_truth=solution"),
    ],
)
def test_a_missing_column_is_named_with_the_setting_and_its_likely_value(tmp_path, name, columns, setting):
    with pytest.raises(UserError) as error:
        read(write(tmp_path / name, [columns]))
    assert f"{', '.join(columns)}; set {setting} if that is it" in str(error.value)
    assert name in str(error.value)


def test_an_object_as_json_text_is_read_as_the_object_and_reported_once(tmp_path):
    rows = [
        row() | {"prompt": str(i), "reward_model": json.dumps({"ground_truth": str(i)})} for i in range(4)
    ]
    for name in ("a.jsonl", "a.parquet"):
        path, logged = write(tmp_path / name, rows), []
        assert [problem.ground_truth for problem in read(path, log=logged.append)] == list("0123")
        assert logged == [
            f"{path}: `reward_model` of 4 rows is JSON text of an object and is read as the object"
        ]
    for text in ("34", "[1]", "{", '{"ground_truth": "1", "ground_truth": "2"}'):
        with pytest.raises(UserError, match=r"row 7 has a `reward_model` that is not an object"):
            parse_row("row 7", row() | {"reward_model": text})


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So \boxed{34}.", "34"),
        (r"\boxed{1}, and finally $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\\}b}", r"a\\"),
        ("none", None),
        (r"\boxed{1", None),
        (r"\boxed{\}", None),
    ],
)
def test_the_last_boxed_answer_of_a_solution_is_found(solution, answer):
    assert last_boxed(solution) == answer


def test_answers_are_taken_out_of_solutions(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1", "reward_model": {"ground_truth": r"so \boxed{7}"}}])
    assert read(path, answer="boxed")[0].ground_truth == "7"
    with pytest.raises(
        UserError, match=r"line 1 has a `reward_model.ground_truth` without an answer in ####"
    ):
        read(path, answer="hashes")
    write(path, [{"prompt": "1", "reward_model": {"ground_truth": "1+6=7\n#### 7"}}])
    assert read(path, answer="hashes")[0].ground_truth == "7"
    write(path, [{"prompt": "1", "reward_model": {"ground_truth": r"\boxed{ }"}}])
    with pytest.raises(UserError, match=r"without an answer in \\boxed\{...\}"):
        read(path, answer="boxed")


# -- prompts above the limit


def test_prompts_above_the_limit_are_dropped_or_cut_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("1+1"), row("12345678"), row("3*3"), row("87654321")])
    counted = (
        f"{path}: 2 of 4 rows have a prompt above rollout.max_prompt_length, the longest with 8 tokens (lines 2, 4); "
        "they are {} (data.overlong_prompts={})"
    )
    logged = []
    assert [p.prompt_text for p in read(path, limit=4, overlong="drop", log=logged.append)] == ["1+1", "3*3"]
    assert logged[0] == counted.format("dropped", "drop")
    logged.clear()
    cut = read(path, limit=4, overlong="truncate_left", log=logged.append)
    assert [p.prompt_text for p in cut] == ["1+1", "5678", "3*3", "4321"]
    assert cut[1].prompt_ids == tuple(build_tokenizer()("5678")["input_ids"])
    assert logged[0] == counted.format("cut at their start", "truncate_left")
    with pytest.raises(UserError, match=r"every prompt is above rollout.max_prompt_length"):
        read(path, limit=1, overlong="drop")


# -- chat templates


def encoder(**settings):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return PromptEncoder(tokenizer, 50, NOW, **settings)


def test_prompts_get_a_system_message_and_texts_become_messages(tmp_path):
    rows = [
        row("1"),
        row([{"role": "system", "content": "9"}, {"role": "user", "content": "2"}]),
        row() | {"prompt": "3:"},
    ]
    settings = RowSettings(str(write(tmp_path / "a.jsonl", rows)), "jsonl")
    logged = []

    def prompts(**given):
        logged.clear()
        return [problem.prompt_text for problem in read_problems(settings, encoder(**given), logged.append)]

    assert prompts() == ["u=1,", "s=9,u=2,", "3:"]
    assert logged == [
        f"{settings.path}: 1 prompts are plain text and are used without the chat template; "
        "data.text_prompts=user_message makes messages of them"
    ]
    assert prompts(wraps_texts=True) == ["u=1,", "s=9,u=2,", "u=3:,"]
    assert logged == []
    assert prompts(wraps_texts=True, system_prompt="8") == ["s=8,u=1,", "s=9,u=2,", "s=8,u=3:,"]
    with pytest.raises(
        UserError, match=r"line 3 has a plain text .*data.system_prompt .*data.text_prompts=user_message"
    ):
        prompts(system_prompt="8")
    assert prompts(template_arguments={"enable_thinking": True})[0] == "u=1,*"
    assert prompts(template_arguments={"enable_thinking": False})[0] == "u=1,"


def test_an_argument_that_the_template_does_not_read_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    path = str(write(tmp_path / "a.jsonl", [row()]))

    def load(**arguments):
        given = config(tmp_path, source="jsonl", train_path=path, chat_template_arguments=arguments)
        return load_datasets(given, tokenizer, NOW)[0].problems[0].prompt_text

    with pytest.raises(UserError, match=r"has thinking, but the tokenizer has no chat template"):
        load(thinking=True)
    tokenizer.chat_template = TEMPLATE
    assert load(enable_thinking=True) == "u=1+1,*"
    for name in ("thinking", "messages", "bos_token", "tokenize"):
        with pytest.raises(UserError) as error:
            load(**{name: True})
        assert str(error.value) == (
            f"data.chat_template_arguments.{name}: the chat template does not read {name}; it reads enable_thinking"
        )
    tokenizer.chat_template = (
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{% for x in () %}{% break %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"it reads no further values"):
        load(thinking=True)
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(UserError, match=r"the chat template refuses the prompt"):
        load(thinking=True)


# -- functions


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module with a function `rows`; returns its import path."""
    monkeypatch.chdir(tmp_path)
    written = []

    def write_module(text):
        name = f"own_rows_{tmp_path.name.replace('-', '_')}_{len(written)}"
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return f"{name}:rows"

    yield write_module
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


GOOD = """
def rows(path):
    for number in range(3):
        yield {"prompt": f"{number}+1", "reward_model": {"ground_truth": number}, "set": str(path), "raw": b"1", "pair": (1, 2)}
"""


def test_a_function_gives_the_rows_of_training_and_evaluation_sets(tmp_path, module):
    source, logged = module(GOOD + "\ndef reward(completion):\n    return 0.0\n"), []
    given = config(tmp_path, source=source)
    given.evaluation.sets = {"held": EvaluationSet("easy")}
    given.reward.name = source.replace(":rows", ":reward")
    dataset, held_out = load_datasets(given, build_tokenizer(), NOW, logged.append)
    assert texts(dataset.problems) == [(str(i), f"{i}+1", str(i)) for i in range(3)]
    assert dataset.problems[0].columns == {
        "prompt": "0+1",
        "reward_model": {"ground_truth": 0},
        "set": "None",
    }
    assert [problem.columns["set"] for problem in held_out["held"]] == ["easy"] * 3
    assert f"{source}: rewards do not get the columns pair, raw, whose values" in logged[0]
    given.reward.name = "dapo_math"
    assert load_datasets(given, build_tokenizer(), NOW)[0].problems[0].columns == {}
    given.environment.name = "tools:step"
    assert load_datasets(given, build_tokenizer(), NOW)[0].problems[0].columns.keys() == {
        "prompt",
        "reward_model",
        "set",
    }


def test_a_set_may_be_of_another_source_than_the_others(tmp_path, module):
    source = module(GOOD)
    path = write(tmp_path / "a.parquet", [{"question": "7+7", "final": r"\boxed{14}"}])
    given = config(tmp_path, source=source, train_path="x")
    columns = {"prompt": "question", "ground_truth": "final"}
    given.evaluation.sets = {
        "file": EvaluationSet(str(path), source="parquet", columns=columns, answer="boxed")
    }
    dataset, held_out = load_datasets(given, build_tokenizer(), NOW)
    assert len(dataset) == 3
    assert texts(held_out["file"]) == [("0", "7+7", "14")]


@pytest.mark.parametrize(
    ("text", "message", "traced"),
    [
        ("rows = 7", "is a int; name a function of the path of a set", False),
        ("def rows(): pass", r"cannot be called with one argument, the path of the set \(too many", False),
        (
            "def rows(path, more): pass",
            r"cannot be called with one argument.*missing a required argument: 'more'",
            False,
        ),
        ("def rows(path): return None", "returns a NoneType for x; yield one dictionary per row", False),
        ("def rows(path): return {}", "returns a dict for x; yield one dictionary per row", False),
        (
            "def rows(path): return 1 / 0",
            r"raises ZeroDivisionError \(division by zero\) for row 0 of x",
            True,
        ),
        ("def rows(path):\n    yield {}\n    [][1]", r"x row 0 of .*:rows has no `prompt`", False),
        (
            GOOD + "    raise KeyError(path)",
            r"raises KeyError \('x'\) for row 3 of x; correct the function",
            True,
        ),
        (GOOD + "    yield [1]", r"row 3 of x is a list; yield dictionaries", False),
        (GOOD + "    yield {1: 2}", r"row 3 of x is a dictionary with names that are not text", False),
        ("def rows(path): return iter(())", "x has no rows", False),
        (
            GOOD.replace("number},", "0.5},"),
            r"x row 0 of \w+:rows has a `reward_model.ground_truth` that is neither",
            False,
        ),
        ("import nonexistent_module", "No module named 'nonexistent_module'; install it", True),
    ],
)
def test_a_function_that_gives_no_rows_is_named(tmp_path, module, text, message, traced):
    given = config(tmp_path, source=module(text), train_path="x")
    with pytest.raises(UserError, match=message) as error:
        load_datasets(given, build_tokenizer(), NOW)
    trace = error.value.trace if isinstance(error.value, HookError) else ""
    assert bool(trace) == traced
    assert "own_rows" in trace or not traced
    assert "\n" not in str(error.value)


def test_a_long_source_is_reported_while_it_is_read(tmp_path, module, monkeypatch):
    monkeypatch.setattr("megatron_fipo.tasks.row_notes.ROWS_PER_NOTE", 2)
    logged = []
    given = config(tmp_path, source=module(GOOD))
    load_datasets(given, build_tokenizer(), NOW, logged.append)
    assert logged[0] == f"{given.data.source}: 2 rows read so far"


# -- several sets


def test_sets_have_prefixed_ids_and_their_own_settings(tmp_path):
    paths = {}
    for name in ("easy", "hard"):
        rows = [
            row(f"{i}*2{'+1' * (name == 'hard')}", str(i), f"i{i}") | {"data_source": f"src{i}"}
            for i in range(3)
        ]
        paths[name] = str(write(tmp_path / f"{name}.jsonl", rows))
    sets = {
        "easy": TrainingSet(paths["easy"], weight=3.0),
        "hard": TrainingSet(paths["hard"], reward="countdown + dapo_math", max_response_length=40),
    }
    given = config(tmp_path, source="jsonl", sets=sets)
    given.reward.by_data_source = {"src1": "0.5*dapo_math"}
    sets["hard"].reward = "2*dapo_math"
    given.evaluation.sets = {"same": EvaluationSet(paths["easy"], max_response_length=30)}
    logged = []
    mixed, held_out = load_datasets(given, build_tokenizer(), NOW, logged.append)
    assert logged[-1] == "3 of 3 problems of the evaluation set same are also trained on"
    by_id = {problem.problem_id: problem for problem in mixed.problems}
    assert sorted(by_id) == [f"{name}/i{i}" for name in ("easy", "hard") for i in range(3)]
    tasks = {
        name: (of.task.set_name, of.task.reward, of.task.max_response_length) for name, of in by_id.items()
    }
    assert tasks["easy/i0"] == ("easy", "dapo_math", 100)
    assert tasks["hard/i0"] == ("hard", "2*dapo_math", 40)
    assert tasks["hard/i1"] == ("hard", "0.5*dapo_math", 40)
    assert held_out["same"][0].problem_id == "i0"
    assert held_out["same"][0].task.max_response_length == 30
    taken = [problem.task.set_name for problem in mixed.take(400)]
    assert abs(taken.count("easy") - 300) <= 2
    assert load_evaluation(given, build_tokenizer(), NOW) == held_out
    assert mixed.fingerprint.keys() == {"easy", "hard"}
