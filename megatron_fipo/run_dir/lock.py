"""One process at a time in a run's folder: by flock, or by a lease where the file system has no locks (Lustre without `-o flock`).

A lease is a file with a count that its owner raises every few seconds. Another process watches it for longer than that,
by its own clock, before it takes over: clocks of nodes may differ.
"""

import atexit
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import IO, Any

import psutil

from megatron_fipo.errors import UserError

LOCK = ".lock"
LEASE = f"{LOCK}.lease"
RENEW_S = 10.0
EXPIRES_S = 90.0
"""Seconds without a renewal after which an owner counts as gone. A node may see a file late by a minute."""
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)
"""Errors of flock on a file system without locks."""
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")

_TOKEN = re.compile(r"[0-9a-f]{16}")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a lease, and how often it was renewed."""

    token: str
    host: str
    pid: int
    started: float
    """When the process started, in seconds of its host's clock: another process may have the same pid later."""
    job: str | None
    count: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for values that no process writes: the token becomes part of a file's name."""
        kinds: dict[str, Any] = {
            "token": str,
            "host": str,
            "pid": int,
            "started": (int, float),
            "job": (str, NoneType),
            "count": int,
        }
        if not all(isinstance(getattr(self, name), kind) for name, kind in kinds.items()):
            raise ValueError("a value has another type")
        if not _TOKEN.fullmatch(self.token) or not 0 < self.pid < 2**31 or not self.host.isprintable():
            raise ValueError("a value is outside its range")

    @classmethod
    def this_process(cls) -> "Owner":
        job = next((os.environ[name] for name in JOB_VARIABLES if os.environ.get(name)), None)
        started = psutil.Process().create_time()
        return cls(secrets.token_hex(8), socket.gethostname(), os.getpid(), started, job)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" of job {self.job}" if self.job else "")

    def is_gone(self) -> bool:
        """Whether it ran on this host and has ended. Of another host nothing is known."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True


class RunLock:
    """The lock of a run's folder, from the constructor on until `release` or the end of the process."""

    def __init__(self, folder: Path, setting: str = "run_dir") -> None:
        """`UserError`, naming the `setting` of the folder, if another process has it. Raises OSError.

        Waits `EXPIRES_S` for a lease that is not renewed.
        """
        self._folder = folder
        self._lease: _Lease | None = None
        self._file: IO[str] = open(folder / LOCK, "a")  # noqa: SIM115 (open until the process ends)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise _in_use(folder, "another process", setting) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._lease = _Lease(folder, setting)

    @property
    def note(self) -> str | None:
        """A sentence if the folder has no real lock."""
        if self._lease is None:
            return None
        return (
            f"{self._folder} is on a file system without locks (flock), so {LEASE} marks it as in use; it is renewed every "
            f"{RENEW_S:g} s"
        )

    def check(self) -> None:
        """`UserError` if another process has taken the lease, because this one did not renew it in time."""
        taken_by = None if self._lease is None else self._lease.taken_by()
        if taken_by is not None:
            raise UserError(
                f"{taken_by} has taken {self._folder} while this process could not renew its lease for "
                f"{EXPIRES_S:g} s; nothing more is written here"
            )

    def release(self) -> None:
        if self._lease is not None:
            self._lease.end()
        self._file.close()


class _Lease:
    """The lease of this process, renewed by a thread."""

    def __init__(self, folder: Path, setting: str) -> None:
        self._path, self._setting = folder / LEASE, setting
        self._own = Owner.this_process()
        while not self._create():
            found = _read(self._path)
            if found is not None:
                self._wait_until_gone(found)
                if self._take_from(found):
                    break
        self._ended = threading.Event()
        atexit.register(self.end)
        self._thread = threading.Thread(target=self._renew, name="run-lease", daemon=True)
        self._thread.start()

    def taken_by(self) -> Owner | None:
        """The other process that has the lease now."""
        found = _read(self._path)
        return None if found is None or found.token == self._own.token else found

    def end(self) -> None:
        """Remove it."""
        atexit.unregister(self.end)
        self._ended.set()
        self._thread.join()
        with suppress(OSError, UserError):
            if self.taken_by() is None:
                self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Whether there was none. Linking is atomic on network file systems, too."""
        fresh = self._write()
        try:
            os.link(fresh, self._path)
        except FileExistsError:
            return False
        finally:
            fresh.unlink()
        return True

    def _write(self) -> Path:
        fresh = self._path.with_name(f"{LEASE}.{self._own.token}")
        fresh.write_text(json.dumps(asdict(self._own)))
        return fresh

    def _wait_until_gone(self, found: Owner) -> None:
        """Return when `found` has ended or renewed nothing for `EXPIRES_S`; `UserError` as soon as it does."""
        if found.is_gone():
            return
        _logger.warning(
            "%s has the lease of %s; waiting up to %g s for its next renewal",
            found,
            self._path.parent,
            EXPIRES_S,
        )
        until = time.monotonic() + EXPIRES_S
        while time.monotonic() < until:
            time.sleep(min(1.0, RENEW_S))
            now = _read(self._path)
            if now is None:
                return
            if now != found:
                raise _in_use(self._path.parent, str(now), self._setting)

    def _take_from(self, found: Owner) -> bool:
        """Replace the lease of `found`; False if there is none any more. `UserError` if another process is faster."""
        marker = self._path.with_name(f"{LEASE}.{found.token}.taken")
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise UserError(
                f"another process is taking over {self._path.parent} from {found}; remove {marker} if there is none"
            ) from None
        try:
            now = _read(self._path)
            if now is not None and now != found:
                raise _in_use(self._path.parent, str(now), self._setting)
            if now is not None:
                self._write().replace(self._path)
            return now is not None
        finally:
            marker.unlink()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                if self.taken_by() is not None:
                    return
                self._own = replace(self._own, count=self._own.count + 1)
                self._write().replace(self._path)
            except (OSError, UserError) as error:
                _logger.warning("cannot renew %s: %s", self._path, error)


def _read(path: Path) -> Owner | None:
    """The owner of a lease; None if there is no lease. `UserError` if it is not one."""
    try:
        return Owner(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        raise UserError(
            f"{path} is not a lease of this version; remove it if no process trains in {path.parent}"
        ) from None


def _in_use(folder: Path, who: str, setting: str) -> UserError:
    return UserError(f"{who} is training in {folder}; wait for it or choose another {setting}")
