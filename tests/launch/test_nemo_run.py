"""NeMo-Run's tasks. `tests/cluster/test_nemo_run.py` runs them, where NeMo-Run is installed."""

import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.launch.nemo_run import (
    executor_parameters,
    import_nemo_run,
    local_task,
    slurm_task,
    srun_arguments,
)
from megatron_fipo.launch.script import Job, render
from megatron_fipo.launch.settings import LaunchSettings

SETTINGS = LaunchSettings(
    nodes=4, gpus_per_node=8, account="ours", time="4:00:00", sbatch_lines=('--comment="a b"', "--contiguous")
)


class TestExecutorParameters:
    def test_they_are_the_options_of_the_script(self):
        parameters = executor_parameters(render(Job("train", notice_s=300), SETTINGS))
        assert parameters["nodes"] == "4"
        assert parameters["gpus_per_node"] == "8"
        assert parameters["account"] == "ours"
        assert parameters["time"] == "4:00:00"
        assert parameters["comment"] == "a b"
        assert parameters["contiguous"] is True
        assert parameters["requeue"] is True

    def test_the_notice_reaches_steps_because_the_batch_script_is_nemo_runs(self):
        assert executor_parameters(render(Job("train", notice_s=300), SETTINGS))["signal"] == "USR1@300"

    def test_nemo_run_keeps_the_names_by_which_it_finds_the_job_and_its_output(self):
        assert not {"output", "job_name"} & executor_parameters(render(Job("train"), SETTINGS)).keys()

    def test_a_short_option_is_refused_with_the_form_to_write(self):
        script = render(Job("train"), LaunchSettings(sbatch_lines=("-C h100",)))
        with pytest.raises(
            UserError, match=r"not '-C' of the line '#SBATCH -C h100'; write it as --name=value"
        ):
            executor_parameters(script)

    @pytest.mark.parametrize("separator", ["\n", "\u2028", "\x85", "\f"])
    def test_no_value_adds_an_option(self, separator):
        launch = replace(SETTINGS, env=(f"A=1{separator}#SBATCH --uid=0",))
        assert executor_parameters(render(Job("train"), launch)) == executor_parameters(
            render(Job("train"), SETTINGS)
        )

    def test_a_quote_that_is_not_closed_is_refused(self):
        script = render(Job("train"), replace(SETTINGS, sbatch_lines=('--comment="a',)))
        with pytest.raises(UserError, match="a quote is not closed in '#SBATCH --comment"):
            executor_parameters(script)

    def test_words_of_the_script_after_its_options_are_not_read(self):
        script = "#!/bin/bash\n#SBATCH --nodes=2\n# SBATCH --nodes=3\necho '#SBATCH'\n"
        assert executor_parameters(script) == {"nodes": "2"}


def test_the_shell_reads_the_folder_of_the_step_as_it_is():
    folder = "/a b$(echo planted)'\"`echo planted`;\u2028"
    words = " ".join(srun_arguments(folder))
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, text=True)
    assert done.stdout.split("\0")[-2] == f"--chdir={folder}"


def test_without_nemo_run_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    for make in (
        import_nemo_run,
        lambda: local_task("mine.yaml", []),
        lambda: slurm_task("mine.yaml", [], SETTINGS),
    ):
        with pytest.raises(
            UserError, match=r"virtual environment of its own: pip install 'megatron-fipo\[launch\]'"
        ):
            make()
