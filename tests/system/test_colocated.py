"""A run whose cluster has one GPU: engine and trainer rank share it. The GPU is a number of Ray's; tensors are on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fipo.config import load_stored_config
from tests.system.colocated_run import Event, events, recording
from tests.system.conftest import started_cluster
from tests.system.runs import iterations, run_here, train_arguments


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[str]:
    """Address of a cluster with one GPU."""
    with started_cluster(gpus=1) as address:
        yield address


def arguments(address: str, run_dir: Path, *overrides: str) -> list[str]:
    quiet = ("evaluation.before_training=false", "batch.prompts_per_iteration=2")
    return train_arguments(run_dir, f"ray_address={address}", *quiet, *overrides)


def turns(calls: list[Event]) -> list[str]:
    """The calls without repetitions of the same."""
    names = [call.name for call in calls]
    return [name for name, before in zip(names, ["", *names], strict=False) if name != before]


def test_an_engine_and_a_rank_take_turns_on_the_only_gpu(one_gpu: str, tmp_path: Path):
    run_dir, log = tmp_path / "run", tmp_path / "events"
    with recording(log):
        first = run_here(*arguments(one_gpu, run_dir, "iterations=2"))
    calls, turn = events(log), ["generate", "sleep", "update", "wake", "weights"]
    assert turns(calls) == ["weights", *turn, *turn, "generate"], "the last of the final evaluation"
    assert {call.gpu for call in calls} == {"0"}
    assert len({call.pid for call in calls}) == 2
    assert "rollout.placement=auto is colocated: of 1 GPU the ranks need 1 and the engines 1" in first.stdout
    assert load_stored_config(run_dir / "config.yaml").rollout.placement == "auto"

    log.unlink()
    with recording(log):
        run_here(*arguments(one_gpu, run_dir, "iterations=3"))
    assert len(iterations(run_dir)) == 3
    assert turns(events(log)) == ["weights", *turn, "generate"], "a resumed run"


def test_an_engine_that_is_killed_starts_again_on_the_gpu_of_its_rank(one_gpu: str, tmp_path: Path):
    run_dir, log = tmp_path / "run", tmp_path / "events"
    with recording(log, dies_in=1):
        run_here(*arguments(one_gpu, run_dir, "iterations=1", "rollout.placement=colocated"))
    calls = events(log)
    engines = dict.fromkeys(call.pid for call in calls if call.name != "update")
    assert len(engines) == 2
    assert {call.gpu for call in calls} == {"0"}
    (values,) = iterations(run_dir)
    assert values["engines/deaths"] == 1


def test_engines_that_need_a_gpu_of_their_own_wait_for_it_and_the_reason_is_logged(
    one_gpu: str, tmp_path: Path
):
    refused = run_here(
        *arguments(one_gpu, tmp_path / "run", "rollout.placement=separate", "placement_timeout_s=1"), expect=2
    )
    assert "Ray has no free resources for 1 rollout engines of 1 GPU and 1 CPU each" in refused.stderr
