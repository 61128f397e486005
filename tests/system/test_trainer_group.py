"""The trainer's ranks with real actors: the first failure ends the group, and every later call raises it again."""

import gc
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from megatron_fipo.driver.trainer_group import TrainerGroup, TrainerLostError
from megatron_fipo.errors import UserError

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

        def rendezvous(self) -> str:
            self._die("rendezvous")
            return "here"

        def setup(self, rendezvous: str) -> None:
            self._die("setup")

        def work(self, trouble: str) -> int:
            if self.rank == 1 and trouble == "die":
                print("loading\nMemoryError: no more", file=sys.stderr, flush=True)
                os._exit(1)
            if self.rank == 1 and trouble == "refuse":
                raise UserError("the disk is full; free some space")
            if self.rank == 1 and trouble == "fault":
                raise ZeroDivisionError("no rows")
            return self.rank

        def frozen(self) -> int:
            return gc.get_freeze_count()

        def _die(self, method: str) -> None:
            if method == dies_in:
                print("Fatal Python error: Aborted", file=sys.stderr, flush=True)
                os._exit(1)

    return Rank


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (
            "die",
            r"^trainer rank 1 died in work: MemoryError: no more; see /.*/worker-.*\.err; run the same command to resume "
            "from the last checkpoint$",
        ),
        ("refuse", "^the disk is full; free some space$"),
        ("fault", "^trainer rank 1 failed in work: ZeroDivisionError: no rows$"),
    ],
)
def test_the_first_failure_is_the_one_that_every_later_call_raises(trouble, message):
    rank = rank_class()
    group = TrainerGroup(lambda: rank, 2, 0)
    assert group.call(rank.work, "") == [0, 1]
    with pytest.raises(TrainerLostError, match=message) as first:
        group.call(rank.work, trouble)
    with pytest.raises(TrainerLostError) as later:
        group.call(rank.work, "")
    assert later.value is first.value
    assert "\n" not in str(first.value)
    group.shutdown()  # as the run does at its end
    assert placements() == []


@pytest.mark.parametrize("method", ["start", "rendezvous", "setup"])
def test_a_rank_that_dies_at_the_start_says_why_and_leaves_nothing_reserved(method):
    message = rf"^trainer rank . died in {method}: Fatal Python error: Aborted; see /\S+\.err$"
    with pytest.raises(TrainerLostError, match=message):
        TrainerGroup(lambda: rank_class(dies_in=method), 2, 0)
    assert placements() == []


def test_a_rank_that_refuses_its_settings_ends_the_group_with_its_sentence():
    with pytest.raises(TrainerLostError, match=r"^no such model; give another$"):
        TrainerGroup(lambda: rank_class(dies_in="refuses"), 2, 0)
    assert placements() == []


def test_garbage_collection_on_a_rank_skips_what_it_has_imported():
    rank = rank_class()
    group = TrainerGroup(lambda: rank, 1, 0)
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
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "RAY_ADDRESS": running},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    address, cpus = done.stdout.split()
    assert address != running
    assert cpus == "1.0"
