"""A mixture of experts through the command line: supervised training, FIPO on two expert-parallel ranks, resume, export."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_fipo.checkpoint.random_weights import write_random_model
from tests.system.conftest import Train
from tests.system.runs import ROOT, iterations, run_here, same_numbers, weights

EXAMPLE = ROOT / "examples/countdown-moe"
EXPERT_PARALLEL = ("parallel.data_parallel_size=2", "parallel.expert_model_parallel_size=2")


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After a few steps of supervised training on two expert-parallel ranks."""
    target = tmp_path_factory.mktemp("experts") / "base"
    settings = ("steps=4", "tokens_per_step=300", "optimizer.warmup_steps=1", *EXPERT_PARALLEL)
    run_here("sft", EXAMPLE / "sft.yaml", *settings, f"output_dir={target}")
    return target


@pytest.fixture(scope="module")
def settings(base_model) -> tuple[str, ...]:
    return (
        f"model.path={base_model}",
        "reward.name=tests.system.odd_length:score",
        "rollout.filter_by=reward",
        "deterministic=true",
        "evaluation.before_training=false",
        *EXPERT_PARALLEL,
    )


@pytest.fixture(scope="module")
def straight(train: Train, settings, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(run_dir, *settings, "iterations=2", "checkpoint.every=0")
    return run_dir


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_supervised_training_from_random_weights_trains_the_routers(base_model, tmp_path):
    write_random_model(EXAMPLE / "model-config", tmp_path / "initial", 1, torch.float32)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "initial", base_model))
    assert changed(before, after) == before.keys()
    assert sum(name.endswith("mlp.gate.weight") for name in after) == 4
    assert sum(".mlp.experts." in name for name in after) == 4 * 8 * 3


def test_the_first_mini_step_repeats_the_old_log_probs(straight):
    """Exactly, in every iteration. The engine's log-probs are close: it chooses experts by itself."""
    values = iterations(straight)
    assert len(values) == 2
    for step in values:
        assert step["policy/sigma_log_ratio"] == 0.0
        assert step["policy/grad_norm"] > 0
        assert step["rollout/log_prob_difference"] < 1e-4
        assert step["router/load_min"] <= 1 <= step["router/load_max"]


def test_training_changes_all_but_the_routers(straight, base_model):
    """Experts of both ranks too, if tokens were sent to them."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base_model, straight / "model"))
    trained = changed(before, after)
    experts = {name for name in before if ".mlp.experts." in name}
    routers = {name for name in before if name.endswith("mlp.gate.weight")}
    assert trained - experts == before.keys() - experts - routers
    assert {int(name.split(".")[5]) // 4 for name in trained & experts} == {0, 1}


def test_a_resumed_run_gives_the_bits_of_one_that_never_stopped(train, straight, settings, tmp_path):
    resumed = tmp_path / "run"
    train(resumed, *settings, "iterations=1", "checkpoint.every=0")
    train(resumed, *settings, "iterations=2", "checkpoint.every=0")
    for one, other in zip(iterations(straight), iterations(resumed), strict=True):
        assert same_numbers(one, other)
    assert weights(straight) == weights(resumed)


def test_another_run_starts_from_the_exported_model_on_one_rank(train, straight, settings, tmp_path):
    """Its engine and its trainer read the same weights from it."""
    overrides = (
        f"model.path={straight / 'model'}",
        "parallel.data_parallel_size=1",
        "parallel.expert_model_parallel_size=1",
        "iterations=1",
    )
    train(tmp_path / "run", *settings, *overrides)
    (values,) = iterations(tmp_path / "run")
    assert values["policy/sigma_log_ratio"] == 0.0
    assert values["rollout/log_prob_difference"] < 1e-4
