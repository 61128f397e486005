"""Whether a job has lost its first node, and the batch script with it."""

import threading
import time

from megatron_fipo.network import LOOPBACK, ServerWatch, free_port, listen
from megatron_fipo.node.orphaned import is_orphaned


def watch(port: int, patience_s: float) -> ServerWatch:
    return ServerWatch(f"{LOOPBACK}:{port}", patience_s)


def test_a_job_is_orphaned_if_neither_head_nor_batch_script_show_themselves():
    assert is_orphaned(watch(free_port(LOOPBACK), 0.3), threading.Event())


def test_a_job_whose_head_answers_is_not():
    with listen(LOOPBACK) as head:
        assert not is_orphaned(watch(head.getsockname()[1], 60), threading.Event())


def test_a_job_whose_batch_script_ends_the_step_is_not():
    stop = threading.Event()
    stop.set()
    assert not is_orphaned(watch(free_port(LOOPBACK), 60), stop)


def test_a_head_is_lost_once_it_has_been_silent_for_the_patience():
    with listen(LOOPBACK) as head:
        seen = watch(head.getsockname()[1], 0.5)
        until = time.monotonic() + 0.8
        while time.monotonic() < until:
            assert not seen.is_lost()
            time.sleep(0.02)
    while not seen.is_lost():
        time.sleep(0.02)
    assert not seen.answers()


def test_a_silence_that_is_known_already_is_not_waited_for_again():
    lost = watch(free_port(LOOPBACK), 0.2)
    while not lost.is_lost():
        time.sleep(0.02)
    assert is_orphaned(lost, threading.Event())
