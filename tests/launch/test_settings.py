import sys

import pytest

from megatron_fipo.config import load_config
from megatron_fipo.config.describe import describe, field_docs
from megatron_fipo.errors import UserError
from megatron_fipo.launch.settings import LaunchSettings
from megatron_fipo.launch.shown import shown
from megatron_fipo.launch.slurm import load_settings
from megatron_fipo.secrecy import is_secret


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nodes=0", "nodes must be at least 1, not 0"),
        ("account=a b", "account must be the name of an account, not 'a b'"),
        ("partition=$(x)", "partition must be the name of a partition"),
        ("time=soon", "time must be minutes, hours:minutes:seconds or"),
        (f"time={'9' * 5000}", "time must be minutes"),
        ("venv=/a:b", "venv must be a folder whose name has no :"),
        ("container=~/a.sqsh", "container must be an image as enroot names it, without spaces and ~"),
        ("env=[WANDB_BASE_URL=https://me:pw@host]", "env would write WANDB_BASE_URL into the script"),
        ("env=[API_KEYS=a]", "env would write API_KEYS into the script"),
        ("start_timeout_s=99999999", "start_timeout_s must be at least 1 and at most 86400"),
        ("exclude=node 1", "exclude must be a list of nodes"),
        ("env=[A]", "env must be NAME=value, not 'A'"),
        ("env=[a b=c]", "env must be NAME=value"),
        ("env=[HF_TOKEN=hf_x]", "env would write HF_TOKEN into the script; export it in your shell instead"),
        ('sbatch_lines=["--qos=a\\nrm -rf"]', "sbatch_lines must be an option of sbatch"),
        ("sbatch_lines=[qos=high]", "sbatch_lines must be an option of sbatch such as --qos=high"),
        ("mounts=[/a:/b]", "mounts are of a container; set container"),
        ("signal_notice_s=0", "signal_notice_s must be at least 1"),
        ("accout=a", "did you mean 'account'?"),
        ("mounts=/a:/b", "mounts must be a list of values, each text"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(given, message):
    with pytest.raises(UserError) as error:
        load_config(None, [given], LaunchSettings)
    assert message in str(error.value)


def test_a_container_and_a_virtual_environment_exclude_each_other():
    with pytest.raises(UserError, match="venv is not used in a container"):
        load_config(None, ["container=image", "venv=/envs/a"], LaunchSettings)


def test_options_replace_those_of_the_file_and_add_to_its_lists(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("account: ours\nnodes: 2\nenv: [A=1]\ncontainer: image\n")
    settings = load_settings(path, {"nodes": "4", "env": ["B=x, y"], "preflight": "false"})
    assert settings == LaunchSettings(
        nodes=4, account="ours", container="image", env=("A=1", "B=x, y"), preflight=False
    )


def test_without_a_container_the_job_has_the_environment_of_this_command(monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/envs/mine")
    assert load_settings(None, {}).venv == "/envs/mine"
    assert load_settings(None, {"container": "image"}).venv is None
    assert load_settings(None, {"venv": "/other"}).venv == "/other"


def test_every_setting_is_explained_and_the_printed_defaults_load(tmp_path):
    assert field_docs(LaunchSettings).keys() == LaunchSettings.__dataclass_fields__.keys()
    path = tmp_path / "defaults.yaml"
    path.write_text(describe(LaunchSettings))
    assert load_config(path, [], LaunchSettings) == LaunchSettings()


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "MY_PASSWORD", "aws_secret"])
def test_secrets_are_known_by_name(name):
    assert is_secret(name)
    assert shown({f"RAY_{name}": "x"}) == {f"RAY_{name}": "(hidden)"}


def test_only_variables_that_decide_how_a_run_works_are_shown():
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "NCCL_DEBUG": "INFO",
        "HF_ENDPOINT": "https://me:pw@host/x",
        "MAIL": "me@host",
    }
    assert shown(environment) == {
        "HF_ENDPOINT": "https://(hidden)@host/x",
        "NCCL_DEBUG": "INFO",
        "TOKENIZERS_PARALLELISM": "false",
    }
