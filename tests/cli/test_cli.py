import subprocess
import sys
from pathlib import Path

import pytest

import megatron_fipo.cli.main as cli
from megatron_fipo.driver.cluster_loss import ClusterLostError
from megatron_fipo.driver.rank_actor import TrainerLostError, TrainerRefusedError
from megatron_fipo.errors import LostError, UserError

ROOT = Path(__file__).parents[2]
COUNTDOWN = ["examples/countdown/fipo.yaml", "model.path=examples/countdown/model-config"]


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")


def run_without(heavy: set[str], arguments: list[str], code: int) -> subprocess.CompletedProcess:
    """Run the command in a new process; fails unless it exits with `code` without importing any of `heavy`."""
    script = f"""
import sys
from megatron_fipo.cli.main import main
try:
    code = main({arguments!r})
except SystemExit as exit:
    code = exit.code
assert code == {code}, code
heavy = {heavy!r} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["simulate", "--help"]]
)
def test_help_imports_nothing_heavy(arguments):
    done = run_without(
        {"torch", "numpy", "ray", "transformers", "megatron", "yaml", "rich"}, arguments, code=0
    )
    assert "usage: megatron-fipo" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["train", *COUNTDOWN], ["evaluate", "absent", *COUNTDOWN], ["sft", "examples/countdown/sft.yaml"]],
)
def test_a_mistyped_key_is_named_before_torch_is_imported(arguments):
    done = run_without({"torch", "ray", "transformers", "megatron"}, [*arguments, "seeed=1"], code=2)
    assert "did you mean 'seed'?" in done.stderr


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "sft", "report", "doctor", "preflight", "config", "launch", "simulate"]
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 6


def test_dry_run_prints_the_plan_and_writes_nothing(capsys, tmp_path):
    arguments = [
        "train",
        *COUNTDOWN,
        "--dry-run",
        f"run_dir={tmp_path}/run",
        "parallel.tensor_model_parallel_size=2",
    ]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "Ranks: 2 = tensor 2" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml"], "no configuration file absent.yaml"),
        (["train", *COUNTDOWN, "objective.half_lief=3"], "did you mean 'objective.half_life'?"),
        (["train", *COUNTDOWN, "parallel.tensor_model_parallel_size=3"], "does not divide"),
        (["train", *COUNTDOWN, "model.path=absent"], "no model folder absent"),
        (["evaluate", "absent", *COUNTDOWN], "no model folder absent"),
        (["evaluate", "examples/countdown/model-config", "data.source=jsonl"], "needs evaluation.sets"),
        (["sft", "examples/countdown/sft.yaml", "parallel.tensor_model_parallel_size=4"], "does not divide"),
        (["sft", "examples/countdown/sft.yaml", "rollout.top_p=1"], "unknown key 'rollout'"),
        (["report", "absent"], "absent"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", *COUNTDOWN, "--dri"],
        ["train", *COUNTDOWN, "--dry-run", "x"],
        ["evaluate", "m", "--output", "o", "c", "d"],
        ["doctor", "x=1"],
        ["preflight", "--min-tmp-gib=much"],
        [],
    ],
)
def test_unknown_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2


def test_options_may_be_between_positional_arguments(monkeypatch):
    calls = []
    monkeypatch.setattr("megatron_fipo.driver.train.train", lambda config, *_: calls.append(config) or 0)
    file, model = COUNTDOWN
    words = [
        [file, model, "seed=2"],
        [file, "--replay", "d", model, "seed=2"],
        ["--replay", "d", file, model, "seed=2"],
    ]
    assert [cli.main(["train", *arguments]) for arguments in words] == [0, 0, 0]
    assert calls == [calls[0]] * 3
    assert (calls[0].seed, calls[0].model.path) == (2, model.partition("=")[2])


def test_the_module_exits_with_the_code_of_the_command():
    command = [sys.executable, "-m", "megatron_fipo.cli", "train", "absent.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "megatron-fipo: " + done.stderr.partition(": ")[2]


def test_evaluate_takes_a_file_or_none(monkeypatch):
    calls = []
    monkeypatch.setattr("megatron_fipo.driver.evaluate.evaluate", lambda *arguments: calls.append(arguments))
    folder = "examples/countdown/model-config"
    settings = [
        "data.source=countdown",
        "reward.name=countdown",
        "rollout.max_prompt_length=16",
        "rollout.max_response_length=99",
    ]
    assert (
        cli.main(["evaluate", folder, "examples/countdown/fipo.yaml", "evaluation.samples_per_problem=2"])
        == 0
    )
    assert cli.main(["evaluate", folder, *settings]) == 0
    (first, with_file, output), (second, without, _) = calls
    assert first == second == with_file.model.path == without.model.path == folder
    assert (with_file.evaluation.samples_per_problem, with_file.run_dir) == (2, "runs/countdown-fipo")
    assert (without.rollout.max_response_length, without.run_dir) == (99, "runs/evaluation")
    assert output == Path("runs/evaluation/model-config.jsonl")


def test_the_table_of_evaluate_goes_where_output_says(monkeypatch):
    calls = []
    monkeypatch.setattr("megatron_fipo.driver.evaluate.evaluate", lambda *arguments: calls.append(arguments))
    folder, config = "examples/countdown/model-config", "examples/countdown/fipo.yaml"
    assert cli.main(["evaluate", folder, config, "seed=2", "--output", "mine.jsonl"]) == 0
    assert cli.main(["evaluate", folder, "--output", "mine.jsonl", config, "seed=2"]) == 0
    assert cli.main(["evaluate", "--output", "mine.jsonl", folder, config, "seed=2"]) == 0
    assert calls == [calls[0]] * 3
    assert calls[0][2] == Path("mine.jsonl")
    assert (calls[0][1].seed, calls[0][1].run_dir) == (2, "runs/countdown-fipo")
    monkeypatch.chdir(folder)
    data = [
        "data.source=countdown",
        "reward.name=countdown",
        "rollout.max_prompt_length=16",
        "rollout.max_response_length=99",
    ]
    assert cli.main(["evaluate", ".", *data]) == 0
    assert calls[3][2] == Path("runs/evaluation/model-config.jsonl")


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("fix it"), 2),
        (TrainerRefusedError("the disk is full"), 2),
        (LostError("rank 3 died"), 86),
        (TrainerLostError("rank 3 died"), 86),
        (ClusterLostError(), 86),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_of_a_run(raised, code, monkeypatch, capsys):
    def train(config, allow_change, replay):
        raise raised

    monkeypatch.setattr("megatron_fipo.driver.train.train", train)
    assert cli.main(["train", *COUNTDOWN]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_what_a_run_may_change_and_where_it_replays_from_reach_it(monkeypatch):
    def train(config, allow_change, replay):
        seen.extend((config.optimizer.lr, allow_change, replay))
        return 85

    seen: list = []
    monkeypatch.setattr("megatron_fipo.driver.train.train", train)
    options = ["--allow-change", "optimizer.lr,seed", "--replay", "dumps"]
    assert cli.main(["train", *COUNTDOWN, *options, "optimizer.lr=0.5"]) == 85
    assert seen == [0.5, ["optimizer.lr", "seed"], Path("dumps")]


def test_config_prints_every_setting(capsys):
    assert cli.main(["config"]) == 0
    assert "half_life: 32.0" in capsys.readouterr().out
    assert cli.main(["config", "sft"]) == 0
    assert "tokens_per_step:" in capsys.readouterr().out


def test_an_expanded_path_is_said_once(capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(ROOT))
    words = [
        "train",
        COUNTDOWN[0],
        "model.path=~/examples/countdown/model-config",
        "run_dir=~/runs/x",
        "--dry-run",
    ]
    assert cli.main(words) == 0
    said = f"megatron-fipo: ~ is the home folder: model.path={ROOT}/examples/countdown/model-config, run_dir={ROOT}/runs/x\n"
    assert capsys.readouterr().err == said


def test_paths_on_the_command_line_may_begin_with_a_tilde(capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(ROOT))
    assert cli.main(["convert", "to-megatron", "~/examples/qwen2.5-32b", "--dry-run"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["report", "~nobody-of-this-name/runs/x"])
    assert "there is no home folder ~nobody-of-this-name" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--", COUNTDOWN[0], "--dry-run"], ["--", "--dry-run", COUNTDOWN[0]]])
def test_words_after_two_dashes_are_no_options(words, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["train", *words])
    assert error.value.code == 2
    assert "--dry-run" in capsys.readouterr().err
