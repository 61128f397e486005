"""`env`, variables of the processes of a run, and `ray_address`: neither carries secrets, since settings are stored and printed."""

import pytest

from megatron_fipo.config import load_config, save_config, validate, validate_evaluation
from megatron_fipo.config.environment_rules import OWN_VARIABLES
from megatron_fipo.errors import UserError

NEEDED = ["model.path=m", "run_dir=r", "data.source=countdown", "reward.name=countdown"]


def test_variables_come_from_file_and_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("env: {NCCL_DEBUG: INFO, NCCL_IB_HCA: mlx5, NCCL_IB_PKEY: 0x1}\n")
    config = load_config(tmp_path / "a.yaml", [*NEEDED, "env.NCCL_DEBUG=WARN", "env.NCCL_IB_HCA=null"])
    assert config.env == {"NCCL_DEBUG": "WARN", "NCCL_IB_PKEY": "0x1"}
    validate_evaluation(config)
    save_config(config, tmp_path / "b.yaml")
    assert load_config(tmp_path / "b.yaml", []) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_API_KEY", "1f2e3d"),
        ("HF_TOKEN", "1f2e3d"),
        ("AWS_SECRET_ACCESS_KEY", "1f2e3d"),
        ("db_password", "1f2e3d"),
        ("KEY", "1f2e3d"),
        ("HTTPS_PROXY", "http://me:1f2e3d@proxy:3128"),
    ],
)
def test_a_secret_is_refused_and_not_shown(name, value):
    with pytest.raises(UserError, match=rf"^env must not have {name}, which looks like a secret") as refused:
        load_config(None, [*NEEDED, f"env.{name}={value}"])
    assert "1f2e3d" not in str(refused.value)


@pytest.mark.parametrize("name", ["1A", "A-B", "A B", ""])
def test_a_name_that_is_no_variable_is_refused(tmp_path, name):
    (tmp_path / "a.yaml").write_text(f"env: {{'{name}': x}}\n")
    with pytest.raises(UserError, match=r"env.* must not have the name|env"):
        load_config(tmp_path / "a.yaml", NEEDED)


@pytest.mark.parametrize(
    ("name", "reason"), [*OWN_VARIABLES.items(), ("RAY_ADDRESS", "Ray reads it where it starts on each node")]
)
def test_variables_that_the_run_sets_itself_are_refused_with_the_reason(name, reason):
    config = load_config(None, [*NEEDED, f"env.{name}=1"])
    for check in (validate, validate_evaluation):
        with pytest.raises(UserError, match=rf"^env\.{name} cannot be set: {reason}"):
            check(config)


def test_deterministic_runs_have_their_own_algorithm():
    overrides = [*NEEDED, "deterministic=true"]
    validate_evaluation(load_config(None, [*overrides, "env.NCCL_ALGO=Ring"]))
    with pytest.raises(UserError, match=r"env\.NCCL_ALGO cannot be set with deterministic=true"):
        validate_evaluation(load_config(None, [*overrides, "env.NCCL_ALGO=Tree"]))


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "head:6379", "[fe80::1]:6379", "auto"])
def test_an_address_is_host_and_port(address):
    validate_evaluation(load_config(None, [*NEEDED, f"ray_address={address}"]))


@pytest.mark.parametrize("address", ["ray://me:1f2e3d@head:10001", "me:1f2e3d@head:6379", "head", "head:x"])
def test_an_address_that_may_have_credentials_is_refused_and_not_shown(address):
    config = load_config(None, [*NEEDED, f"ray_address={address}"])
    with pytest.raises(UserError, match="ray_address must be HOST:PORT of a Ray cluster") as refused:
        validate_evaluation(config)
    assert "1f2e3d" not in str(refused.value)
