"""`train` judges the GPUs with the settings of the run, the placement included, before it builds anything."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.config import load_config
from megatron_fipo.driver.cards import judge_cards, judge_machine
from megatron_fipo.environment import Accelerators, Card, Driver, Machine
from megatron_fipo.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"
CARD = Card("NVIDIA GeForce RTX 4090", (8, 9), 24 * 2**30)
NONE = Accelerators(capability=None, cuda="13.0", transformer_engine=None)
ONE = replace(NONE, capability=CARD.capability, cards=(CARD,))


def countdown(*overrides: str):
    path = f"model.path={EXAMPLES}/countdown/base-model"
    return load_config(EXAMPLES / "countdown/fipo.yaml", [path, *overrides])


def large(*overrides: str):
    path = f"model.path={EXAMPLES}/qwen2.5-7b-math"
    settings = (
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false",
        "rollout.engine=local",
    )
    return load_config(EXAMPLES / "qwen2.5-7b-math/fipo-8gpu.yaml", [path, *settings, *overrides])


def machine(found: Accelerators) -> Machine:
    return Machine(cpus=8, gpus=len(found.cards), accelerators=found)


@pytest.mark.parametrize("found", [NONE, ONE])
def test_the_demo_runs_on_one_gpu_and_without(found):
    assert judge_machine(countdown(), machine(found)) == []


def test_a_model_that_is_too_large_is_refused_before_ray_starts():
    with pytest.raises(
        UserError, match=r"a trainer rank needs .* GiB before .* NVIDIA GeForce RTX 4090 has 24\.0"
    ):
        judge_machine(
            large("parallel.context_parallel_size=1", "parallel.data_parallel_size=1"), machine(ONE)
        )


def test_the_settings_of_the_run_count():
    old = replace(ONE, capability=(7, 5), cards=(replace(CARD, capability=(7, 5)),))
    assert judge_cards(countdown("rollout.placement=separate"), [old]) == []
    with pytest.raises(UserError, match="dtype=bfloat16 needs"):
        judge_cards(countdown("rollout.placement=separate", "model.dtype=bfloat16"), [old])
    other = replace(CARD, name="another")
    mixed = [ONE, replace(ONE, cards=(other,))]
    (note,) = judge_cards(countdown("rollout.placement=separate"), mixed)
    assert note.startswith("the GPUs differ")
    with pytest.raises(UserError, match="deterministic=true needs GPUs of one kind"):
        judge_cards(countdown("rollout.placement=separate", "deterministic=true"), mixed)


def test_a_driver_that_torch_cannot_use_is_no_silent_run_on_the_cpu():
    blind = replace(NONE, unused_driver=Driver("535.104.05", 1))
    with pytest.raises(UserError, match="CUDA needs driver 580 or later"):
        judge_machine(countdown(), machine(blind))
