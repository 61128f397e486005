"""The command line end to end on real Ray, Megatron-Core and the bundled model: train, resume, stop, evaluate, parallel layouts.

Runs are tiny (4 groups of 4 responses): they show that the parts work together and that no parallel layout changes the numbers,
not that the model learns. Most runs take place in this process on one cluster. Those that are stopped are processes with a
cluster of their own, as users have them.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fipo.checkpoint.manifest import hash_files, list_files, read_manifest, write_manifest
from megatron_fipo.run_dir.loop_state import LOOP_FILE
from megatron_fipo.run_dir.metrics_log import read_metrics
from megatron_fipo.tasks.countdown.problems import generate_problems
from tests.system.conftest import Train
from tests.system.disturbances import disturbing, titled, trained
from tests.system.runs import (
    ROOT,
    TINY,
    check,
    ended,
    iterations,
    run,
    run_here,
    same_numbers,
    start,
    train_arguments,
    wait_for_an_iteration,
    weights,
)
from tests.tasks.files import row, write

EXACT = ("deterministic=true", "evaluation.before_training=false", "checkpoint.every=0")
REFERENCE_LENGTH = 4

TENSOR = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
CONTEXT = ("parallel.context_parallel_size=2",)
PIPELINE = ("parallel.pipeline_model_parallel_size=2",)
DATA = ("parallel.data_parallel_size=2",)


@pytest.fixture(scope="module")
def reference(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An undisturbed run of so many iterations with the settings `EXACT`. Equal runs are made once."""
    runs: dict[int, Path] = {}

    def reference(length: int = REFERENCE_LENGTH) -> Path:
        if length not in runs:
            run_dir = tmp_path_factory.mktemp("reference") / "run"
            train(run_dir, *EXACT, f"iterations={length}", "rollout.dump_every=1")
            runs[length] = run_dir
        return runs[length]

    return reference


@pytest.fixture(scope="module")
def two_iterations(train, tmp_path_factory) -> Path:
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


def test_a_longer_run_continues_where_it_stopped(train, two_iterations, tmp_path):
    complete = tmp_path / "complete"
    train(complete, "iterations=3", "evaluation.before_training=true")
    train(two_iterations, "iterations=3", "evaluation.before_training=true")
    straight, resumed = iterations(complete), iterations(two_iterations)
    assert len(straight) == len(resumed) == 3
    assert same_numbers(straight[2], resumed[2])
    assert weights(complete) == weights(two_iterations)


def test_a_run_of_other_settings_is_refused_and_left_alone(two_iterations):
    before = (two_iterations / "config.yaml").read_bytes()
    done = run(*train_arguments(two_iterations, "iterations=4", "objective.half_life=64"), expect=2)
    assert "objective.half_life" in done.stderr
    assert "--allow-change" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (two_iterations / "config.yaml").read_bytes() == before


def test_a_sampling_state_that_cannot_be_is_one_sentence_about_its_files(train, two_iterations, tmp_path):
    """The checkpoint's checksums are right, as if another version had written it."""
    run_dir = tmp_path / "run"
    shutil.copytree(two_iterations, run_dir, symlinks=True)
    newest = max((run_dir / "checkpoints").glob("iteration_*"))
    state = json.loads((newest / LOOP_FILE).read_text())
    state["rollout"]["informative"] = -1
    (newest / LOOP_FILE).write_text(json.dumps(state))
    write_manifest(newest, hash_files(newest, list_files(newest)), read_manifest(newest).info)
    done = train(run_dir, "iterations=9", "evaluation.before_training=true", expect=2)
    assert (
        f"checkpoint {newest} is damaged: its loop.json and tokens.npz do not give a state of sampling "
        "(informative is -1, not a number of at least 0); restore it from a copy, or remove that folder to"
    ) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((*TENSOR, *DATA), id="tensor-data"),
        pytest.param((*CONTEXT, *PIPELINE), id="context-pipeline"),
        pytest.param(TENSOR, id="tensor", marks=pytest.mark.slow),
        pytest.param(CONTEXT, id="context", marks=pytest.mark.slow),
        pytest.param(PIPELINE, id="pipeline", marks=pytest.mark.slow),
        pytest.param(DATA, id="data", marks=pytest.mark.slow),
    ],
)
def test_another_layout_gives_the_same_first_iteration(train, two_iterations, tmp_path, layout):
    train(tmp_path / "parallel", "iterations=1", "evaluation.before_training=false", *layout)
    alone, divided = iterations(two_iterations)[0], iterations(tmp_path / "parallel")[0]
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
    ("signal_number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="ctrl-c"),
        pytest.param(signal.SIGTERM, 85, id="preempted", marks=pytest.mark.slow),  # as in test_signals.py
    ],
)
def test_a_stopped_run_saves_and_ends_as_one_that_never_stopped(
    train, reference, tmp_path, signal_number, code
):
    stopped = tmp_path / "stopped"
    process = start(*train_arguments(stopped, *EXACT, "iterations=1000"))
    wait_for_an_iteration(process, stopped)
    os.kill(process.pid, signal_number)
    assert "state saved" in check(ended(process), code).stdout
    length = max(len(iterations(stopped)) + 1, REFERENCE_LENGTH)
    train(stopped, *EXACT, f"iterations={length}")
    undisturbed = reference(length)
    assert all(same_numbers(*pair) for pair in zip(iterations(stopped), iterations(undisturbed), strict=True))
    assert weights(stopped) == weights(undisturbed)


@pytest.mark.slow  # a signal ends a run in the same way, and tests/driver/test_stop.py has the time limit
def test_the_time_limit_saves_and_says_so(train, tmp_path):
    done = train(
        tmp_path / "short",
        "iterations=1000",
        "max_walltime_minutes=0.05",
        "evaluation.before_training=false",
        expect=85,
    )
    assert "max_walltime_minutes=0.05 has passed" in done.stdout


@pytest.mark.parametrize("engines", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_engine_that_is_killed_is_replaced_and_leaves_no_trace_in_the_numbers(
    train, reference, tmp_path, engines
):
    robbed = tmp_path / "robbed"
    settings = (*EXACT, f"iterations={REFERENCE_LENGTH}", f"rollout.num_engines={engines}")
    with disturbing(signal.SIGKILL, lambda: titled("ray::LocalEngine") if trained(robbed, 1) else []) as done:
        train(robbed, *settings)
    assert len(done.times) == 1
    robbed_values = iterations(robbed)
    assert sum(step["engines/deaths"] for step in robbed_values) == 1
    for one, other in zip(robbed_values, iterations(reference()), strict=True):
        assert same_numbers(one, other, "engines/")
    assert weights(robbed) == weights(reference())


@pytest.mark.parametrize("mode", ["one_step_off", "fully_asynchronous"])
def test_sampling_ahead_trains_on_older_groups(train, tmp_path, mode):
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


def test_a_replay_of_dumped_responses_gives_the_same_weights(train, reference, tmp_path):
    live, again = reference(), tmp_path / "again"
    train(again, *EXACT, f"iterations={REFERENCE_LENGTH}", "--replay", str(live / "rollouts"))
    assert weights(again) == weights(live)
    for one, other in zip(iterations(live), iterations(again), strict=True):
        assert one["policy/loss"] == other["policy/loss"]
        assert one["policy/grad_norm"] == other["policy/grad_norm"]


def test_grpo_with_a_kl_term_scores_with_the_initial_weights_and_puts_the_current_ones_back(
    cluster_of_runs, tmp_path
):
    run_dir = tmp_path / "kl"
    overrides = (
        "objective.kl_coefficient=0.1",
        "iterations=2",
        "evaluation.before_training=false",
        f"run_dir={run_dir}",
        f"ray_address={cluster_of_runs}",
    )
    run_here("train", "examples/countdown/grpo.yaml", *TINY, *overrides)
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
    run_here(*arguments, f"output_dir={target}", "parallel.data_parallel_size=2")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(target)
    assert AutoTokenizer.from_pretrained(target).eos_token_id == model.config.eos_token_id
    before = (target / "model.safetensors").read_bytes()
    done = run_here(*arguments, f"output_dir={target}", expect=2)
    assert "already exists" in done.stderr
    assert (target / "model.safetensors").read_bytes() == before


def test_sft_teaches_a_model_folder_the_responses_of_rows(tmp_path):
    """From weights, on two ranks: the loss of rows that are never trained on falls, and weights change."""
    rows = [
        {"question": f"{a},{b},1={a + b + 1}:", "solution": f"#{a}+{b}+1"}
        for a in range(1, 10)
        for b in range(1, 10)
    ]
    path, target = tmp_path / "rows.jsonl", tmp_path / "taught"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    done = run_here(
        "sft",
        ROOT / "examples/countdown/sft.yaml",
        "model_config_path=null",
        "model_path=examples/countdown/base-model",
        f"output_dir={target}",
        "data.source=jsonl",
        f"data.path={path}",
        "data.columns.prompt=question",
        "data.columns.response=solution",
        "data.held_out_share=0.2",
        "data.max_length=32",
        "steps=30",
        "tokens_per_step=400",
        "max_tokens_per_micro_batch=120",
        "optimizer.warmup_steps=1",
        "parallel.data_parallel_size=2",
    )
    assert "rows.jsonl: 81 rows, on average 9 tokens of prompt and 7 of response" in done.stdout
    before, after = (
        float(loss) for loss in re.findall(r"held-out loss \S+ [\w ]*: ([\d.]+) per", done.stdout)
    )
    assert after < 0.5 * before
    assert "16 rows" in done.stdout
    base = ROOT / "examples/countdown/base-model"
    assert (target / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (target / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()


def test_evaluate_prints_accuracy_and_writes_every_response(cluster_of_runs, tmp_path):
    table = tmp_path / "table.jsonl"
    model, config = "examples/countdown/base-model", "examples/countdown/fipo.yaml"
    settings = (*TINY, "data.evaluation_size=8", f"ray_address={cluster_of_runs}")
    done = run_here("evaluate", model, config, "--output", table, *settings)
    assert "avg@1" in done.stdout
    assert len(table.read_text().splitlines()) == 8
    assert list(tmp_path.iterdir()) == [table]


def test_several_sets_are_evaluated_in_one_run_and_may_change(train, tmp_path):
    """Rows per set in the console, metrics per set in the log; another set in the resumed run is reported."""
    problems = generate_problems(9, held_out=True, seed=1)
    for name, part in {
        "train": generate_problems(60, held_out=False, seed=1),
        "one": problems[:4],
        "two": problems[4:],
    }.items():
        rows = [row(problem.prompt, str(problem)) for problem in part]
        write(tmp_path / f"{name}.jsonl", rows)
    run_dir = tmp_path / "run"
    files = (
        "data.source=jsonl",
        f"data.train_path={tmp_path}/train.jsonl",
        f"evaluation.sets.one={tmp_path}/one.jsonl",
    )
    train(run_dir, *files, f"evaluation.sets.two={tmp_path}/two.jsonl", "iterations=1")
    (values,) = [record.values for record in read_metrics(run_dir) if record.kind == "evaluation"][-1:]
    assert (values["evaluation/one/problems"], values["evaluation/two/problems"]) == (4, 5)
    both = [values["evaluation/one/avg_at_k"], values["evaluation/two/avg_at_k"]]
    assert values["evaluation/avg_at_k"] == pytest.approx(sum(both) / 2)
    table = (run_dir / "evaluations/iteration_000001.jsonl").read_text().splitlines()
    assert [json.loads(line)["set"] for line in table] == ["one"] * 4 + ["two"] * 5

    done = train(run_dir, *files, f"evaluation.sets.third={tmp_path}/two.jsonl", "iterations=2")
    assert "the evaluation sets changed (third is new, two is gone)" in done.stdout
    for title in ("one", "third", "mean of 2 sets"):
        assert re.search(rf"^held-out {title} +after 2: avg@1 ", done.stdout, re.MULTILINE)


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
    done = run_here(*train_arguments(tmp_path / "refused", override), expect=2)
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "refused").exists()


def test_several_training_sets_have_their_shares_limits_and_metrics_and_resume(train, tmp_path):
    """Rows of two files in one run; other weights are refused, and the resumed run continues the order."""
    problems = generate_problems(80, held_out=False, seed=1)
    for name, part in {"easy": problems[:60], "hard": problems[60:]}.items():
        rows = [{"question": problem.prompt, "answer": str(problem)} for problem in part]
        write(tmp_path / f"{name}.jsonl", rows)
    run_dir = tmp_path / "run"
    files = (
        "data.source=jsonl",
        "data.columns={prompt: question, ground_truth: answer}",
        f"data.sets.easy={tmp_path}/easy.jsonl",
        f"data.sets.hard={{path: {tmp_path}/hard.jsonl, weight: 0.5, max_response_length: 48}}",
        f"evaluation.sets.held={tmp_path}/hard.jsonl",
    )
    train(run_dir, *files, "iterations=1")
    done = train(run_dir, *files, "data.sets.hard.weight=2", "iterations=2", expect=2)
    assert "data.sets.hard.weight was 0.5 and is 2.0" in done.stderr
    train(run_dir, *files, "iterations=2")
    records = [record.values for record in read_metrics(run_dir) if record.kind == "iteration"]
    assert len(records) == 2
    for values in records:
        assert values["set/easy/share"] + values["set/hard/share"] == pytest.approx(1.0)
        assert values.get("set/hard/length", 0.0) <= 48
