"""What a job asks of Slurm, and the environment that its commands run in."""

import re
from dataclasses import dataclass

from megatron_fipo.fields import file_path, number
from megatron_fipo.secrecy import has_password, is_secret

LONGEST_NOTICE_S = 65_535
"""What sbatch accepts."""
NAME = re.compile(r"[\w.@+:/,-]+", re.ASCII)
"""What Slurm calls accounts, partitions and jobs."""
_FORMS = {
    "account": (NAME, "the name of an account"),
    "partition": (NAME, "the name of a partition"),
    "job_name": (NAME, "a name of letters, digits and . _ - without spaces"),
    "exclude": (re.compile(r"[\w.,\[\]-]+", re.ASCII), "a list of nodes such as node[1-4],node7"),
    "time": (
        re.compile(r"\d{1,8}(-\d{1,8}(:\d{1,8}){0,2}|(:\d{1,8}){0,2})", re.ASCII),
        "minutes, hours:minutes:seconds or days-hours:minutes:seconds",
    ),
    "interface": (re.compile(r"[^\s/]{1,15}"), "the name of a network interface"),
    "container": (re.compile(r"[^\s~]\S*"), "an image as enroot names it, without spaces and ~"),
    "venv": (re.compile(r"[^:\x00-\x1f]+"), "a folder whose name has no : and no line breaks"),
}
_ITEM_FORMS = {
    "mounts": (re.compile(r"[^\s,~][^\s,]*"), "SOURCE:TARGET without spaces, commas and ~"),
    "env": (re.compile(r"[A-Za-z_]\w*=[^\0]*", re.ASCII | re.DOTALL), "NAME=value"),
    "sbatch_lines": (
        re.compile(r"-[^\x00-\x1f\x7f]+"),
        "an option of sbatch such as --qos=high, in one line",
    ),
}


@dataclass(frozen=True)
class LaunchSettings:
    """A job of `megatron-fipo launch slurm`."""

    nodes: int = number(1, least=1)
    """Nodes of the job."""
    gpus_per_node: int = number(8, least=0)
    """GPUs of each node. 0 requests none, for nodes without GPUs and for a Slurm that does not count them."""
    cpus_per_node: int | None = number(None, least=1)
    """CPUs of each node; other jobs may then use the rest of it. null for complete nodes."""
    account: str | None = None
    """Account to charge."""
    partition: str | None = None
    """Partition; null for Slurm's default."""
    time: str | None = None
    """Time limit of one attempt, as for sbatch; null for the partition's."""
    exclude: str | None = None
    """Nodes not to use, such as `node[1-4],node7`."""
    job_name: str = "megatron-fipo"
    """Name of the job."""
    container: str | None = None
    """Container image for pyxis and enroot. null runs the commands without a container."""
    mounts: tuple[str, ...] = ()
    """Mounts of the container besides the current directory, each SOURCE:TARGET."""
    venv: str | None = file_path(None)
    """Virtual environment, without a container. null for the one in which this command runs."""
    env: tuple[str, ...] = ()
    """Environment variables, each NAME=value, in addition to those of the shell, which sbatch passes on."""
    sbatch_lines: tuple[str, ...] = ()
    """More options of sbatch, each one #SBATCH line such as `--qos=high`."""
    interface: str | None = None
    """Network interface of Ray, NCCL and gloo on each node; null for that of the route between the nodes."""
    preflight: bool = True
    """Check every node before the start."""
    retries: int = number(3, least=0)
    """Times in a row that the job is requeued without a new checkpoint."""
    start_timeout_s: int = number(600, least=1, most=86_400)
    """Seconds for each phase of the start: Ray on the first node, all nodes joined."""
    signal_notice_s: int | None = number(None, least=1, most=LONGEST_NOTICE_S)
    """Seconds before the time limit at which the run is asked to save its state and stop. null for twice the longest save
    and update of the run so far, and 600 for a new run."""

    def __post_init__(self) -> None:
        for key, (form, meaning) in _FORMS.items():
            value = getattr(self, key)
            if value is not None and not form.fullmatch(value):
                raise ValueError(f"{key} must be {meaning}, not {value!r}")
        for key, (form, meaning) in _ITEM_FORMS.items():
            for value in getattr(self, key):
                if not form.fullmatch(value):
                    raise ValueError(f"{key} must be {meaning}, not {value!r}")
        for variable in self.env:
            name, _, value = variable.partition("=")
            if is_secret(name) or has_password(value):
                raise ValueError(
                    f"env would write {name} into the script; export it in your shell instead, sbatch passes it on"
                )
        if self.container is not None and self.venv is not None:
            raise ValueError(
                "venv is not used in a container; remove it, or install the package in the image"
            )
        if self.mounts and self.container is None:
            raise ValueError("mounts are of a container; set container, or remove them")
