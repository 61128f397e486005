"""The responses before and after: of the same problems and one seed in all arms, and as they were written."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_fipo.run_dir import evaluation_table
from megatron_fipo.study.evaluations import Response, read_evaluation
from megatron_fipo.study.outcome import Outcome
from megatron_fipo.study.results import Result
from megatron_fipo.study.samples import (
    HEAD,
    NOTHING,
    TAIL,
    Sample,
    Section,
    choose_samples,
    samples_markdown,
)
from megatron_fipo.study.write import read_comparison, write_results
from tests.study.synthetic_study import write_study

PROBLEM = ("held_out", "0", "what is 3 + 4?", "7")


def _read(result: Result, iteration: int) -> Iterator[Response]:
    return read_evaluation(result.run_dir, iteration)


def _choose(study: Path) -> list[Section]:
    return choose_samples(read_comparison([study], allow_mixed_versions=False).variants, _read)


def _section(text: str) -> Section:
    before, after = Response(PROBLEM, False, 3.0, "no idea"), Response(PROBLEM, True, 9.0, text)
    return Section("countdown", PROBLEM, [Sample("fipo", 1, ((0, before), (20, after)))])


def _remove_problems(table: Path, *numbers: str) -> None:
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows if row["problem_id"] not in numbers))


def test_all_arms_show_the_first_problems_of_one_seed(tmp_path: Path) -> None:
    folder = write_study(tmp_path, ("fipo", "dapo"))
    folder.save_outcome("countdown-dapo-seed1", Outcome("failed", "no memory"))
    found = _choose(tmp_path)
    assert [section.problem[1:3] for section in found] == [(f"{i}", "seed 2") for i in range(5)]
    for section in found:
        assert [(sample.arm, sample.seed) for sample in section.samples] == [("fipo", 2), ("dapo", 2)]
        for sample in section.samples:
            assert [(iteration, response.text) for iteration, response in sample.ends] == [
                (i, f"iteration {i}, problem {section.problem[1]}, response 0") for i in (0, 20)
            ]


def test_problems_that_an_arm_lacks_are_replaced_by_later_ones(tmp_path: Path) -> None:
    folder = write_study(tmp_path, ("fipo", "dapo"), (1,))
    _remove_problems(evaluation_table(folder.run_dir("countdown-fipo-seed1"), 0), "0")
    _remove_problems(evaluation_table(folder.run_dir("countdown-dapo-seed1"), 20), "2", "3")
    found = _choose(tmp_path)
    assert [section.problem[1] for section in found] == ["1", "4", "5", "6", "7"]
    assert all(len(section.samples) == 2 for section in found)


def test_a_run_without_tables_has_no_samples(tmp_path: Path) -> None:
    folder = write_study(tmp_path, ("fipo", "dapo"), (1,))
    for table in folder.run_dir("countdown-fipo-seed1").glob("evaluations/*"):
        table.unlink()
    write_results([tmp_path], tmp_path, allow_mixed_versions=False)
    text = (tmp_path / "samples.md").read_text()
    assert "dapo, seed 1, after 20 iterations" in text
    assert "fipo" not in text
    assert samples_markdown([]) == NOTHING


def test_no_line_of_a_response_ends_its_code_block() -> None:
    text = samples_markdown([_section("```python\n````\n# Answer: 7\n`````")])
    after = text.split("after 20 iterations: right, 9 tokens\n\n")[1]
    assert after == "``````text\n```python\n````\n# Answer: 7\n`````\n``````\n"


def test_nothing_of_a_problem_or_an_arm_is_markup() -> None:
    hostile = "# no <script>heading</script>\n| cell |"
    section = _section("Answer: 7")
    sample = replace(section.samples[0], arm="```\n<img src=x>")
    text = samples_markdown(
        [replace(section, problem=("held_out", hostile, hostile, hostile), samples=[sample])]
    )
    outside = re.sub(r"^```text\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "script" not in outside
    assert "\n\\`\\`\\` \\<img src=x>, seed 1" in outside
    assert text.count(hostile) == 2  # prompt and answer


def test_what_a_terminal_would_act_on_is_shown_as_escapes() -> None:
    text = samples_markdown([_section("a\x1b[2Jb\u202ec\ud800d\re\x00\tf")])
    assert "a\\x1b[2Jb\\u202ec\\ud800d\\re\\x00\tf\n" in text
    text.encode()


def test_the_middle_of_a_long_response_is_cut_and_counted() -> None:
    text = samples_markdown([_section("a" * HEAD + "b" * 5_000 + "c" * TAIL)])
    assert f"{'a' * HEAD}\n… 5,000 characters not shown …\n{'c' * TAIL}\n" in text
    assert "b" * 10 not in text
    assert "b" * 50 in samples_markdown([_section("a" * HEAD + "b" * 50 + "c" * TAIL)])


def test_line_separators_within_a_response_do_not_end_a_row(tmp_path: Path) -> None:
    row = {"set": "s", "problem_id": "0", "prompt": "p", "ground_truth": "7", "accuracy": 1.0, "length": 3}
    table = evaluation_table(tmp_path, 0)
    table.parent.mkdir()
    table.write_text(json.dumps({**row, "response": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    assert [response.text for response in read_evaluation(tmp_path, 0)] == ["a\u2028b\x85c"]
