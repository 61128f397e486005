"""What a run reads when it starts and when it resumes: the same prompts on another day, other rows noticed."""

from megatron_fipo.config import Config, DataConfig, EvaluationConfig, EvaluationSet, ModelConfig
from megatron_fipo.driver.tokenizer import checked_tokenizer
from megatron_fipo.driver.train import load_inputs
from megatron_fipo.run_dir.run_directory import RunDirectory
from tests.run_dir.claimed_run import INPUTS, MODEL, claimed, save
from tests.tasks.files import row, write


def load(tmp_path, run_dir, answer="2", template="{{ messages[0].content }} {{ strftime_now('%d.%m.%Y') }}"):
    """(prompt texts, inputs, log)"""
    path = str(write(tmp_path / "rows.jsonl", [row(answer=answer)]))
    tokenizer = checked_tokenizer(str(MODEL), False)
    tokenizer.chat_template = template
    data = DataConfig(source="jsonl", train_path=path)
    evaluation = EvaluationConfig(sets={"same": EvaluationSet(path)})
    logged = []
    train_set, held_out, inputs = load_inputs(
        Config(ModelConfig(str(MODEL)), str(run_dir), data=data, evaluation=evaluation),
        RunDirectory(run_dir),
        tokenizer,
        logged.append,
    )
    return [problem.prompt_text for problem in [*train_set.problems, *held_out["same"]]], inputs, logged


def test_a_new_run_prints_the_date_of_its_start_and_a_resumed_one_that_of_the_first(tmp_path):
    prompts, inputs, logged = load(tmp_path, tmp_path / "new")
    year, month, day = inputs.prompt_time[:10].split("-")
    assert prompts == [f"1+1 {day}.{month}.{year}"] * 2
    assert logged[:1] == [f"the chat template prints the date, which stays {year}-{month}-{day} for this run"]

    save(claimed(tmp_path / "run"), 1)
    prompts, inputs, _ = load(tmp_path, tmp_path / "run")
    assert prompts == ["1+1 28.11.2026"] * 2
    assert inputs.prompt_time == INPUTS.prompt_time
    logged = load(tmp_path, tmp_path / "run", template="{{ messages[0].content }}")[2]
    assert logged == ["1 of 1 problems of the evaluation set same are also trained on"]


def test_inputs_follow_rows_and_not_the_date(tmp_path):
    before, again, other = (load(tmp_path, tmp_path / "new", answer)[1] for answer in ("2", "2", "3"))
    assert before == again or before.prompt_time != again.prompt_time  # a second may have passed
    assert (before.train, before.held_out, before.model) == (again.train, again.held_out, again.model)
    assert before.train != other.train
    assert before.held_out != other.held_out
