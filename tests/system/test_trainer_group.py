"""The trainer's ranks with real actors: the first failure ends the group, and every later call raises it again."""

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from megatron_fipo import progress
from megatron_fipo.config import RecoveryConfig
from megatron_fipo.driver.rank_actor import TrainerBugError, TrainerLostError, TrainerRefusedError
from megatron_fipo.driver.trainer_group import TrainerGroup
from megatron_fipo.environment import Accelerators
from megatron_fipo.errors import UserError
from tests.system.runs import check, ended

pytestmark = pytest.mark.usefixtures("cluster")


def placements() -> list[str]:
    return [
        group["placement_group_id"]
        for group in placement_group_table().values()
        if group["state"] != "REMOVED"
    ]


def rank_class(dies_in: str = "") -> Any:
    class Rank:
        """A local class reaches the actors without importing this module there."""

        def __init__(self, rank: int, world_size: int) -> None:
            self.rank = rank
            if rank == 1:
                self._die("start")
                if dies_in == "refuses":
                    raise UserError("no such model; give another")

        def accelerators(self) -> Accelerators:
            return Accelerators(capability=(9, self.rank), cuda="13.0", transformer_engine=None)

        def rendezvous(self) -> str:
            self._die("rendezvous")
            return "here"

        def setup(self, rendezvous: str) -> None:
            self._die("setup")

        def work(self, trouble: str) -> int:
            if self.rank == 1 and trouble == "die":
                print("loading\nMemoryError: no more", file=sys.stderr, flush=True)
                os._exit(1)
            if self.rank == 1 and trouble == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if trouble == "hang":
                time.sleep(1000)
            for _ in range(75 if trouble == "work" else 0):
                time.sleep(0.2)
                progress.advance()
            if self.rank == 1 and trouble == "refuse":
                raise UserError("the disk is full; free some space")
            if self.rank == 1 and trouble == "fault":
                raise ZeroDivisionError("no rows")
            return self.rank

        def pid(self) -> int:
            return os.getpid()

        def fork(self) -> int | None:
            """A process that forks another, as checkpoint writers do."""
            threading.current_thread()  # from here on Python has an object for this thread
            fork = multiprocessing.get_context("fork")

            def body() -> None:
                child = fork.Process(target=int)
                child.start()
                child.join()
                os._exit(child.exitcode)

            writer = fork.Process(target=body)
            writer.start()
            writer.join()
            return writer.exitcode

        def frozen(self) -> int:
            return gc.get_freeze_count()

        def _die(self, method: str) -> None:
            if method == dies_in:
                print("Fatal Python error: Aborted", file=sys.stderr, flush=True)
                os._exit(1)

    return Rank


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        (
            "die",
            TrainerLostError,
            r"^trainer rank 1 on [\d.]+, in work, died: MemoryError: no more; see /.*/worker-.*\.err$",
        ),
        ("refuse", TrainerRefusedError, "^the disk is full; free some space$"),
        ("fault", TrainerBugError, "^trainer rank 1 failed in work: ZeroDivisionError: no rows$"),
    ],
)
def test_the_first_failure_is_the_one_that_every_later_call_raises(trouble, kind, message):
    rank = rank_class()
    group = TrainerGroup(lambda: rank, 2, 0)
    group.start()
    assert group.call(rank.work, "") == [0, 1]
    with pytest.raises(kind, match=message) as first:
        group.call(rank.work, trouble)
    with pytest.raises(kind) as later:
        group.call(rank.work, "")
    assert later.value is first.value
    assert "\n" not in str(first.value)
    group.shutdown()  # as the run does at its end
    assert placements() == []


@pytest.mark.parametrize("method", ["start", "rendezvous", "setup"])
def test_a_rank_that_dies_at_the_start_says_why_and_leaves_nothing_reserved(method):
    message = rf"^trainer rank .*, in {method}, died: Fatal Python error: Aborted; see /\S+\.err$"
    group = TrainerGroup(lambda: rank_class(dies_in=method), 2, 0)
    with pytest.raises(TrainerLostError, match=message):
        group.start()
    group.shutdown()
    assert placements() == []


def test_gpus_are_judged_once_and_before_a_rank_sets_up():
    seen = []

    def refuse(found: list[Accelerators]) -> None:
        seen.append([each.capability for each in found])
        if len(seen) == 1:
            raise UserError("these cards are too small")

    group = TrainerGroup(lambda: rank_class(dies_in="rendezvous"), 2, 0, judge=refuse)
    with pytest.raises(UserError, match="too small"):
        group.start()
    group.shutdown()
    group = TrainerGroup(lambda: rank_class(), 2, 0, judge=refuse)
    group.start()
    group.start()
    group.shutdown()
    assert seen == [[(9, 0), (9, 1)]] * 2
    assert placements() == []


def test_a_rank_that_refuses_its_settings_ends_the_group_with_its_sentence():
    group = TrainerGroup(lambda: rank_class(dies_in="refuses"), 2, 0)
    with pytest.raises(TrainerRefusedError, match=r"^no such model; give another$"):
        group.start()
    group.shutdown()
    assert placements() == []


SHORT = RecoveryConfig(stall_timeout_s=12.0)


@contextlib.contextmanager
def started(rank: Any, size: int = 2) -> Iterator[TrainerGroup]:
    group = TrainerGroup(lambda: rank, size, 0, recovery=SHORT)
    try:
        group.start()
        yield group
    finally:
        group.shutdown()


def test_a_group_whose_rank_died_can_be_started_again_in_the_same_place():
    rank = rank_class()
    with started(rank) as group:
        with pytest.raises(TrainerLostError):
            group.call(rank.work, "die")
        group.start()
        assert group.call(rank.work, "") == [0, 1]
    assert placements() == []


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (
            "stop",
            r"^trainer rank 1 on [\d.]+, in work, has not answered its heartbeat since [\d:]+ \(recovery.stall_timeout_s = 12 s",
        ),
        pytest.param(
            "hang",
            r"^trainer rank . on [\d.]+, in work, hangs with all others: its last progress was at [\d:]+ \(recovery.stall",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_hangs_is_noticed_named_and_replaced(trouble, message):
    rank = rank_class()
    with started(rank) as group:
        before = group.call(rank.pid)
        with pytest.raises(TrainerLostError, match=message):
            group.call(rank.work, trouble)
        group.start()
        assert not set(before) & set(group.call(rank.pid))


@pytest.mark.slow
def test_a_rank_that_works_for_longer_than_the_timeout_is_left_alone():
    rank = rank_class()
    with started(rank) as group:
        assert group.call(rank.work, "work") == [0, 1]


def check_until_it_raises(group: TrainerGroup) -> None:
    while True:
        group.check()
        time.sleep(0.1)


def test_a_rank_that_dies_between_calls_is_noticed():
    rank = rank_class()
    with started(rank) as group:
        group.check()
        os.kill(group.call(rank.pid)[1], signal.SIGKILL)
        with pytest.raises(TrainerLostError, match=r"^trainer rank 1 on [\d.]+, in no method, died: "):
            check_until_it_raises(group)


def test_what_a_rank_forks_may_fork():
    rank = rank_class()
    with started(rank, size=1) as group:
        assert group.call(rank.fork) == [0]


def test_garbage_collection_on_a_rank_skips_what_it_has_imported():
    rank = rank_class()
    group = TrainerGroup(lambda: rank, 1, 0)
    group.start()
    (frozen,) = group.call(rank.frozen)
    group.shutdown()
    assert frozen > 10_000


def test_without_an_address_a_cluster_is_started_whatever_runs_already():
    program = """
        from megatron_fipo.driver.cluster import ray_cluster
        import ray
        with ray_cluster(None, workers=1, log=print):
            print(ray.get_runtime_context().gcs_address, ray.cluster_resources()["CPU"])
    """
    running = ray.get_runtime_context().gcs_address
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "RAY_ADDRESS": running},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    done = check(ended(process))
    address, cpus = done.stdout.split()
    assert address != running
    assert cpus == "1.0"
