"""A real Slurm on this machine: a login node with slurmctld, and nodes with slurmd, each in namespaces of its own.

    with SlurmCluster(Path("/var/tmp"), nodes=2, cpus=8) as cluster:
        job = cluster.submit(script)
        cluster.wait(job, "COMPLETED", timeout=60)

Each node (`node1`, `node2`, ...) has its own network interface, process ids, host name, /tmp and /dev/shm. A bridge
connects them; this machine's network is outside. All other folders are this machine's and shared, as on a cluster's
file system.
"""

import contextlib
import fcntl
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from tests.cluster.namespaces import NAMESPACES, START_S, Namespaces
from tests.cluster.slurm_conf import (
    LOGIN,
    PREFIX,
    NodeSpec,
    address,
    gres_conf,
    hosts,
    node_names,
    slurm_conf,
)

HERE = Path(__file__).parent
FOLDER_PREFIX = "slurm-cluster-"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ip", "tc", "ss", "nsenter", "unshare")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}


@dataclass(frozen=True)
class Job:
    """What Slurm knows of a job."""

    state: str
    reason: str
    restarts: int
    exit_code: int
    batch_host: str | None
    output: Path


@dataclass(frozen=True)
class Listener:
    """A TCP socket that waits for connections."""

    program: str
    address: str
    """`*` for all of the node's addresses, as `0.0.0.0` and `::`."""
    port: int


def missing() -> str | None:
    """Why no cluster can run on this machine; None if one can."""
    if os.geteuid() != 0:
        return "needs root"
    programs = [program for program in PROGRAMS if shutil.which(program) is None]
    if programs:
        return f"needs {', '.join(programs)} (Debian: apt-get install slurmctld slurmd slurm-client iproute2)"
    try_out = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return None if try_out.returncode == 0 else f"needs namespaces: {try_out.stderr.strip()}"


def remove_leftovers(parent: Path) -> None:
    """Remove the folders of clusters whose Python process was killed. Their processes have ended by themselves."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)


class SlurmCluster:
    """A context manager. Afterwards no process, namespace, network device, mount or folder of it is left."""

    def __init__(
        self, parent: Path, nodes: int = 2, cpus: int = 8, gpus: int = 0, keep_folder: bool = False
    ) -> None:
        """`nodes` of `cpus` CPUs and `gpus` GPUs each, which Slurm only counts. Their files are below `parent`.

        `parent` must be visible to all nodes: not in /tmp or /dev/shm. `keep_folder` leaves the files there, to debug.
        """
        for private in ("/tmp", "/dev/shm"):
            assert not parent.resolve().is_relative_to(private), f"{parent}: nodes have their own {private}"
        self.names = node_names(nodes)
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent.resolve()))
        """Files of the cluster, and of its jobs if they like: it is removed at the end."""
        self._keep_folder = keep_folder
        self._nodes: dict[str, Namespaces] = {}
        self._lock = (self.folder / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._write_files(NodeSpec(cpus, gpus))

    def _write_files(self, spec: NodeSpec) -> None:
        for name in self.names:
            (self.folder / "nodes" / name / "tmp").mkdir(parents=True, mode=0o1777)
            (self.folder / "nodes" / name / "spool").mkdir()
        for folder in ("state", "log", "etc/slurm"):
            (self.folder / folder).mkdir(parents=True)
        for number in range(spec.gpus):
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.folder / "etc/hosts").write_text(hosts(self.names))
        (self.folder / "etc/slurm/slurm.conf").write_text(slurm_conf(self.folder, self.names, spec))
        (self.folder / "etc/slurm/gres.conf").write_text(gres_conf(self.folder, self.names, spec))

    def __enter__(self) -> "SlurmCluster":
        try:
            self._login = Namespaces(
                ["bash", HERE / "login.sh", self.folder, f"{address(LOGIN)}/{PREFIX}"],
                log=self.folder / "log/login.out",
                pass_fds=(self._lock.fileno(),),  # as long as it lives, the folder is in use
            )
            self.wait_until(lambda: self._slurm("scontrol", "ping", check=False).returncode == 0, "slurmctld")
            for name in self.names:
                self._boot(name)
            self.wait_idle()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything. May be called again."""
        for node in self._nodes.values():
            node.kill()
        if hasattr(self, "_login"):
            self._login.kill()
        self._lock.close()
        if self._keep_folder:
            (self.folder / "lock").unlink(missing_ok=True)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    # Jobs

    def submit(
        self,
        script: Path,
        *arguments: str | Path,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> int:
        """`sbatch OPTIONS SCRIPT ARGUMENTS` in the cluster's folder; returns the job id.

        The job has the environment of this process and `env`. Slurm writes its output to the folder.
        """
        answer = self._slurm("sbatch", "--parsable", *options, script, *arguments, env=env).stdout
        return int(answer.split()[-1].split(";")[0])

    def job(self, job: int) -> Job:
        """Slurm's record of a job."""
        text = self._slurm("scontrol", "show", "job", "-o", str(job)).stdout
        values = dict(re.findall(r"(\w+)=(\S*)", text))
        return Job(
            state=values["JobState"],
            reason=values["Reason"],
            restarts=int(values["Restarts"]),
            exit_code=int(values["ExitCode"].split(":")[0]),
            batch_host=values.get("BatchHost"),
            output=Path(values["StdOut"]),
        )

    def state(self, job: int) -> str:
        return self.job(job).state

    def restart_count(self, job: int) -> int:
        """Times the job was requeued."""
        return self.job(job).restarts

    def output(self, job: int) -> str:
        """What the job has printed."""
        path = self.job(job).output
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job: int, *states: str, timeout: float) -> Job:
        """Wait until the job is in one of the states. Fails at once if it has ended in another."""
        deadline = time.monotonic() + timeout
        while (now := self.job(job)).state not in states:
            late = time.monotonic() > deadline
            if late or now.state in ENDED:
                raise AssertionError(f"job {job}, waiting for {states}: {now}\n{self.output(job)[-6000:]}")
            time.sleep(0.2)
        return now

    def wait_for_requeue(self, job: int, restarts: int, timeout: float) -> None:
        """Wait until the job was requeued `restarts` times. Fails at once if it has ended."""

        def requeued() -> bool:
            now = self.job(job)
            assert now.state not in ENDED - {"NODE_FAIL"}, f"job {job}: {now}\n{self.output(job)[-6000:]}"
            return now.restarts >= restarts and now.state == "PENDING"

        self.wait_until(requeued, f"requeue {restarts} of job {job}", timeout)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = START_S) -> None:
        """Wait for a condition, named by `what`."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} after {timeout:g} s\n{self._logs()}")
            time.sleep(0.1)

    def start_now(self, job: int) -> None:
        """Start a requeued job, which Slurm otherwise delays by two minutes.

        Not before the next second: slurmd refuses a run that starts in the second in which the last one ended ("Job
        credential revoked"), and the job then fails with exit code 1.
        """
        self._slurm("scontrol", "update", f"jobid={job}", "StartTime=now+2")

    def cancel(self, job: int) -> None:
        self._slurm("scancel", str(job))

    def signal(self, job: int, name: str, *, batch: bool = False) -> None:
        """Send a signal (for example `USR1`) to the job's steps, or only to its batch script."""
        self._slurm("scancel", f"--signal={name}", *(["--batch"] if batch else []), str(job))

    def cancel_all(self) -> None:
        """Cancel every job and wait until their nodes are free of them."""
        self._slurm("scancel", "--user=root")
        self.wait_until(lambda: not self._slurm("squeue", "--noheader").stdout.strip(), "end of all jobs")

    # Nodes

    def exec_on(
        self,
        node: str,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node or on `LOGIN`. See `Namespaces.run`."""
        return self._namespaces(node).run(
            command, cwd=cwd or self.folder, env=env, timeout=timeout, check=check
        )

    def kill_node(self, name: str) -> None:
        """End a node as a power cut does: its network is gone first, so no peer sees a connection close."""
        self._slurm("ip", "link", "delete", name)
        self._nodes.pop(name).kill()

    def start_node(self, name: str) -> None:
        """Boot a node that was killed and wait until jobs can run there. Its /tmp is as it was, /dev/shm empty.

        Real nodes take longer to boot than Slurm takes to notice their loss and to give up on its messages to them, so
        this waits for both: a message about a job's first run that arrives late would end its second.
        """
        self.wait_until(lambda: self._node_states()[name].startswith("down"), f"notice that {name} is lost")
        self.wait_until(lambda: "Agent count: 0" in re.sub(" +", " ", self._slurm("sdiag").stdout), "silence")
        self._boot(name)
        self.wait_until(
            lambda: self._node_states()[name] in ("idle", "mixed", "allocated"), f"slurmd on {name}"
        )

    @property
    def running(self) -> list[str]:
        """The nodes that were not killed."""
        return sorted(self._nodes)

    def start_missing(self) -> None:
        """Start all nodes that were killed."""
        for name in self.names:
            if name not in self._nodes:
                self.start_node(name)

    def slow_link(self, node: str, *rule: str) -> None:
        """Shape what a node sends and receives: arguments of `tc qdisc`, such as `tbf rate 10mbit burst 32k latency 1s`."""
        for place, device in ((LOGIN, node), (node, "eth0")):
            self.exec_on(place, ["tc", "qdisc", "replace", "dev", device, "root", *rule])

    def restore_link(self, node: str) -> None:
        """Undo `slow_link`."""
        for place, device in ((LOGIN, node), (node, "eth0")):
            self.exec_on(place, ["tc", "qdisc", "delete", "dev", device, "root"])

    def address(self, node: str) -> str:
        """IP address of a node."""
        return address(node)

    def local_folder(self, node: str) -> Path:
        """A node's /tmp, as seen from this process: for example Ray's logs. Absolute links in it do not resolve."""
        return self.folder / "nodes" / node / "tmp"

    def processes(self, node: str) -> list[psutil.Process]:
        """All processes on a node, process 1 and slurmd included."""
        return self._namespaces(node).processes()

    def listening_sockets(self, node: str) -> list[Listener]:
        """The TCP sockets on which programs of a node wait for connections."""
        found = []
        for line in self.exec_on(node, ["ss", "-H", "-t", "-l", "-n", "-p"]).stdout.splitlines():
            host, _, port = line.split()[3].rpartition(":")
            host = host.strip("[]").split("%")[0]
            program = re.search(r'\(\("([^"]*)"', line)
            found.append(
                Listener(
                    program=program[1] if program else "",
                    address="*" if host in ("*", "0.0.0.0", "::") else host,
                    port=int(port),
                )
            )
        return found

    def wait_idle(self) -> None:
        """Wait until all nodes are up and free."""
        self.wait_until(lambda: set(self._node_states().values()) == {"idle"}, "idle nodes")

    def _boot(self, name: str) -> None:
        node = Namespaces(
            ["bash", HERE / "node.sh", self.folder, name, f"{address(name)}/{PREFIX}"],
            inside=self._login,
            log=self.folder / f"log/{name}.out",
        )
        self._nodes[name] = node
        pair = f"ip link add {name} master bridge type veth peer name eth0 netns {node.pid}".split()
        # In the login node's network, but among this machine's process ids, which include the node's.
        subprocess.run(["nsenter", f"--target={self._login.pid}", "--net", "--", *pair], check=True)
        self._slurm("ip", "link", "set", name, "up")
        node.send_line()

    def _namespaces(self, node: str) -> Namespaces:
        return self._login if node == LOGIN else self._nodes[node]

    def _node_states(self) -> dict[str, str]:
        """`idle`, `down*` and so on, by node; `*` means that the node does not answer.

        Asks for all nodes: to a question about one, slurmctld answers with the allocation that it last told of all.
        """
        lines = self._slurm("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.splitlines()
        return dict(line.split() for line in lines)

    def _slurm(
        self, *command: str | Path, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        return self.exec_on(LOGIN, command, env=env, check=check)

    def _logs(self) -> str:
        """The last lines of the daemons' logs."""
        folder = self.folder / "log"
        logs = sorted(folder.glob("*.log")) or sorted(folder.iterdir())
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-1500:]}" for log in logs)
