"""Processes: so many at one time, a time limit, signals passed on, and what the log of a failed one says."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.study.outcome import Outcome, StudyFolder, outcome_of
from megatron_fipo.study.processes import Ended, Job, Processes

LONG = "import time; print('up', flush=True); time.sleep(600)"


@dataclass(frozen=True)
class Script(Job):
    """A job that runs Python code in the place of `train`."""

    code: str = ""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", self.code]


def _job(folder: Path, name: str, code: str) -> Script:
    return Script(name, folder / f"{name}.yaml", folder / f"logs/{name}.log", code)


def _run(processes: Processes, *jobs: Script) -> dict[str, Ended]:
    return {ended.job.name: ended for ended in processes.run(jobs, lambda _: None)}


def test_every_job_ends_with_its_code_and_log(tmp_path: Path) -> None:
    jobs = [
        _job(tmp_path, f"j{code}", f"print('as {code}'); raise SystemExit({code})") for code in (0, 2, 86)
    ]
    ended = _run(Processes(2, None, {}), *jobs)
    assert {name: found.code for name, found in ended.items()} == {"j0": 0, "j2": 2, "j86": 86}
    assert all(job.log.read_text() == f"as {job.name[1:]}\n" for job in jobs)


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_more_run_at_one_time_than_allowed(tmp_path: Path, at_once: int) -> None:
    """Each script lists the processes that are up, by files that they make and remove."""
    code = (
        f"import os, time; from pathlib import Path; up = Path({str(tmp_path / 'up')!r}); me = up / str(os.getpid());"
        "me.touch(); time.sleep(0.3); print(len(list(up.iterdir()))); me.unlink()"
    )
    (tmp_path / "up").mkdir()
    jobs = [_job(tmp_path, f"j{number}", code) for number in range(4)]
    _run(Processes(at_once, None, {}), *jobs)
    assert max(int(job.log.read_text()) for job in jobs) <= at_once


def test_variables_are_passed_on(tmp_path: Path) -> None:
    job = _job(tmp_path, "j", "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['HOME'])")
    _run(Processes(1, None, {"OMP_NUM_THREADS": "3"}), job)
    assert job.log.read_text() == f"3 {os.environ['HOME']}\n"


def test_a_time_limit_ends_a_job_and_not_the_next(tmp_path: Path) -> None:
    ended = _run(Processes(1, 1.0, {}), _job(tmp_path, "slow", LONG), _job(tmp_path, "fast", "pass"))
    assert (ended["slow"].code, ended["slow"].timed_out) == (-signal.SIGTERM, True)
    assert (ended["fast"].code, ended["fast"].timed_out) == (0, False)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 85)])
def test_a_signal_goes_to_all_jobs_and_no_more_start(tmp_path: Path, number: int, exit_code: int) -> None:
    jobs = [_job(tmp_path, name, LONG) for name in ("a", "b", "never")]
    processes = Processes(2, None, {})

    def send() -> None:
        while not all(job.log.exists() and job.log.read_text() for job in jobs[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    ended = _run(processes, *jobs)
    sender.join()
    assert {name: found.code for name, found in ended.items()} == dict.fromkeys("ab", -number)
    assert processes.exit_code == exit_code
    assert not jobs[2].log.exists()


def test_a_handler_of_signals_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    _run(Processes(1, None, {}), _job(tmp_path, "j", "pass"))
    assert signal.getsignal(signal.SIGINT) is before


def _outcome(code: int, log: Path, stopped: bool = False, limit: float | None = None) -> Outcome:
    return outcome_of(code, log, stopped=stopped, limit_minutes=limit)


def test_the_reason_of_a_failure_is_the_sentence_of_the_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Iteration 1\nmegatron-fipo: first\nmegatron-fipo: no space; free some\nbye\n")
    assert _outcome(2, log) == Outcome("failed", f"no space; free some (exit code 2; {log})")
    log.write_text("Traceback\nValueError: 7\n\n")
    assert _outcome(1, log).reason == f"ValueError: 7 (exit code 1; {log})"
    log.write_text("")
    assert _outcome(-9, log).reason == f"it printed nothing (signal 9; {log})"


def test_what_a_stop_and_a_time_limit_are(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("")
    assert _outcome(0, log, stopped=True) == Outcome("complete")
    assert _outcome(130, log, stopped=True).status == "stopped"
    assert _outcome(85, log).status == "stopped"
    assert _outcome(85, log, limit=2.5) == Outcome("failed", "not complete after time_limit_minutes=2.5")


def test_an_outcome_is_read_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    assert folder.outcome("run") == Outcome("missing")
    folder.save_outcome("run", Outcome("failed", "why"))
    assert folder.outcome("run") == Outcome("failed", "why")
    for text in ("{", '{"status": "other"}', '{"state": 1}'):
        (tmp_path / "outcomes/run.json").write_text(text)
        with pytest.raises(UserError, match=r"outcomes/run\.json .*remove it"):
            folder.outcome("run")
