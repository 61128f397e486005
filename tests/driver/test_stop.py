"""Signals and the time limit: ask, stop at once at the second Ctrl-C only, and the exit code that tells a scheduler what to do."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from megatron_fipo.driver.stop import SIGNALS, Stop


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 85, "SIGTERM"), (signal.SIGUSR1, 85, "SIGUSR1")],
)
def test_the_first_signal_asks(number, code, reason):
    lines: list[str] = []
    with Stop(None, lines.append) as stop:
        assert stop.requested() is None
        send(number)
        assert stop.requested() == reason
        assert stop.exit_code == code
        assert len(lines) == 1
        assert lines[0].startswith(f"{reason}: stopping at")


@pytest.mark.parametrize("before", [(), (signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM)])
def test_a_second_ctrl_c_stops_at_once(before):
    with Stop(None, lambda line: None) as stop:
        for number in (*before, signal.SIGINT):
            send(number)
        assert stop.exit_code == (85 if before else 130)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.exit_code == 130


@pytest.mark.parametrize("first", SIGNALS)
def test_a_scheduler_s_later_signals_are_waited_out(first):
    """SIGTERM often follows SIGUSR1, or another SIGTERM, while the state is being saved."""
    lines: list[str] = []
    with Stop(None, lines.append) as stop:
        send(first)
        reason, code = stop.requested(), stop.exit_code
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            send(number)
        assert (stop.requested(), stop.exit_code) == (reason, code)
    assert "SIGTERM: stopping already" in lines[-1]
    assert (
        "Ctrl-C again to stop at once" if first == signal.SIGINT else "Ctrl-C twice to stop at once"
    ) in lines[-1]


def test_the_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop(None, lambda line: None):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_time_limit_counts_from_the_start_of_the_process():
    program = """
        import time
        time.sleep(1.2)
        from megatron_fipo.driver.stop import Stop
        print(Stop(1.0 / 60, print).requested() is not None, Stop(1.0, print).requested())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "True None", done.stderr


def test_the_time_limit_asks_once_and_a_signal_afterwards_does_not_stop_at_once():
    lines: list[str] = []
    with Stop(1e-6, lines.append) as stop:
        assert stop.requested() == "max_walltime_minutes=1e-06 has passed"
        assert stop.requested() is not None
        send(signal.SIGTERM)
        assert stop.exit_code == 85
        assert len(lines) == 2


def test_a_signal_in_the_middle_of_a_print_is_not_lost():
    def torn(line: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with Stop(None, torn) as stop:
        send(signal.SIGTERM)
        assert stop.requested() == "SIGTERM"


def test_a_signal_interrupts_waiting_only_to_be_noted():
    with Stop(None, lambda line: None) as stop:
        before = signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        start = time.monotonic()
        time.sleep(0.3)
        signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - start >= 0.3
        assert stop.requested() == "SIGTERM"
