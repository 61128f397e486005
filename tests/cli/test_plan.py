"""The command `plan` as a user calls it."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.cli.main import main

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "examples/qwen2.5-32b/fipo.yaml")
MODEL = f"model.path={ROOT / 'examples/qwen2.5-32b'}"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", RECIPE, MODEL, *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_plan_has_memory_times_and_what_they_rest_on(capsys):
    code, out, _ = plan(capsys, "--response-end", "9000")
    assert code == 0
    for words in (
        "layer workspace",
        "cache of an engine",
        "host memory of a node",
        "limited by",
        "Calibrated on",
    ):
        assert words in out
    assert "One iteration at a mean response of 9,000 tokens" in out
    assert "Not calibrated on this machine" in out
    assert "response end 9000" in out
    assert "Nothing was started and nothing was written." in out


def test_it_starts_neither_torch_nor_ray():
    """`plan` answers in seconds: nothing heavy is imported for a GPU that is not there."""
    program = (
        "import sys; from megatron_fipo.cli.main import main; "
        f"code = main(['plan', {RECIPE!r}, {MODEL!r}, '--machine', 'h100-80gb']); "
        "sys.exit(code or ' '.join(sorted({'torch', 'ray', 'megatron', 'transformers'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_line_is_cut_on_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = plan(capsys, "parallel.pipeline_model_parallel_size=4", "parallel.data_parallel_size=1")
    assert "…" not in out


def test_what_does_not_fit_is_refused_with_the_nearest_that_does(capsys):
    code, out, err = plan(capsys, "--machine", "h100-80gb", "parallel.tensor_model_parallel_size=4")
    assert code == 2
    assert "Memory of a trainer rank" in out
    assert "a trainer rank of stage 0 needs" in err
    assert "The nearest trainer layout that fits: " in err
    nearest = err.strip().rsplit(": ", 1)[1].split()
    code, _, _ = plan(capsys, "--machine", "h100-80gb", "parallel.tensor_model_parallel_size=4", *nearest)
    assert code == 0


def test_a_search_prints_settings_that_are_valid_and_better(capsys):
    code, out, _ = plan(capsys, "--search", "--gpus", "64")
    assert code == 0
    settings = [line.split() for line in out.splitlines() if "parallel." in line]
    assert len(settings) == 3
    capsys.readouterr()
    code, out, _ = plan(capsys, *settings[0])
    assert code == 0
    assert "over all 64 GPUs" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--machine", "h300"], "there is no machine 'h300': did you mean h200?"),
        (["--machine", str(ROOT)], "cannot be read: Is a directory"),
        (["--machine", ""], "machine file '.' cannot be read: Is a directory"),
        (["--informative", "1e-9"], "leaves no group to train on"),
        (["--gpus", "64"], "add --search"),
        (["--search", "--gpus", "1"], "no layout fits on 1 GPU"),
        (["--informative", "0"], "--informative must be above 0"),
        (
            ["--response-end", "30000"],
            "a mean response of 30,000 tokens is above rollout.max_response_length=20480",
        ),
        (["parallel.tensor_model_parallel_size=3"], "parallel.tensor_model_parallel_size=3"),
        (["model.fp8=hybrid", "--machine", "a100-80gb"], "no figures for products in fp8_blockwise"),
        (["model.path=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, capsys):
    code, _, err = plan(capsys, *words)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


def test_zero_gpus_are_refused(capsys):
    with pytest.raises(SystemExit):
        plan(capsys, "--search", "--gpus", "0")
    assert "--gpus" in capsys.readouterr().err
