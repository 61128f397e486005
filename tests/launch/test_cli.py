"""`megatron-fipo launch slurm` with a recording sbatch, and without one."""

import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest

import megatron_fipo.cli.main as cli
from megatron_fipo.fields import field_docs
from megatron_fipo.launch.settings import LaunchSettings
from tests.system.runs import ROOT

COUNTDOWN = ["launch", "slurm", "examples/countdown/fipo.yaml", "--gpus-per-node=0"]


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A program on the PATH with this shell code."""

    def make(code: str) -> None:
        program = tmp_path / "bin/sbatch"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{code}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    return make


def run(*words: str) -> int:
    return cli.main([*COUNTDOWN, *words])


def test_what_is_printed_is_what_is_submitted(sbatch, tmp_path, capsys):
    run_dir = tmp_path / "a run"
    words = [f"run_dir={run_dir}", "--nodes=2", "--env=A='$x'", "seed=3"]
    assert run(*words, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert not run_dir.exists()
    sbatch(f"cat > {tmp_path}/submitted; echo '17;cluster'; echo \"$@\" > {tmp_path}/arguments")
    assert run(*words) == 0
    captured = capsys.readouterr()
    assert (tmp_path / "submitted").read_bytes() == printed.encode()
    assert (tmp_path / "arguments").read_text() == "--parsable\n"
    assert captured.out == "17\n"
    assert f"{run_dir}/logs/slurm-17.log" in captured.err
    assert f'#SBATCH --output="{run_dir}/logs/slurm-%j.log"' in printed
    assert (run_dir / "logs").is_dir()  # sbatch does not make it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.path=examples/qwen2.5-32b"], "model folder examples/qwen2.5-32b has neither"),
        (
            ["data.source=jsonl", "data.train_path=no.jsonl", "evaluation.sets.mine=no.jsonl"],
            "the data file no.jsonl does not exist",
        ),
    ],
)
def test_a_run_without_weights_or_data_is_not_submitted_and_can_be_printed(
    sbatch, tmp_path, capsys, words, message
):
    sbatch(f"touch {tmp_path}/submitted; echo 17")
    words = [*words, f"run_dir={tmp_path}/run", "parallel.tensor_model_parallel_size=1"]
    assert run(*words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "submitted").exists()
    assert run(*words, "--dry-run") == 0
    image = "--container=image"  # which may have them in another place
    assert run(*words, image) == 0
    assert (tmp_path / "submitted").exists()


def test_no_sbatch_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(f"run_dir={tmp_path}/run") == 2
    assert capsys.readouterr().err.endswith(
        "there is no sbatch on this machine; run this on a login node of a Slurm cluster, or print the script with --dry-run\n"
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("sbatch: error: invalid partition specified: gpuu\\nsbatch: error: Batch job submission failed: Invalid partition name specified",
         "invalid partition specified: gpuu; Invalid partition name specified"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
         "Invalid account or account/partition combination specified"),
        ("", "it gave no reason"),
    ],
)  # fmt: skip
def test_a_refusal_of_sbatch_is_passed_on(sbatch, tmp_path, capsys, answer, reason):
    sbatch(f"cat > /dev/null; printf '{answer}\\n' >&2; exit 1")
    assert run(f"run_dir={tmp_path}/run") == 2
    assert capsys.readouterr().err == f"megatron-fipo: sbatch refused the job: {reason}\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("echo done", "named no job (done); look for the job with squeue"),
        ("true", "named no job (it printed nothing)"),
        ("printf '\\377\\n'", "named no job (\ufffd)"),
        ("kill -9 $$", "sbatch refused the job: it gave no reason"),
        ("exec sleep 60", "sbatch did not answer within 0.2 s and was ended; look for the job with squeue"),
    ],
)
def test_a_broken_sbatch_is_one_sentence(sbatch, tmp_path, capsys, monkeypatch, code, message):
    if "sleep" in code:
        monkeypatch.setattr("megatron_fipo.launch.submit.TIMEOUT_S", 0.2)
    sbatch(f"cat > /dev/null; {code}")
    assert run(f"run_dir={tmp_path}/run") == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_an_sbatch_that_cannot_run_is_one_sentence(sbatch, tmp_path, capsys):
    sbatch("")
    (tmp_path / "bin/sbatch").write_text("#!/absent/shell\n")
    assert run(f"run_dir={tmp_path}/run") == 2
    assert f"cannot run {tmp_path}/bin/sbatch: No such file" in capsys.readouterr().err


def test_lines_before_the_number_of_the_job_are_not_part_of_it(sbatch, tmp_path, capsys):
    sbatch("cat > /dev/null; echo 'sbatch: note'; echo '12;cluster'")
    assert run(f"run_dir={tmp_path}/run") == 0
    assert capsys.readouterr().out == "12\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cpus-per-node=1"], "the run needs 2 CPUs (1 for the ranks of `parallel`, 1 for the engines of `rollout`), but 1 node"),
        (["parallel.data_parallel_size=9", "--gpus-per-node=8"], "use at least 2 nodes"),
        (["--nodes=two"], "nodes must be an integer, not 'two'"),
        (["seeed=1"], "did you mean 'seed'?"),
        (["--settings=absent.yaml"], "no configuration file absent.yaml"),
        (["run_dir=/proc/run"], "run_dir"),
        ([f"run_dir={'a' * 300}"], "run_dir must have names of at most 255 bytes, and 4,000 in all"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_work_is_refused_before_it_is_submitted(sbatch, tmp_path, capsys, words, message):
    sbatch(f"touch {tmp_path}/submitted")
    assert run(f"run_dir={tmp_path}/run", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "submitted").exists()


def test_a_run_dir_that_is_a_link_to_itself_is_refused(sbatch, tmp_path, capsys):
    sbatch(f"touch {tmp_path}/submitted")
    (tmp_path / "loop").symlink_to("loop")
    assert run(f"run_dir={tmp_path}/loop") == 2
    assert f"{tmp_path}/loop" in capsys.readouterr().err
    assert not (tmp_path / "submitted").exists()


def test_a_configuration_that_does_not_exist(capsys):
    assert cli.main(["launch", "slurm", "absent.yaml"]) == 2
    assert "no configuration file absent.yaml" in capsys.readouterr().err


def test_the_notice_follows_from_the_metrics_of_the_run(tmp_path, capsys):
    metrics = Path(tmp_path / "run/metrics.jsonl")
    metrics.parent.mkdir()
    metrics.write_text('{"kind": "iteration", "iteration": 1, "time": 0, "values": {"time/update": 300.0}}\n')
    assert run(f"run_dir={tmp_path}/run", "--dry-run") == 0
    assert "#SBATCH --signal=B:USR1@660\n" in capsys.readouterr().out
    assert run(f"run_dir={tmp_path}/run", "--dry-run", "--signal-notice=90") == 0
    assert "#SBATCH --signal=B:USR1@90\n" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], [f"--venv={sys.prefix}"]])
@pytest.mark.parametrize("local", [[], ["--local"]])
def test_nemo_run_needs_the_name_of_the_environment_that_trains(monkeypatch, capsys, words, local):
    monkeypatch.setitem(sys.modules, "nemo_run", ModuleType("nemo_run"))
    assert cli.main(["launch", "nemo-run", "examples/countdown/fipo.yaml", *words, *local]) == 2
    assert "name the one that trains by --venv or --container" in capsys.readouterr().err


def test_the_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["launch", "slurm", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for doc in field_docs(LaunchSettings).values():
        assert " ".join(doc.split()) in text
