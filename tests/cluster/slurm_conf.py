"""Configuration files of a Slurm whose nodes are namespaces of this machine."""

from dataclasses import dataclass
from pathlib import Path

LOGIN = "login"
"""Name of the node where slurmctld runs and jobs are submitted."""
NETWORK = "10.77.0"
PREFIX = 24


@dataclass(frozen=True)
class NodeSpec:
    """What Slurm believes that each node has."""

    cpus: int
    gpus: int
    memory_mb: int = 16000


def node_names(count: int) -> list[str]:
    return [f"node{number}" for number in range(1, count + 1)]


def address(name: str) -> str:
    """IP address of a node."""
    return f"{NETWORK}.{254 if name == LOGIN else name.removeprefix('node')}"


def hosts(names: list[str]) -> str:
    """/etc/hosts of all nodes."""
    return "127.0.0.1 localhost\n" + "".join(f"{address(name)} {name}\n" for name in (LOGIN, *names))


def slurm_conf(folder: Path, names: list[str], spec: NodeSpec) -> str:
    """slurm.conf. It has no cgroups, accounting or authentication, and notices a dead node in about 10 s."""
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={address(name)} CPUs={spec.cpus} CoresPerSocket={spec.cpus} ThreadsPerCore=1 "
        f"RealMemory={spec.memory_mb}{f' Gres=gpu:{spec.gpus}' if spec.gpus else ''} State=UNKNOWN"
        for name in names
    )
    return f"""\
ClusterName=local
SlurmctldHost={LOGIN}({address(LOGIN)})
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/nodes/%n/spool
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/nodes/%n/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MinJobAge=3600
ReturnToService=2
KillWait=10
SlurmdTimeout=4
MessageTimeout=5
SchedulerParameters=batch_sched_delay=0,sched_min_interval=10000,sched_interval=1
RequeueExit=85,86
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def gres_conf(folder: Path, names: list[str], spec: NodeSpec) -> str:
    """gres.conf: a file in `folder` stands for each GPU. Slurm wants files to count them by."""
    last = spec.gpus - 1
    return "".join(f"NodeName={name} Name=gpu File={folder}/gpu[0-{last}]\n" for name in names if spec.gpus)
