"""Starts Ray on one node of a job, watches it, and ends it with everything that it started.

    python -m megatron_fipo.node.ray_node --logs FOLDER [--interface NAME] head [--peer HOST]
    python -m megatron_fipo.node.ray_node --logs FOLDER [--interface NAME] worker --address IP:PORT

Runs until SIGUSR2 (srun forwards it; it also forwards SIGUSR1, which is the driver's, and ends the step on SIGTERM), SIGTERM,
the end of its parent, or the end of Ray. Exits with 0 if it was asked to end, 2 for an error that a user must fix, else 86.
Ray's token is in the file RAY_AUTH_TOKEN_PATH. Nothing is ended by name: other jobs may run Ray on the node.
"""

import argparse
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.errors import UserError, writing
from megatron_fipo.exit_codes import LOST, USER_ERROR
from megatron_fipo.network import LOOPBACK, ServerWatch, accepts, interface_of, socket_variables
from megatron_fipo.node.addresses import own_address
from megatron_fipo.node.log_copy import LogCopy
from megatron_fipo.node.nodes import ADDRESS, failure, last_line, node_log
from megatron_fipo.node.orphaned import PATIENCE_S, requeue_if_orphaned
from megatron_fipo.node.ports import Ports, claim, ephemeral_floor
from megatron_fipo.node.processes import adopt_orphans, end_children, end_with_parent
from megatron_fipo.node.slurm_variables import whole_number
from megatron_fipo.outputs import write_output

OPEN_FILES = 65535
"""Ray opens a socket per pair of processes, and two logs per worker."""
SHARED_TIMEOUT_S = 90.0
"""A shared file system may show a new file this late on another node."""
SYNC_PERIOD_S = 30.0
RAY_FOLDER = "ray"
"""In the session folder, because Ray lets all users write to its own."""
TEMPORARY = "tmp"
"""In the session folder: TMPDIR of ranks and engines."""
DEFAULT_BASE = "/tmp"
LONGEST_BASE = 32
"""Bytes. The path of a Unix socket has at most 107, of which Ray takes 60."""
_LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "PMI2_", "OMPI_", "SLURM_", "SLURMD_", "MPI_LOCAL", "PALS_")
"""Of the step that starts Ray. MPI and torch take them for a description of their own ranks."""


@dataclass(frozen=True)
class Place:
    """Where Ray listens on this node, and keeps its files."""

    name: str
    """Of the node in Slurm."""
    address: str
    interface: str | None
    ports: Ports
    session: Path


def ray_command(place: Place, head_address: str | None, environment: Mapping[str, str]) -> list[str]:
    """The command that starts Ray: as head, or as a member of the cluster at `head_address`."""
    ports = place.ports
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    if head_address is None:
        command += ["--head", f"--port={ports.server('gcs')}", "--include-dashboard=false"]
        command += [f"--ray-client-server-port={ports.server('client')}"]
    else:
        command += [f"--address={head_address}"]
    command += [
        f"--node-name={place.name}",
        f"--node-ip-address={place.address}",
        f"--node-manager-port={ports.server('node_manager')}",
        f"--object-manager-port={ports.server('object_manager')}",
        f"--runtime-env-agent-port={ports.server('runtime_env_agent')}",
        f"--dashboard-agent-listen-port={ports.server('agent_http')}",
        f"--dashboard-agent-grpc-port={ports.server('agent_grpc')}",
        f"--metrics-export-port={ports.server('metrics')}",
        f"--min-worker-port={ports.workers[0]}",
        f"--max-worker-port={ports.workers[-1]}",
        f"--temp-dir={place.session / RAY_FOLDER}",
    ]
    for option, variable in (("--num-cpus", "SLURM_CPUS_ON_NODE"), ("--num-gpus", "SLURM_GPUS_ON_NODE")):
        if environment.get(variable):
            command.append(f"{option}={environment[variable]}")
    return command


def ray_environment(place: Place, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of Ray and of everything that it starts on this node."""
    own = {name: value for name, value in environment.items() if not name.startswith(_LAUNCHER_VARIABLES)}
    own |= socket_variables(place.interface, own)
    own.setdefault("VLLM_HOST_IP", place.address)
    own.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray waits for busy actors when it is told to end; their driver has ended.
    own["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    own["TMPDIR"] = str(place.session / TEMPORARY)
    # Of the head's servers that have no option.
    own["AUTOSCALER_METRIC_PORT"] = str(place.ports.server("autoscaler_metrics"))
    own["DASHBOARD_METRIC_PORT"] = str(place.ports.server("dashboard_metrics"))
    return own


def make_session_folder(environment: Mapping[str, str]) -> Path:
    """A new folder on the local disk that only this user may enter, in TMPDIR if its name is short enough, else in /tmp.

    Those of earlier attempts of the job are removed. Raises UserError.
    """
    job, restart = environment["SLURM_JOB_ID"], environment.get("SLURM_RESTART_COUNT", "0")
    base = environment.get("TMPDIR", "")
    usable = (
        0 < len(os.fsencode(base)) <= LONGEST_BASE and not any(map(str.isspace, base)) and os.path.isdir(base)
    )
    folder = Path(base if usable else DEFAULT_BASE, f"fipo-{job}-{restart}")
    for leftover in folder.parent.glob(f"fipo-{job}-*"):
        with suppress(OSError):  # another process may remove it, too
            if leftover.lstat().st_uid == os.getuid():
                shutil.rmtree(leftover)
    try:
        folder.mkdir(mode=0o700)
        (folder / TEMPORARY).mkdir()
    except OSError as error:
        raise UserError(
            f"Ray cannot keep its files in {folder}: {error.strerror}; remove it, or set TMPDIR to a folder of at most "
            f"{LONGEST_BASE} bytes on the node's disk"
        ) from None
    return folder


def wait_for_token(path: Path, stop: threading.Event, timeout_s: float = SHARED_TIMEOUT_S) -> None:
    """Wait until this node sees the file with Ray's token, which the first node wrote, or `stop`. Raises UserError."""
    deadline = time.monotonic() + timeout_s
    while not path.is_file() and not stop.wait(0.5):
        if time.monotonic() > deadline:
            raise UserError(
                f"this node does not see {path}, which the first node has written; put run_dir on a file system that all "
                "nodes share"
            )
        with suppress(OSError):
            os.listdir(path.parent)  # lets NFS look again


class RayNode:
    """Ray on this node."""

    def __init__(self, place: Place, logs: Path, head_address: str | None) -> None:
        self._place = place
        self._logs = logs
        self._copy = LogCopy(
            place.session / RAY_FOLDER / "session_latest" / "logs", logs / "ray" / place.name
        )
        self._process = subprocess.Popen(
            ray_command(place, head_address, os.environ),
            env=ray_environment(place, os.environ),
            preexec_fn=end_with_parent,
        )

    def run(self, stop: threading.Event, head: ServerWatch | None) -> str | None:
        """Watch Ray until it ends, the head is lost or `stop`; returns the reason, None if it was stopped.

        `head` is None on the head itself.
        """
        announced, next_sync = head is not None, 0.0
        while not stop.wait(0.5):
            if (code := self._process.poll()) is not None:
                return f"Ray ended with {code}: {last_line(self._logs, self._place.name)}"
            if head is not None and head.is_lost():
                return f"Ray's head on the first node has not answered for {PATIENCE_S:g} s"
            if not announced and accepts(self._place.address, self._place.ports.server("gcs")):
                self._announce()
                announced = True
            if time.monotonic() >= next_sync:
                self._sync()
                next_sync = time.monotonic() + SYNC_PERIOD_S
        return None

    def end(self) -> None:
        """End Ray's processes, copy the rest of the logs and remove Ray's files."""
        end_children(self._process)
        self._sync()
        shutil.rmtree(self._place.session, ignore_errors=True)

    def _announce(self) -> None:
        """Write the cluster's address, which the batch script waits for."""
        address = f"{self._place.address}:{self._place.ports.server('gcs')}\n"
        write_output(self._logs / ADDRESS, address)

    def _sync(self) -> None:
        try:
            self._copy.sync()
        except OSError as error:
            print(f"Ray's logs could not be copied: {error.strerror}", flush=True)


def _raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(
    arguments: argparse.Namespace, node: str, head: ServerWatch | None, stop: threading.Event
) -> str | None:
    """Start Ray and watch it. Returns the reason if it ended by itself. Raises UserError if it cannot start."""
    head_address = getattr(arguments, "address", None)
    peer = head_address.rpartition(":")[0] if head_address else arguments.peer
    address = own_address(arguments.interface, peer)
    ports, holder = claim(address, whole_number(os.environ, "SLURM_JOB_ID"), ephemeral_floor())
    session = make_session_folder(os.environ)
    place = Place(node, address, interface_of(address), ports, session)
    print(f"node {node}: address {address} ({place.interface}), ports: {ports}", flush=True)
    if address == LOOPBACK:
        print("the job has one node, so Ray listens on loopback only", flush=True)
    ray = RayNode(place, arguments.logs, head_address)
    try:
        return ray.run(stop, head)
    finally:
        ray.end()
        holder.close()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    end_with_parent()
    adopt_orphans()
    _raise_open_files()
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    stop = threading.Event()
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the driver's, which some schedulers send to all
    to_first_node = os.fdopen(os.dup(sys.stderr.fileno()), "w")
    try:
        wait_for_token(Path(os.environ["RAY_AUTH_TOKEN_PATH"]), stop)
        if stop.is_set():
            return 0
        _redirect_output(node_log(arguments.logs, node))
        address = getattr(arguments, "address", None)
        head = ServerWatch(address, PATIENCE_S) if address else None
        code, reason = LOST, run(arguments, node, head, stop)
    except UserError as error:
        code, reason = USER_ERROR, str(error)
    if reason is None:
        return 0
    print(failure(node, code, reason), file=to_first_node, flush=True)
    if code == LOST and head is not None:
        requeue_if_orphaned(head, os.environ, stop)
    return code


def _redirect_output(log: Path) -> None:
    with writing(log), log.open("a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_fipo.node.ray_node")
    parser.add_argument("--logs", type=Path, required=True, help="log folder of the attempt, shared")
    parser.add_argument("--interface", help="network interface; default: that of the route to the peer")
    roles = parser.add_subparsers(required=True)
    roles.add_parser("head").add_argument("--peer", help="another node of the job")
    roles.add_parser("worker").add_argument("--address", required=True, help="IP:PORT of the head")
    return parser


if __name__ == "__main__":
    sys.exit(main())
