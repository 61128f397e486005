"""The responses before and after: of the first problems of the lowest seed, and as they were written."""

import json
import re
from dataclasses import replace
from pathlib import Path

from megatron_fipo.run_dir import evaluation_table
from megatron_fipo.study.compare import Comparison
from megatron_fipo.study.evaluations import Response, read_evaluation
from megatron_fipo.study.outcome import Outcome
from megatron_fipo.study.results import Result
from megatron_fipo.study.samples import HEAD, TAIL, Sample, choose_samples, samples_markdown
from megatron_fipo.study.write import read_comparison, write_results
from tests.study.synthetic_study import write_study

PROBLEM = ("held_out", "0", "what is 3 + 4?", "7")


def _read(result: Result, iteration: int) -> list[Response] | None:
    return read_evaluation(result.run_dir, iteration)


def _choose(comparison: Comparison) -> list[Sample]:
    return choose_samples(comparison.variants, _read)


def _sample(text: str) -> Sample:
    return Sample(
        "fipo",
        1,
        PROBLEM,
        (0, 20),
        Response(PROBLEM, False, 3.0, "no idea"),
        Response(PROBLEM, True, 9.0, text),
    )


def test_the_first_problems_of_the_lowest_complete_seed_are_chosen(tmp_path: Path) -> None:
    folder = write_study(tmp_path, ("fipo", "dapo"))
    folder.save_outcome("countdown-dapo-seed1", Outcome("failed", "no memory"))
    found = _choose(read_comparison([tmp_path], allow_mixed_versions=False))
    chosen = [(sample.arm, sample.seed, sample.problem[1], sample.iterations) for sample in found]
    assert chosen == [
        (arm, seed, str(problem), (0, 20)) for problem in range(5) for arm, seed in (("fipo", 1), ("dapo", 2))
    ]
    assert found[2].before.text == "iteration 0, problem 1, response 0"
    assert found[2].after.text == "iteration 20, problem 1, response 0"


def test_a_run_without_tables_has_no_samples(tmp_path: Path) -> None:
    folder = write_study(tmp_path, ("fipo", "dapo"), (1,))
    for table in folder.run_dir("countdown-fipo-seed1").glob("evaluations/*"):
        table.unlink()
    write_results([tmp_path], tmp_path, allow_mixed_versions=False)
    text = (tmp_path / "samples.md").read_text()
    assert "dapo, seed 1, after 20 iterations" in text
    assert "fipo" not in text
    assert samples_markdown([]) == "No complete run has tables of its evaluations.\n"


def test_no_line_of_a_response_ends_its_code_block() -> None:
    text = samples_markdown([_sample("```python\n````\n# Answer: 7\n`````")])
    after = text.split("after 20 iterations: right, 9 tokens\n\n")[1]
    assert after == "``````text\n```python\n````\n# Answer: 7\n`````\n``````\n"


def test_nothing_of_a_problem_is_outside_code_blocks() -> None:
    hostile = "# no <script>heading</script>\n| cell |"
    sample = _sample("Answer: 7")
    problem = ("held_out", hostile, hostile, hostile)
    text = samples_markdown([replace(sample, problem=problem)])
    outside = re.sub(r"^```text\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "script" not in outside
    assert text.count(hostile) == 2  # prompt and answer


def test_the_middle_of_a_long_response_is_cut_and_counted() -> None:
    text = samples_markdown([_sample("a" * HEAD + "b" * 5_000 + "c" * TAIL)])
    assert f"{'a' * HEAD}\n… 5,000 characters not shown …\n{'c' * TAIL}\n" in text
    assert "b" * 10 not in text


def test_line_separators_within_a_response_do_not_end_a_row(tmp_path: Path) -> None:
    row = {"set": "s", "problem_id": "0", "prompt": "p", "ground_truth": "7", "accuracy": 1.0, "length": 3}
    table = evaluation_table(tmp_path, 0)
    table.parent.mkdir()
    table.write_text(json.dumps({**row, "response": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    found = read_evaluation(tmp_path, 0)
    assert found is not None
    assert [response.text for response in found] == ["a\u2028b\x85c"]
