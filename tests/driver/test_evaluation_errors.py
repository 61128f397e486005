"""An evaluation that fails stops the run with the state saved, unless the trainer's ranks are gone: then nothing can be saved."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fipo.config import Config, DataConfig, ModelConfig
from megatron_fipo.driver.cluster_loss import ClusterLostError
from megatron_fipo.driver.console import Console
from megatron_fipo.driver.loop import Loop
from megatron_fipo.driver.rank_actor import TrainerLostError
from megatron_fipo.driver.rollout.group_source import Interrupted, StopUnsavedError
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir.run_directory import RunDirectory
from megatron_fipo.tasks.task import Problem


def loop(tmp_path: Any, error: UserError) -> Loop:
    """A loop before its first iteration whose engines raise `error` when they are evaluated."""

    def generate(*_: object) -> None:
        raise error

    components: Any = SimpleNamespace(
        rollouts=SimpleNamespace(generate=generate, score=None),
        held_out={"one": [Problem("p", (1,), "prompt", "x", "test")]},
        console=Console(1),
        trainer=None,
        decode=None,
    )
    config = Config(run_dir=str(tmp_path), model=ModelConfig(path="m"), data=DataConfig())
    return Loop(config, RunDirectory(tmp_path), components)


@pytest.mark.parametrize(
    "error", [TrainerLostError("rank 0 died"), ClusterLostError(), StopUnsavedError("weights are gone")]
)
def test_lost_ranks_pass_unchanged_so_that_nothing_is_saved_on_them(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        loop(tmp_path, error)._evaluate_if_due()
    assert raised.value is error


@pytest.mark.parametrize("error", [UserError("no engine is left"), UserError("all requests failed")])
def test_lost_engines_stop_the_run_with_its_state(tmp_path, error):
    with pytest.raises(Interrupted) as raised:
        loop(tmp_path, error)._evaluate_if_due()
    assert raised.value.__cause__ is error
