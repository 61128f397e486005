"""A Ray cluster of one run on this machine, in a child process (`cluster_process.py`) with a process group of its own."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from megatron_fipo.driver import cluster_process
from megatron_fipo.driver.actor_logs import first_error
from megatron_fipo.driver.cluster_loss import cluster_lost, cluster_started
from megatron_fipo.driver.ray_storage import RAY_FOLDER
from megatron_fipo.errors import UserError

END_TIMEOUT_S = 15.0
"""Seconds that Ray may take to end before it is killed."""


class OwnCluster:
    """Starts the cluster, in one to eight seconds, and watches it: if it ends before `end`, it is reported lost."""

    def __init__(self, folder: Path, **options: Any) -> None:
        """`options` of `ray.init`; Ray's files go into `folder`. Raises `UserError` with Ray's reason if it does not start."""
        log = folder / "start.log"
        with open(log, "w") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    cluster_process.__file__,
                    json.dumps({"address": "local", "_temp_dir": str(folder / RAY_FOLDER), **options}),
                ],
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
            reason = first_error(log.read_text(errors="replace")) or "it gave no reason"
            raise UserError(f"Ray cannot start on this machine: {reason}; its messages are in {log}")
        cluster_started()
        threading.Thread(target=self._watch, daemon=True).start()

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
