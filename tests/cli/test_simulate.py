"""`megatron-fipo simulate` from its arguments to its page, and what it refuses."""

import pytest

from megatron_fipo.cli.main import run
from megatron_fipo.exit_codes import DONE, USER_ERROR

RECIPE = "examples/qwen2.5-7b-math/fipo.yaml"
SMALL = (
    "--machine",
    "h100-80gb",
    "batch.prompts_per_iteration=4",
    "batch.mini_batch_prompts=4",
    "batch.responses_per_prompt=4",
    "rollout.prompts_in_flight=10",
    "rollout.max_response_length=200",
    "reward.overlong_buffer=0",
    "evaluation.samples_per_problem=1",
    "iterations=4",
)


def test_a_run_is_simulated_and_its_page_written(tmp_path, capsys):
    page = tmp_path / "simulated.html"
    assert run(["simulate", RECIPE, *SMALL, "--output", str(page)]) == DONE
    output = capsys.readouterr().out
    assert "wall time" in output
    assert "trained tokens/s/GPU" in output
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--machine", "h1000"], "there is no machine 'h1000'"),
        (["--gpu-mtbf-hours", "0"], "--gpu-mtbf-hours must be above 0, not 0"),
        (["--engine-restart-s", "-1"], "--engine-restart-s must be at least 0, not -1"),
        (["--informative", "0"], "--informative must be above 0 and at most 1, not 0"),
        (["--response-end", "300"], "a mean response of 300 tokens is above rollout.max_response_length=200"),
        (["--gpu-mtbf-hours", "1e-6"], "the run makes no progress"),
        (["rollout.num_engines=0"], "rollout.num_engines must be at least 1"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, sentence, capsys):
    assert run(["simulate", RECIPE, *SMALL, *arguments]) == USER_ERROR
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_the_page_is_checked_before_the_simulation(tmp_path, capsys):
    assert run(["simulate", RECIPE, *SMALL, "--output", str(tmp_path)]) == USER_ERROR
    assert "--output" in capsys.readouterr().err
