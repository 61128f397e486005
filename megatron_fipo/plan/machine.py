"""A machine as the planner sees it: sizes from the data sheet, and rates that were measured.

A machine is a YAML file (`machine_file.py`). Those in `machines/` are shipped; `megatron-fipo calibrate` writes one for the
machine at hand. *Device* is a GPU, or all cores of a rank where there is none. Rates are per device and per direction.
"""

from dataclasses import dataclass

from megatron_fipo.plan.estimate import Estimate

DEFAULT_MACHINE = "h100-80gb"
"""Its figures stand in for a GPU of which no machine is shipped."""

PRECISIONS = ("bfloat16", "float32", "fp8_blockwise", "fp8_tensorwise")
"""Of matrix products."""


@dataclass(frozen=True)
class Figure:
    """A rate or a time of a machine; `0 < low <= value <= high`."""

    value: float
    low: float
    high: float
    source: str
    """What it was measured on, or the reason for an assumption."""
    calibrated: bool = True
    """Whether `source` is a measurement of this kind of machine."""

    def times(self, amount: float, name: str) -> Estimate:
        """`amount` times the figure. `name` is reported if it is not calibrated."""
        return Estimate(amount * self.value, amount * self.low, amount * self.high, *self._basis(name))

    def seconds(self, amount: float, name: str) -> Estimate:
        """The time that `amount` (operations, bytes) takes at this rate."""
        return Estimate(amount / self.value, amount / self.high, amount / self.low, *self._basis(name))

    def _basis(self, name: str) -> tuple[frozenset[str], frozenset[str]]:
        known, unknown = frozenset({self.source}), frozenset({name})
        return (known, frozenset()) if self.calibrated else (frozenset(), unknown)


@dataclass(frozen=True)
class Link:
    """A way for bytes to leave or reach a device."""

    rate: Figure
    """Bytes per second. For collectives the bus bandwidth: a ring's bytes per rank and second."""
    latency: Figure
    """Seconds that a message of no bytes takes, per step of a ring."""


@dataclass(frozen=True)
class Products:
    """Matrix products in one precision. A product [m, k] × [k, n] runs at rate · s / (s + half), s = min(k, n)."""

    rate: Figure
    """Operations per second of products without a short side."""
    half: float
    """Features of the shorter side of the weight at which half the rate is reached."""


@dataclass(frozen=True)
class Machine:
    """One kind of node, and the network between many of them."""

    name: str
    device: str
    """As CUDA reports it, such as "NVIDIA H200"; "cpu" without a GPU."""
    devices_per_node: int
    device_bytes: int
    """Memory of a device."""
    host_bytes: int
    """Memory of a node."""
    peak: float
    """Dense operations per second in bfloat16 by the data sheet (float32 for "cpu"): what MFU refers to."""
    products: dict[str, Products]
    """By precision, of `PRECISIONS`; those that the machine has."""
    attention_forward: Figure
    """Operations per second of causal attention: 4 · heads · head size for each pair of a query and a key that it sees."""
    attention_backward: Figure
    """The same; a pair counts twice the operations of forward."""
    memory: Figure
    """Bytes per second, read or written, of operations between the products."""
    layer_host: Figure
    """Seconds in which the host starts a layer's kernels, forward and backward, for one micro-batch."""
    node: Link
    """Between the devices of a node."""
    network: Link
    """Between nodes, per device."""
    host: Link
    """Between a device and its host memory."""
    disk: Figure
    """Bytes per second that a node writes to the file system of checkpoints."""
    decode_weights: Figure
    """Bytes per second at which a decoding step reads weights."""
    decode_cache: Figure
    """Bytes per second at which a decoding step reads keys and values."""
    decode_step: Figure
    """Seconds of a decoding step in addition."""
    decode_sequence: Figure
    """Seconds of a decoding step in addition, per sequence: sampling and scheduling."""
    prefill: Figure
    """Operations per second of a rollout engine's prefill."""
    reserved_bytes: Figure
    """Bytes of a device that CUDA, NCCL and libraries take in a trainer rank."""
    fragmentation: Figure
    """Share of a rank's tensors that the allocator holds in addition."""

    @property
    def on_cpu(self) -> bool:
        """Whether it has no GPU."""
        return self.device == "cpu"

    @property
    def unit(self) -> str:
        """What a device is called."""
        return "core" if self.on_cpu else "GPU"
