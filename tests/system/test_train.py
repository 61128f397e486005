"""The command line end to end on real Ray, Megatron-Core and the bundled model: train, resume, stop, split, evaluate.

Runs are tiny (4 groups of 4 responses), so they show that the parts work together and that no split changes the numbers, not
that anything is learnt.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1200)  # each run starts a Ray cluster, a trainer and an engine

ROOT = Path(__file__).parents[2]
TINY = [
    "batch.prompts_per_iteration=4",
    "batch.responses_per_prompt=4",
    "batch.mini_batch_prompts=2",
    "batch.max_tokens_per_micro_batch=512",
    "rollout.prompts_in_flight=8",
    "rollout.max_response_length=64",
    "data.evaluation_size=8",
    "evaluation.samples_per_problem=1",
    "evaluation.every=0",
    "tracking.wandb=disabled",
    "tracking.tensorboard=false",
]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "megatron_fipo.cli", *map(str, arguments)]


def run(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def train(run_dir: Path, *overrides: str, expect: int = 0) -> subprocess.CompletedProcess:
    return run(
        "train", "examples/countdown/fipo.yaml", *TINY, f"run_dir={run_dir}", *overrides, expect=expect
    )


def iterations(run_dir: Path) -> list[dict]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["values"] for record in records if record["kind"] == "iteration"]


BY_TIMING = ("time/", "tokens/generated", "tokens/dropped", "rollout/unused_share")
"""What may differ between equal runs: clocks, and how far prompts had come that were started in vain."""


def same_numbers(one: dict, other: dict, *but: str) -> bool:
    """Bit for bit, but for what depends on timing."""
    one, other = (
        {k: v for k, v in values.items() if not k.startswith((*BY_TIMING, *but))} for values in (one, other)
    )
    return one == other


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model/model.safetensors").read_bytes()


def wait_for_an_iteration(process: subprocess.Popen, run_dir: Path) -> None:
    deadline = time.monotonic() + 400
    while not ((run_dir / "metrics.jsonl").exists() and iterations(run_dir)):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def two_iterations(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "one-rank"
    train(run_dir, "iterations=2", "evaluation.before_training=true")
    return run_dir


def test_a_run_leaves_model_report_and_metrics(two_iterations):
    first, second = iterations(two_iterations)
    assert first["policy/sigma_log_ratio"] == second["policy/sigma_log_ratio"] == 0.0
    assert first["rollout/log_prob_difference"] < 1e-4
    assert second["weights/version"] == 2
    assert (two_iterations / "report.html").stat().st_size > 10_000
    samples = [json.loads(line) for line in (two_iterations / "samples.jsonl").read_text().splitlines()]
    assert any(weight != 1.0 for sample in samples for weight in sample["influence_weights"])

    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(two_iterations / "model")
    before = load_file(ROOT / "examples/countdown/base-model/model.safetensors")
    after = load_file(two_iterations / "model/model.safetensors")
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


def test_a_longer_run_continues_where_it_stopped(two_iterations, tmp_path):
    whole = tmp_path / "whole"
    train(whole, "iterations=3", "evaluation.before_training=true")
    train(two_iterations, "iterations=3", "evaluation.before_training=true")
    straight, resumed = iterations(whole), iterations(two_iterations)
    assert len(straight) == len(resumed) == 3
    assert same_numbers(straight[2], resumed[2])
    assert weights(whole) == weights(two_iterations)


def test_a_run_of_other_settings_is_refused_and_left_alone(two_iterations):
    before = (two_iterations / "config.yaml").read_bytes()
    done = train(two_iterations, "iterations=4", "objective.half_life=64", expect=2)
    assert "objective.half_life" in done.stderr
    assert "--allow-change" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (two_iterations / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "split",
    [
        ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
        ("parallel.context_parallel_size=2",),
        ("parallel.pipeline_model_parallel_size=2",),
        ("parallel.data_parallel_size=2",),
    ],
    ids=["tensor", "context", "pipeline", "data"],
)
def test_another_split_gives_the_same_first_iteration(two_iterations, tmp_path, split):
    train(tmp_path / "split", "iterations=1", "evaluation.before_training=false", *split)
    alone, divided = iterations(two_iterations)[0], iterations(tmp_path / "split")[0]
    for name in (
        "policy/loss",
        "policy/grad_norm",
        "influence/mean",
        "policy/entropy",
        "length/mean",
        "reward/mean",
    ):
        assert divided[name] == pytest.approx(alone[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 85)], ids=["ctrl-c", "preempted"]
)
def test_a_stopped_run_saves_and_ends_as_one_that_never_stopped(tmp_path, signal_number, code):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    exact = ("deterministic=true", "evaluation.before_training=false")
    arguments = (
        "train",
        "examples/countdown/fipo.yaml",
        *TINY,
        *exact,
        f"run_dir={stopped}",
        "iterations=1000",
        "checkpoint.every=0",
    )
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_an_iteration(process, stopped)
    os.kill(process.pid, signal_number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-4000:]
    assert "state saved" in output
    done = len(iterations(stopped))
    train(stopped, *exact, f"iterations={done + 1}", "checkpoint.every=0")
    train(whole, *exact, f"iterations={done + 1}", "checkpoint.every=0")
    assert all(same_numbers(*pair) for pair in zip(iterations(stopped), iterations(whole), strict=True))
    assert weights(stopped) == weights(whole)


def test_the_time_limit_saves_and_says_so(tmp_path):
    done = train(
        tmp_path / "short",
        "iterations=1000",
        "max_walltime_minutes=0.05",
        "evaluation.before_training=false",
        expect=85,
    )
    assert "max_walltime_minutes=0.05 has passed" in done.stdout


@pytest.mark.parametrize("engines", [1, 2])
def test_an_engine_that_is_killed_is_replaced_and_leaves_no_trace_in_the_numbers(tmp_path, engines):
    exact = (
        "deterministic=true",
        "iterations=4",
        f"rollout.num_engines={engines}",
        "evaluation.before_training=false",
    )
    robbed, whole = tmp_path / "robbed", tmp_path / "whole"
    arguments = command("train", "examples/countdown/fipo.yaml", *TINY, *exact, f"run_dir={robbed}")
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_an_iteration(process, robbed)
    found = subprocess.run(["pgrep", "-f", "ray::LocalEngine"], capture_output=True, text=True).stdout.split()
    assert len(found) == engines
    os.kill(int(found[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]
    robbed_values = iterations(robbed)
    assert sum(step["engines/deaths"] for step in robbed_values) == 1
    train(whole, *exact)
    for one, other in zip(robbed_values, iterations(whole), strict=True):
        assert same_numbers(one, other, "engines/")
    assert weights(robbed) == weights(whole)


@pytest.mark.parametrize("mode", ["one_step_off", "fully_asynchronous"])
def test_sampling_ahead_trains_on_older_groups(tmp_path, mode):
    overrides = (
        f"rollout.mode={mode}",
        "rollout.unfinished=continue",
        "rollout.max_staleness=2",
        "objective.correction=tis",
        "iterations=3",
    )
    train(tmp_path / mode, *overrides, "evaluation.before_training=false")
    values = iterations(tmp_path / mode)
    assert values[0]["staleness/max"] == 0
    assert 0 < max(step["staleness/max"] for step in values) <= 2
    assert all(step["groups/used"] == 4 for step in values)


def test_a_replay_of_dumped_responses_gives_the_same_weights(tmp_path):
    exact = ("deterministic=true", "iterations=2", "rollout.dump_every=1")
    train(tmp_path / "live", *exact, "evaluation.before_training=false")
    train(tmp_path / "again", *exact[:2], "--replay", str(tmp_path / "live/rollouts"))
    assert weights(tmp_path / "again") == weights(tmp_path / "live")
    for one, other in zip(iterations(tmp_path / "live"), iterations(tmp_path / "again"), strict=True):
        assert one["policy/loss"] == other["policy/loss"]
        assert one["policy/grad_norm"] == other["policy/grad_norm"]


def test_grpo_with_a_kl_term_scores_with_the_initial_weights_and_puts_the_current_ones_back(tmp_path):
    run_dir = tmp_path / "kl"
    overrides = (
        "objective.kl_coefficient=0.1",
        "iterations=2",
        "evaluation.before_training=false",
        f"run_dir={run_dir}",
    )
    run("train", "examples/countdown/grpo.yaml", *TINY, *overrides)
    first, second = iterations(run_dir)
    assert 0 < first["policy/reference_kl"] < second["policy/reference_kl"]
    for values in (first, second):
        assert values["policy/sigma_log_ratio"] == 0.0
        assert values["rollout/log_prob_difference"] < 1e-4


def test_sft_makes_a_model_from_nothing_and_overwrites_none(tmp_path):
    target = tmp_path / "base"
    arguments = (
        "sft",
        "examples/countdown/sft.yaml",
        "steps=4",
        "tokens_per_step=300",
        "optimizer.warmup_steps=1",
    )
    run(*arguments, f"output_dir={target}", "parallel.data_parallel_size=2")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(target)
    assert AutoTokenizer.from_pretrained(target).eos_token_id == model.config.eos_token_id
    before = (target / "model.safetensors").read_bytes()
    done = run(*arguments, f"output_dir={target}", expect=2)
    assert "already exists" in done.stderr
    assert (target / "model.safetensors").read_bytes() == before


def test_evaluate_prints_accuracy_and_writes_every_response(tmp_path):
    table = tmp_path / "table.jsonl"
    model, config = "examples/countdown/base-model", "examples/countdown/fipo.yaml"
    done = run("evaluate", model, config, "--output", table, *TINY, "data.evaluation_size=8")
    assert "avg@1" in done.stdout
    assert len(table.read_text().splitlines()) == 8
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.path=/nowhere", "/nowhere"),
        ("objective.halflife=3", "objective.half_life"),
        ("parallel.tensor_model_parallel_size=3", "tensor_model_parallel_size"),
        ("parallel.pipeline_model_parallel_size=8", "pipeline_model_parallel_size"),
        ("parallel.data_parallel_size=512", "512"),
        ("rollout.max_prompt_length=4", "prompt"),
        ("data.source=jsonl", "data.train_path"),
        ("rollout.engine_tensor_parallel_size=2", "rollout.engine=vllm"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, override, words):
    done = train(tmp_path / "refused", override, expect=2)
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "refused").exists()
