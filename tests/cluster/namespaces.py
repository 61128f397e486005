"""A machine inside this one: a process tree with its own network, process ids, host name and mounts."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

NAMESPACES = ("--net", "--pid", "--mount", "--uts")
START_S = 60.0
"""Seconds in which namespaces must exist, on a busy machine."""


class Namespaces:
    """Namespaces whose process 1 is `command`. They end, with every process in them, when it ends.

    That includes namespaces inside these. `command` reads its standard input until that closes, which the kernel
    does when this process ends, however it ends: nothing of them outlives it.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        inside: "Namespaces | None" = None,
        log: Path,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        """Start `command` in new namespaces, which are part of those of `inside`; its output goes to `log`."""
        enter = () if inside is None else ("nsenter", f"--target={inside.pid}", *NAMESPACES, "--")
        unshare = ("unshare", *NAMESPACES, "--mount-proc", "--fork", "--kill-child", "--")
        depth = 2 if inside is None else 3
        with log.open("ab") as output:
            self._starter = subprocess.Popen(
                [*enter, *unshare, *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C reaches pytest alone, which then ends all in order
            )
        self.pid: int = _process_one(self._starter, depth, log)
        """Of process 1, as seen from outside."""

    @property
    def alive(self) -> bool:
        return self._starter.poll() is None

    def send_line(self) -> None:
        """Send process 1 an empty line."""
        assert self._starter.stdin is not None
        self._starter.stdin.write(b"\n")
        self._starter.stdin.flush()

    def kill(self) -> None:
        """Kill every process in the namespaces at once, and wait until none is left."""
        if self.alive:
            processes = self.processes()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            psutil.wait_procs(processes, timeout=START_S)
        self._starter.wait(timeout=START_S)
        assert self._starter.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._starter.stdin.close()

    def run(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path,
        timeout: float,
        env: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside and return its output as text, standard error included.

        `env` is added to this process's environment. Fails if the exit code is not 0 and `check`; one that lasts
        longer than `timeout` seconds is killed and has exit code 124.
        """
        limited = ("timeout", "--kill-after=5", str(timeout), *map(str, command))
        # A pipe would stay open as long as any child of the command.
        with tempfile.TemporaryFile("w+") as output:
            code = subprocess.run(
                ["nsenter", f"--target={self.pid}", *NAMESPACES, f"--wdns={cwd}", "--", *limited],
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
            output.seek(0)
            done = subprocess.CompletedProcess(command, code, output.read())
        if check:
            assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}"
        return done

    def processes(self) -> list[psutil.Process]:
        """The processes in the process-id namespace, without those of namespaces inside it."""
        own = _pid_namespace(self.pid)
        return [process for process in psutil.process_iter() if _pid_namespace(process.pid) == own]


def _pid_namespace(pid: int) -> str | None:
    """Name of a process's id namespace; None if the process has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _process_one(starter: subprocess.Popen[bytes], depth: int, log: Path) -> int:
    """The process below `starter` with id 1 in a namespace that is `depth` deep."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert starter.poll() is None, f"no namespaces: {log.read_text()}"
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(starter.pid).children(recursive=True):
                ids = _ids(process.pid)
                if len(ids) == depth and ids[-1] == 1 and process.name() not in ("unshare", "nsenter"):
                    return process.pid
        time.sleep(0.02)
    raise TimeoutError(f"no namespaces after {START_S:g} s: {log.read_text()}")


def _ids(pid: int) -> list[int]:
    """A process's id in each namespace that it is in, the outermost first."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return [int(word) for word in line.split()[1:]]
    return []
