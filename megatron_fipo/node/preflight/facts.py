"""What was measured, as data. Nodes exchange it as JSON, which runs no code when it is read."""

import dataclasses
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from megatron_fipo.environment import Accelerators


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it. None: this GPU does not report the counter."""

    index: int
    name: str
    uncorrected_ecc: int | None
    """Uncorrected memory errors since the driver was loaded."""
    remap_pending: bool | None
    """Whether rows of its memory wait for a reset of the GPU to be remapped."""
    remap_failed: bool | None


@dataclass(frozen=True)
class Xid:
    """A hardware error of a GPU in the kernel log."""

    code: int
    device: str
    """PCI address."""
    hours_ago: float


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a node."""

    by_torch: tuple[str, ...]
    """Names of the devices that torch sees."""
    listed: tuple[Gpu, ...] | None
    """What nvidia-smi lists; None without nvidia-smi, or if it failed."""
    smi_error: str | None
    xids: tuple[Xid, ...] | None
    """None if the kernel log cannot be read."""
    accelerators: Accelerators | None = None
    """The same devices in more detail, and the packages for them."""


@dataclass(frozen=True)
class Product:
    """A matrix product on one device, compared with the exact result."""

    device: str
    elements: int
    nan: int
    wrong: int
    """Elements that differ from the exact result, NaN included."""
    tflop_per_s: float


@dataclass(frozen=True)
class Space:
    """Free space of a folder."""

    path: str
    free_gib: float


@dataclass(frozen=True)
class ProcessLimits:
    """What the job's processes may use. None: unlimited."""

    open_files: int | None
    open_files_most: int | None
    """The hard limit, to which the job may raise `open_files`."""
    locked_memory_gib: float | None
    rdma_devices: tuple[str, ...]


@dataclass(frozen=True)
class NodeFacts:
    """What one node measured on its own. A check that gave no result is None, and `failures` gives the reason."""

    gpus: Gpus | None = None
    products: tuple[Product, ...] | None = None
    space: tuple[Space, ...] | None = None
    limits: ProcessLimits | None = None
    versions: dict[str, str] | None = None
    """By package: its version, or "absent"."""
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Link:
    """An exchange of one GPU (or CPU process) of node `a` with that of the same local rank of node `b`, as one end saw it."""

    a: str
    b: str
    local_rank: int
    gb_per_s: float | None
    """Bytes sent per second, in 1e9, while as many arrive. None if the exchange failed."""
    error: str | None = None


@dataclass(frozen=True)
class ClockOffset:
    """How far a node's clock is ahead of the head's."""

    node: str
    seconds: float
    uncertainty: float
    """Half of the shortest round trip, in seconds."""


@dataclass(frozen=True)
class NetworkFacts:
    """What the processes of one node measured together with other nodes."""

    links: tuple[Link, ...] = ()
    clocks: tuple[ClockOffset, ...] = ()
    all_reduce_gb_per_s: float | None = None
    failure: str | None = None
    """Why the exchanges ended early."""


@dataclass(frozen=True)
class Measurements:
    """Everything that the head knows."""

    head: str
    names: tuple[str, ...]
    """All nodes of the allocation, in the order of their ranks."""
    nodes: dict[str, NodeFacts]
    """By name; a node that did not answer is absent."""
    network: dict[str, NetworkFacts]
    """By name; a node that did not answer any more is absent."""
    shared_folder: str | None
    canary: dict[str, str | None]
    """By name: None if the node and the head read each other's file in the shared folder, else what happened."""
    seconds: float = 0.0

    @property
    def has_gpus(self) -> bool:
        """Whether a node has a GPU."""
        return any(facts.gpus and (facts.gpus.by_torch or facts.gpus.listed) for facts in self.nodes.values())

    @property
    def between_gpus(self) -> bool:
        """Whether the exchanges were between GPUs: all nodes have some."""
        return all(facts.gpus and facts.gpus.by_torch for facts in self.nodes.values())


@dataclass(frozen=True)
class Fault:
    """Something that keeps the job from running well."""

    nodes: tuple[str, ...]
    check: str
    sentence: str
    """Names the node, what was measured, the threshold and the fix."""
    exclude: bool = True
    """Whether the job can run without these nodes; False if the fault lies in the set-up of all."""


def to_json(facts: Any) -> Any:
    """The facts as JSON values."""
    return dataclasses.asdict(facts)


def from_json(kind: Any, data: Any) -> Any:
    """The inverse of `to_json` for a value of type `kind`. Raises TypeError if the data do not fit the type."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: from_json(hints[name], value) for name, value in dict(data).items()})
    if isinstance(kind, UnionType):
        if data is None:
            return None
        return from_json(next(part for part in get_args(kind) if part is not type(None)), data)
    if get_origin(kind) is tuple:
        return tuple(from_json(get_args(kind)[0], value) for value in data)
    if get_origin(kind) is dict:
        return {str(key): from_json(get_args(kind)[1], value) for key, value in data.items()}
    if not isinstance(data, (int, float) if kind is float else kind):
        raise TypeError(f"{data!r} is not of type {kind}")
    return data
