"""Published files become the rows that are read: each prompt once, with one answer, and every row is accounted for."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.cli.main import main
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.dapo_math import score_dapo_math
from megatron_fipo.tasks.published.files import find_files
from megatron_fipo.tasks.published.forms import TEMPLATE_HEAD, TEMPLATE_TAIL, aime_answer
from megatron_fipo.tasks.published.selection import select
from megatron_fipo.tasks.published.sets import SETS
from megatron_fipo.tasks.row_reader import read_rows
from megatron_fipo.tasks.task import Problem
from tests.completions import scored
from tests.tasks.files import read

AYA = "Every morning Aya goes for a $9$-kilometer-long walk."
BASES = "Find the sum of all integer bases $b>9$ for which $17_b$ is a divisor of $97_b$."


def problems(first: str, count: int = 30) -> list[tuple[str, int]]:
    return [(first if n == 0 else f"Problem {n}: find $n$.", 7 * n) for n in range(count)]


def dapo_row(problem: str, answer: str, index: object = "i") -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"{TEMPLATE_HEAD}{problem}{TEMPLATE_TAIL}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def save(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


FORMS = {
    "BytedTsinghua-SIA/AIME-2024": (
        "aime24",
        "data/aime-2024.parquet",
        [
            dapo_row(p, str(a), n) | {"extra_info": {"index": n, "raw_problem": p, "split": None}}
            for n, (p, a) in enumerate(problems(AYA))
        ]
        * 32,
    ),
    "HuggingFaceH4/aime_2024": (
        "aime24",
        "data/train-00000-of-00001.parquet",
        [
            {"id": 60 + n, "problem": p, "solution": "long", "answer": f"{a:03}", "url": "u", "year": "2024"}
            for n, (p, a) in enumerate(problems(AYA))
        ],
    ),
    "Maxwell-Jia/AIME_2024": (
        "aime24",
        "aime_2024_problems.parquet",
        [
            {"ID": f"2024-I-{n}", "Problem": p, "Solution": "long", "Answer": a}
            for n, (p, a) in enumerate(problems(AYA))
        ],
    ),
    "math-ai/aime25": (
        "aime25",
        "test.jsonl",
        [{"problem": p, "answer": str(a), "id": str(n)} for n, (p, a) in enumerate(problems(BASES))],
    ),
    "yentinglin/aime_2025": (
        "aime25",
        "data/train-00000-of-00001.parquet",
        [
            {"id": n, "problem": p, "answer": str(a), "solution": "long", "url": "u", "year": 2025}
            for n, (p, a) in enumerate(problems(BASES))
        ],
    ),
    "MathArena/aime_2025": (
        "aime25",
        "data/train-00000-of-00001.parquet",
        [
            {"problem_idx": n, "problem": p, "answer": a, "problem_type": ["Algebra"]}
            for n, (p, a) in enumerate(problems(BASES))
        ],
    ),
}


def made(name: str, source: Path, output: Path) -> list[dict]:
    assert main(["data", name, "--from", str(source), "--output", str(output)]) == 0
    return pyarrow.parquet.read_table(output).to_pylist()


def refused(capsys, name: str, source: Path, output: Path) -> str:
    """The one sentence of a refusal, which writes nothing."""
    assert main(["data", name, "--from", str(source), "--output", str(output)]) == 2
    assert not output.exists()
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize("whole_folder", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_gives_the_same_rows(tmp_path, form, whole_folder):
    name, file, rows = FORMS[form]
    path = save(tmp_path / "in" / file, rows)
    found = made(name, tmp_path / "in" if whole_folder else path, tmp_path / "out.parquet")
    first = AYA if name == "aime24" else BASES
    assert [row["prompt"][0]["content"] for row in found] == [
        f"{TEMPLATE_HEAD}{problem}{TEMPLATE_TAIL}" for problem, _ in problems(first)
    ]
    assert [row["reward_model"]["ground_truth"] for row in found] == [str(7 * n) for n in range(30)]
    assert {row["data_source"] for row in found} == {name}
    assert [problem.problem_id for problem in read(tmp_path / "out.parquet", limit=9999)] == [
        str(row["extra_info"]["index"]) for row in found
    ]
    assert len({row["extra_info"]["index"] for row in found}) == 30


def test_the_two_files_of_opencompass_are_one_set(tmp_path):
    rows = [
        {"question": p, "answer": f"{a}" if n != 4 else f"{a}^\\circ"}
        for n, (p, a) in enumerate(problems(BASES))
    ]
    folder = tmp_path / "AIME2025"
    save(folder / "aime2025-I.jsonl", rows[:15])
    save(folder / "aime2025-II.jsonl", rows[15:])
    save(folder / ".cache/huggingface/other.jsonl", [{"a": 1}])
    (folder / "README.md").write_text("AIME 2025")
    found = made("aime25", folder, tmp_path / "out.parquet")
    assert [row["reward_model"]["ground_truth"] for row in found] == [str(7 * n) for n in range(30)]
    assert [row["extra_info"]["index"] for row in found] == [f"aime25-{n}" for n in range(1, 31)]


def test_a_folder_with_several_sets_gives_the_one_of_the_published_name(tmp_path):
    folder = tmp_path / "downloads"
    for name in ("aime-2024.parquet", "dapo-math-17k.parquet", "test.jsonl"):
        path = folder / name[0] / name
        path.parent.mkdir(parents=True)
        path.touch()
    for name, published in SETS.items():
        (file,) = find_files(published, folder)
        assert file.name == Path(published.file).name, name


def test_a_right_response_to_a_made_row_is_right(tmp_path):
    name, file, rows = FORMS["HuggingFaceH4/aime_2024"]
    row = made(name, save(tmp_path / file, rows), tmp_path / "out.parquet")[9]
    problem = Problem("p", (1,), "", row["reward_model"]["ground_truth"], name)
    assert rows[9]["answer"] == "063"
    assert scored(score_dapo_math, "so\nAnswer: 63", problem).accuracy == 1


@pytest.fixture(scope="module")
def dapo_file(tmp_path_factory) -> Path:
    """17,398 prompts three times; 7 have a second answer, 2 an answer that no response matches, 1 another prompt."""
    rows = [dapo_row(f"Problem {n}", str(n), f"id-{n}") for n in range(17_398)]
    rows += [dapo_row(f"Problem {n}", str(n), f"other-{n}") for n in range(17_398)] * 2
    rows += [dapo_row(f"Problem {n}", "-5") for n in range(100, 107)]
    rows += [dapo_row(f"Problem {n}", "1\n2") for n in (1, 2)]
    rows += [{**dapo_row("", "1"), "prompt": [{"content": "What is 1?", "role": "user"}]}]
    return save(tmp_path_factory.mktemp("dapo") / "dapo-math-17k.parquet", rows)


def test_dapo_is_deduplicated_and_everything_left_out_is_counted(tmp_path, dapo_file, capsys):
    found = made("dapo", dapo_file, tmp_path / "dapo.parquet")
    kept = [n for n in range(17_398) if n not in range(100, 107)]
    assert [row["reward_model"]["ground_truth"] for row in found] == [str(n) for n in kept]
    assert [row["extra_info"]["index"] for row in found] == [f"id-{n}" for n in kept]
    assert found[0].keys() == dapo_row("", "").keys()
    source, read_line, repeats, different, *others, wrote = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{dapo_file}  sha256 [0-9a-f]{{64}}", source)
    assert read_line == "read 52,204 rows with 17,398 different prompts"
    assert repeats == "dropped 34,782 rows that repeat a prompt with its answer"
    assert different.startswith(
        "dropped 7 prompts with different answers, 28 rows: "
        "dapo-math-17k.parquet row 100 ('100') and dapo-math-17k.parquet row 52194 ('-5'), "
    )
    assert different.endswith(" and 4 more")
    assert others == [
        "refused 2 rows, the first dapo-math-17k.parquet row 52201: its answer is not one that "
        "reward.name=dapo_math can score (as '1\\n2')",
        "refused 1 rows, the first dapo-math-17k.parquet row 52203: has a `prompt` that is not in DAPO's template",
    ]
    assert wrote.startswith(f"wrote 17,391 problems to {tmp_path}/dapo.parquet  sha256 ")
    numbers = [
        int(n.replace(",", ""))
        for n in re.findall(r"[\d,]+(?= rows)", " ".join([repeats, different, *others]))
    ]
    assert sum(numbers) + 17_391 == 52_204


def test_the_same_input_gives_the_same_bytes_and_an_older_file_is_replaced_complete(tmp_path):
    name, file, rows = FORMS["math-ai/aime25"]
    source, one, two = save(tmp_path / file, rows), tmp_path / "one.parquet", tmp_path / "two.parquet"
    two.write_text("older")
    made(name, source, one)
    made(name, source, two)
    assert one.read_bytes() == two.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {file, "one.parquet", "two.parquet"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            problems(AYA, 29),
            r"this is not AIME 2024, which has 30 problems: read 29 rows with 29 different prompts$",
        ),
        (problems(AYA, 31), r"this is not AIME 2024, which has 30 problems: \S+ has more; check the file$"),
        (
            problems(BASES),
            r"this is not AIME 2024: no problem contains its first one; check the year of the file$",
        ),
        (
            [*problems(AYA), (AYA, 5)],
            r"has 30 problems, but 29 are left: .*dropped 1 prompts with different answers, 2 rows: "
            r"a.jsonl line 1 \('0'\) and a.jsonl line 31 \('5'\)$",
        ),
        (
            [*problems(AYA)[:29], ("Last", "1/2")],
            r"refused 1 rows, the first a.jsonl line 30: its answer is not an integer from 0 to 999 \(as '1/2'\)$",
        ),
        ([*problems(AYA)[:29], ("Last", 1000)], r"not an integer from 0 to 999 \(as '1000'\)$"),
        ([*problems(AYA)[:29], ("Last", -1)], r"not an integer from 0 to 999 \(as '-1'\)$"),
        (
            [*problems(AYA)[:29], ("Last", float("nan"))],
            r"line 30: has a `answer` that is neither text nor .* nan",
        ),
        ([*problems(AYA)[:29], ("Last", 33.5)], r"line 30: has a `answer` that is neither text nor .* 33.5"),
        ([*problems(AYA)[:29], ("Last", None)], r"line 30: has no `answer`$"),
        ([*problems(AYA)[:29], (" ", 3)], r"line 30: has no `problem`$"),
    ],
)
def test_a_file_that_is_not_the_set_is_refused_with_the_numbers(tmp_path, capsys, rows, message):
    source = save(tmp_path / "a.jsonl", [{"problem": p, "answer": a} for p, a in rows])
    assert re.search(message, refused(capsys, "aime24", source, tmp_path / "out.parquet"))


def damaged(path: Path) -> Path:
    save(path, FORMS["Maxwell-Jia/AIME_2024"][2])
    path.write_bytes(path.read_bytes()[:40] + b"\xff" * 400 + path.read_bytes()[440:])
    return path


def empty_folder(path: Path) -> Path:
    path.mkdir()
    (path / "README.md").write_text("text")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent", r"absent does not exist; download https://huggingface.co/datasets/Byted"),
        (lambda p: empty_folder(p / "a.parquet").parent, r"is a folder without .parquet or .jsonl files"),
        (lambda p: empty_folder(p / "f"), r"is a folder without .parquet or .jsonl files; download https://"),
        (lambda p: damaged(p / "a.parquet"), r"a.parquet is not a readable parquet file"),
        (
            lambda p: save(p / "a.parquet", [{"x": 1, "y": 2}]),
            r"has the columns x, y, but a published file has prompt",
        ),
        (lambda p: save(p / "a.jsonl", [{"problem": "p"}]), r"has the columns problem, but a published file"),
        (lambda p: save(p / "a.jsonl", []), r"a.jsonl has no rows"),
        (
            lambda p: save(p / "a.parquet", [{"problem": "p", "answer": 1}]),
            "read 1 rows with 1 different prompts$",
        ),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, capsys, make, message):
    assert re.search(message, refused(capsys, "aime24", make(tmp_path), tmp_path / "out.parquet"))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"\x1f\x8b\x08", "is compressed by gzip"),
        (b'{"problem": "p", "problem": "q"}\n', "line 1 cannot be read .*twice"),
        (b'{"problem": \n', "line 1 is not JSON"),
    ],
)
def test_another_file_in_its_place_is_named(tmp_path, capsys, head, message):
    (tmp_path / "a.jsonl").write_bytes(head)
    line = refused(capsys, "aime25", tmp_path / "a.jsonl", tmp_path / "out.parquet")
    assert re.search(rf"megatron-fipo: {tmp_path}/a.jsonl {message}", line)


def test_the_file_that_is_read_is_not_overwritten(tmp_path, capsys):
    name, file, rows = FORMS["math-ai/aime25"]
    source = save(tmp_path / file, rows)
    before = source.read_bytes()
    assert main(["data", name, "--from", str(source), "--output", str(source)]) == 2
    assert "is the file that is read" in capsys.readouterr().err
    assert source.read_bytes() == before


@given(
    st.integers(0, 999),
    st.integers(1, 3),
    st.sampled_from(["{}", "${}$", " {} ", "{}^\\circ", "${}^{{\\circ}}$", "{}°"]),
)
def test_an_aime_answer_is_its_integer(value, digits, form):
    assert aime_answer(form.format(f"{value:0{digits}}")) == str(value)


@given(st.text(alphabet="0123456789.-/$\\^{}circ°xe ", max_size=8))
def test_what_is_no_integer_is_no_aime_answer(text):
    answer = aime_answer(text)
    assert answer is None or (answer == str(int(answer)) and 0 <= int(answer) <= 999 and answer in text)


ROWS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["1", "01", "2", "x"])), min_size=1, max_size=40)


@settings(deadline=None)
@given(ROWS, st.booleans())
def test_the_numbers_of_a_selection_add_up(tmp_path_factory, rows, parquet):
    """For any rows: each prompt with one answer is kept once, in order, and no row is lost or counted twice."""
    path = tmp_path_factory.getbasetemp() / f"rows.{'parquet' if parquet else 'jsonl'}"
    save(path, [{"problem": f"p{p}", "answer": a} for p, a in rows])
    answers: dict[int, set[int]] = {}
    for prompt, answer in rows:
        if answer != "x":
            answers.setdefault(prompt, set()).add(int(answer))
    expected = [(p, str(*found)) for p, found in answers.items() if len(found) == 1]
    published = replace(SETS["aime24"], distinct=range(1, 100), mark=re.compile(""))
    if not expected:
        with pytest.raises(UserError, match="this is not AIME 2024"):
            select(published, [path])
        return
    selection = select(published, [path])
    assert [(p.prompt, p.answer) for p in selection.kept] == [
        (f"{TEMPLATE_HEAD}p{p}{TEMPLATE_TAIL}", a) for p, a in expected
    ]
    counted = [int(n) for n in re.findall(r"(\d+) rows", " ".join(selection.report()[1:]))]
    assert sum(counted) + len(expected) == len(rows) == selection.rows


def test_the_template_is_that_of_the_published_rows(tmp_path):
    """The stored rows of a made file read as any data file."""
    name, file, rows = FORMS["BytedTsinghua-SIA/AIME-2024"]
    made(name, save(tmp_path / file, rows), tmp_path / "out.parquet")
    assert [values["prompt"] for _, values in read_rows(tmp_path / "out.parquet", "parquet")] == [
        row["prompt"] for row in rows[:30]
    ]
