"""A cluster of several nodes, whose driver's node has no GPU: several Ray nodes on this machine, with logical resources."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from megatron_fipo.config import load_config
from megatron_fipo.driver import placement
from megatron_fipo.driver.cluster import ray_cluster, try_rewards
from megatron_fipo.driver.placement import NodeResources, engine_bundles, lacking, nodes, reserve
from megatron_fipo.driver.rollout.engine_actors import EngineActors
from megatron_fipo.driver.scoring.rehearsal import trials
from megatron_fipo.environment import Machine
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.task import Problem, TaskSettings
from tests.system.runs import LONGEST_S, ROOT

OWN_VARIABLES = ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_DEBUG")


@pytest.fixture
def growing(monkeypatch) -> Iterator[Cluster]:
    """A cluster that has its head only: two CPUs and no GPU. Nothing of the driver's own variables is in its environment."""
    for name in OWN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(placement, "NOTE_AFTER_S", 0.2)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False}
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@ray.remote
class Where:
    def variables(self) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in OWN_VARIABLES}

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def test_ranks_wait_for_a_node_with_gpus_and_take_nothing_from_the_driver_s_machine(growing, caplog):
    with ray_cluster(growing.address, workers=3, log=print, environment={"NCCL_DEBUG": "VERSION"}) as machine:
        assert machine == Machine(cpus=2, gpus=0, may_grow=True)
        with ThreadPoolExecutor(1) as pool:  # Ray starts nodes in the main thread only
            reserving = pool.submit(
                reserve, {"CPU": 1, "GPU": 1}, 2, "trainer ranks", "lower the parallel sizes", 120
            )
            time.sleep(1)
            joined: Any = growing.add_node(num_cpus=4, num_gpus=2)
            group = reserving.result()
        assert (
            "waiting up to 120 s for the resources of 2 trainer ranks of 1 GPU and 1 CPU each" in caplog.text
        )
        assert "has 0 of 0 GPUs and 2 of 2 CPUs free" in caplog.text
        actor = Where.options(num_cpus=1, num_gpus=1, placement_group=group).remote()
        assert ray.get(actor.node.remote()) == joined.node_id
        # Ray sets it for an actor of one CPU.
        assert ray.get(actor.variables.remote()) == {
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": None,
            "NCCL_DEBUG": "VERSION",  # `env`
        }
        with pytest.raises(UserError) as refused:
            reserve({"CPU": 1, "GPU": 4}, 2, "rollout engines", "lower rollout.num_engines", 1.0)
        assert "2 rollout engines of 4 GPUs and 1 CPU each (" in str(refused.value)
        assert len(nodes()) == 2
        assert "has 0 of 2 GPUs and 2 of 4 CPUs free" in lacking({"CPU": 1, "GPU": 1}, 1, "x", nodes())


def test_a_reward_must_load_on_every_node(growing, tmp_path, monkeypatch):
    """A scorer may be started again on any of them."""
    (tmp_path / "node_task.py").write_text(
        "import os\nassert 'BAD_NODE' not in os.environ, 'a bad node'\ndef score(c): return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    model = str(ROOT / "examples/countdown/base-model")
    config = load_config(None, [f"model.path={model}", "run_dir=r", "data.train_path=train.jsonl"])
    problem = Problem("q1", (1,), "prompt", "1", "test", task=TaskSettings(reward="node_task:score"))
    tried = trials(config, [problem], {}, [7, 5])
    logged: list[str] = []
    growing.add_node(num_cpus=1)
    with ray_cluster(growing.address, workers=1, log=print):
        try_rewards(config, model, tried, logged.append)
        assert logged == [
            "scored a made-up response to a problem of 1 set by your own reward, on each of 2 nodes"
        ]
        bad = growing.add_node(num_cpus=1, env_vars={"BAD_NODE": "1"})
        with pytest.raises(UserError) as refused:
            try_rewards(config, model, tried, logged.append)
    message = str(refused.value)
    assert message.startswith(
        f"on node {bad.node_id}: reward.name=node_task:score: its module raises AssertionError (a bad"
    )
    assert message.endswith(
        "put it on a file system that all nodes share, or install its package on each node"
    )
    assert 'node_task.py", line 2' in refused.value.trace


class SpanningEngine:
    """The actors that vLLM makes for an engine that spans nodes, in the same way, without a model."""

    requests_per_call = 1
    calls_at_once = 1

    def __init__(self, size: int, spans_nodes: bool = False) -> None:
        self._size = size
        self._spans = spans_nodes

    def workers(self) -> list[str]:
        """The node of each worker."""
        assert self._spans
        group = ray.util.get_current_placement_group()
        assert [bundle.get("GPU") for bundle in group.bundle_specs] == [1.0] * self._size
        self._workers = [
            Where.options(
                num_cpus=0, num_gpus=1, placement_group=group, placement_group_bundle_index=bundle
            ).remote()
            for bundle in range(self._size)
        ]
        return ray.get([worker.node.remote() for worker in self._workers])


def test_an_engine_larger_than_a_node_has_a_placement_of_its_own_over_several(growing):
    first, second = (growing.add_node(num_cpus=4, num_gpus=2) for _ in range(2))
    with ray_cluster(growing.address, workers=3, log=print):
        engines = EngineActors(SpanningEngine, {"size": 4}, 1, gpus_per_engine=4, placement_timeout_s=60.0)
        for _ in range(2):  # the second time after it was killed: its workers must have left their GPUs
            engines.start(0)
            nodes_of_workers = ray.get(engines[0].workers.remote(), timeout=LONGEST_S)
            assert sorted(nodes_of_workers) == sorted([first.node_id, second.node_id] * 2)
            engines.kill(0)
        with pytest.raises(
            UserError, match=r"5 workers of rollout engine 0 of 1 GPU and 1 CPU each \(.* has .* of 2 GPUs"
        ):
            EngineActors(SpanningEngine, {"size": 5}, 1, gpus_per_engine=5, placement_timeout_s=1.0)
        engines.shutdown()


def test_an_engine_spans_nodes_only_if_it_must():
    node = NodeResources("10.0.0.1", {"CPU": 16, "GPU": 8}, {})
    assert engine_bundles(0, [node]) == [{"CPU": 1}]
    assert engine_bundles(8, [node]) == [{"CPU": 1, "GPU": 8}]
    assert engine_bundles(16, [node, node]) == [{"CPU": 1, "GPU": 1}] * 16
