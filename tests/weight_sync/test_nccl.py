"""Everything of the push over NCCL but vLLM and NCCL; `tests/vllm` puts vLLM's trainer engine in."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.checkpoint.hf_export import TensorInfo
from megatron_fipo.weight_sync import nccl as nccl_sync
from megatron_fipo.weight_sync.nccl import NcclTransport, TransferStuckError, rank_offsets
from megatron_fipo.weight_sync.transport import WeightSyncError
from tests.engine.wire import WireEngine, broadcast
from tests.weight_sync.handles import handles

WEIGHTS = {f"t{index}": torch.full((2, index + 1), float(index)) for index in range(5)}
INFOS = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in WEIGHTS.items()]


class StandIn:
    """What `NCCLTrainerWeightTransferEngine.send_weights` does with its client and source. `blocked` stops its broadcast halfway."""

    def __init__(self, client, source, engines) -> None:
        self.client, self.source, self.engines = client, source, engines
        self.blocked: threading.Event | None = None
        self.closed = False
        client.init_weight_transfer_engine({"world_size": 9})

    def send_weights(self) -> None:
        infos = self.source.metadata()
        update = {"names": [info.name for info in infos], "shapes": [info.shape for info in infos]}
        self.client.start_weight_update()
        executor = ThreadPoolExecutor(1)
        try:
            receiving = executor.submit(self.client.update_weights, update)
            for name in broadcast(self.source, self.engines):
                if name == "t2" and self.blocked is not None:
                    self.blocked.wait(30)
            receiving.result()
        finally:
            executor.shutdown(wait=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.closed = True


class Run:
    """A `NcclTransport` over engines in this process."""

    def __init__(self, monkeypatch, actors, rank: int = 0) -> None:
        self.passes = 0
        self.finished_passes = 0
        self.trainers: list[StandIn] = []
        self.blocked: threading.Event | None = None
        self.actors = actors
        self.sync = NcclTransport(
            self.export, INFOS, rank=rank, device=torch.device("cpu"), workers_per_engine=2, buffer_bytes=64
        )
        monkeypatch.setattr(self.sync, "_join", self.join)

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.passes += 1
        yield from WEIGHTS.items()
        self.finished_passes += 1

    def join(self, client) -> StandIn:
        trainer = StandIn(
            client, self.sync._source, {number: actor.engine for number, actor in client.engines.items()}
        )
        trainer.blocked = self.blocked
        self.trainers.append(trainer)
        return trainer

    def push(
        self, version: int, timeout_s: float = 30.0, check: bool = True, only: int | None = None
    ) -> None:
        engines = {number: actor for number, actor in self.actors.items() if only in (None, number)}
        self.sync.push(engines, version, timeout_s=timeout_s, check=check)


def test_all_engines_hold_the_weights_and_the_communicator_stays(monkeypatch):
    with handles(WireEngine(), WireEngine()) as actors:
        run = Run(monkeypatch, actors)
        for version in (1, 2):
            run.push(version, check=version == 1)
            for actor in actors.values():
                assert actor.engine.version == version
                assert all(torch.equal(actor.engine.held[name], tensor) for name, tensor in WEIGHTS.items())
        assert run.finished_passes == 2
        assert [len(actor.engine.inits) for actor in actors.values()] == [1, 1]
        assert [actor.engine.inits[0]["rank_offset"] for actor in actors.values()] == [1, 3]


def test_other_engines_need_a_new_communicator(monkeypatch):
    with handles(WireEngine(), WireEngine()) as actors:
        run = Run(monkeypatch, actors)
        run.push(1)
        run.push(2, only=1)
        assert [actor.engine.version for actor in actors.values()] == [1, 2]
        assert [trainer.closed for trainer in run.trainers] == [True, False]
        assert [info["rank_offset"] for info in actors[1].engine.inits] == [3, 1]


def test_wrong_bytes_are_named(monkeypatch):
    class Wrong(WireEngine):
        def nccl_update(self, info) -> None:
            super().nccl_update(info)
            self.held["t3"] += 1

    with handles(WireEngine(), Wrong()) as actors:
        run = Run(monkeypatch, actors)
        with pytest.raises(
            WeightSyncError, match="engine 1 holds other weights than were sent for version 1: t3 differs"
        ):
            run.push(1)


def test_a_failure_before_the_broadcast_leaves_no_rank_behind(monkeypatch):
    class Dead(WireEngine):
        def begin_weight_update(self, check: bool) -> None:
            raise ray.exceptions.ActorDiedError

    with handles(WireEngine(), Dead()) as actors:
        run = Run(monkeypatch, actors)
        with pytest.raises(WeightSyncError, match="engine 1 died"):
            run.push(1)
        assert (run.passes, run.finished_passes) == (1, 1)
        run.push(2, only=0)
        assert actors[0].engine.version == 2
        assert len(run.trainers) == 2


def test_a_failure_after_the_broadcast_leaves_no_rank_behind(monkeypatch):
    class Full(WireEngine):
        def nccl_update(self, info) -> None:
            super().nccl_update(info)
            raise MemoryError

    with handles(WireEngine(), Full()) as actors:
        run = Run(monkeypatch, actors)
        with pytest.raises(WeightSyncError, match="engine 1 failed"):
            run.push(1)
        assert (run.passes, run.finished_passes) == (1, 1)


@pytest.mark.parametrize(("lost", "timeout_s"), [(True, 60.0), (False, 0.3)])
def test_a_broadcast_that_cannot_end_is_given_up(monkeypatch, lost, timeout_s):
    """An engine that dies is noticed at once, one that hangs at the deadline."""
    released = threading.Event()

    class Lost(WireEngine):
        def nccl_update(self, info) -> None:
            if lost:
                raise ray.exceptions.ActorDiedError
            released.wait(30)

    monkeypatch.setattr(nccl_sync, "GRACE_S", 0.2)
    late = r"rollout engine 0 did not take the weights within rollout\.timeout_s = 0\.3 s, nor did 1"
    reason = "rollout engine 1 died" if lost else late
    with handles(WireEngine(), Lost()) as actors:
        run = Run(monkeypatch, actors)
        run.blocked = released
        started = time.monotonic()
        try:
            with pytest.raises(TransferStuckError, match=f"to rollout engines 0, 1 cannot end: {reason}"):
                run.push(1, timeout_s=timeout_s)
            assert time.monotonic() - started < 5
        finally:
            released.set()


def test_the_other_ranks_only_take_part_in_the_export(monkeypatch):
    run = Run(monkeypatch, {}, rank=1)
    run.push(1)
    assert run.finished_passes == 1
    assert run.trainers == []


@given(st.sets(st.integers(0, 50), min_size=1), st.integers(1, 8))
def test_every_worker_of_every_engine_has_a_rank_of_its_own(numbers, workers):
    offsets = rank_offsets(numbers, workers)
    ranks = [offset + worker for offset in offsets.values() for worker in range(workers)]
    assert sorted(ranks) == list(range(1, 1 + len(numbers) * workers))
