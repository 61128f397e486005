"""A Ray cluster of one run on this machine, in a child process (`cluster_process.py`) with a process group of its own."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fipo.driver import cluster_process
from megatron_fipo.driver.actor_logs import first_error
from megatron_fipo.driver.cluster_loss import cluster_lost, cluster_started
from megatron_fipo.driver.ray_access import VARIABLES
from megatron_fipo.driver.ray_storage import RAY_FOLDER
from megatron_fipo.errors import UserError

END_TIMEOUT_S = 15.0
"""Seconds that Ray may take to end before it is killed."""
STARTS = 2
"""Attempts to start Ray, if it gives up after its own limit of time, which has no setting."""
TOO_SLOW = "timed out during startup"
"""Part of Ray's message then."""


class OwnCluster:
    """Starts the cluster, in one to eight seconds, and watches it: if it ends before `end`, it is reported lost."""

    def __init__(self, folder: Path, log: Callable[[str], None], **options: Any) -> None:
        """`options` of `ray.init`; Ray's files go into `folder`.

        On a machine that is too busy for Ray's own limit of 30 seconds it is started once more, which `log` receives. Raises
        `UserError` with Ray's reason if it does not start.
        """
        messages, self.address, reason = folder / "start.log", "", ""
        for attempt in range(STARTS):
            self._start(folder, messages, options)
            if self.address:
                break
            reason = first_error(messages.read_text(errors="replace")) or "it gave no reason"
            if TOO_SLOW not in reason or attempt == STARTS - 1:
                raise UserError(f"Ray cannot start on this machine: {reason}; its messages are in {messages}")
            log("Ray did not start within 30 s, since this machine is busy; it is started once more")
        cluster_started()
        threading.Thread(target=self._watch, daemon=True).start()

    def _start(self, folder: Path, messages: Path, options: dict[str, Any]) -> None:
        """Start the process and read the address; empty if Ray did not start."""
        with open(messages, "w") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    cluster_process.__file__,
                    json.dumps({"address": "local", "_temp_dir": str(folder / RAY_FOLDER), **options}),
                ],
                env=os.environ | VARIABLES,
                process_group=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self._ending = False
        try:
            self.address = self._read_address()
        except BaseException:
            self.end()
            raise
        if not self.address:
            self.end()

    def end(self) -> None:
        """End Ray and wait until it has ended."""
        self._ending = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the kernel kills Ray's processes with it
            self._process.wait()

    def _read_address(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _watch(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.read()  # until the process ends
        if not self._ending:
            cluster_lost()
