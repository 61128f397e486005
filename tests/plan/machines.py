"""A machine for tests, with numbers of the order of an H100."""

from dataclasses import replace
from typing import Any

from megatron_fipo.plan.machine import Figure, Link, Machine, Products


def figure(value: float, spread: float = 0.1, source: str = "a test") -> Figure:
    return Figure(value, value * (1 - spread), value * (1 + spread), source)


def link(rate: float) -> Link:
    return Link(figure(rate), figure(1e-5))


MACHINE = Machine(
    name="test",
    device="NVIDIA H100 80GB HBM3",
    devices_per_node=8,
    device_bytes=80 * 2**30,
    host_bytes=2**40,
    peak=989e12,
    products={
        "bfloat16": Products(figure(750e12), 400.0),
        "fp8_blockwise": Products(replace(figure(1100e12), calibrated=False), 900.0),
    },
    attention_forward=figure(400e12),
    attention_backward=figure(300e12),
    memory=figure(3e12),
    layer_host=figure(1e-3),
    node=link(300e9),
    network=link(40e9),
    host=link(50e9),
    disk=figure(2e9),
    decode_weights=figure(2.5e12),
    decode_cache=figure(2e12),
    decode_step=figure(2e-3),
    decode_sequence=figure(5e-6),
    prefill=figure(400e12),
    reserved_bytes=figure(2 * 2**30),
    fragmentation=figure(0.05),
)


def toy_machine(**changes: Any) -> Machine:
    """`MACHINE` with other values of some fields."""
    return replace(MACHINE, **changes)


def cpu_machine(**changes: Any) -> Machine:
    """A node without GPUs, with one rank."""
    products = {"float32": Products(figure(5e10), 100.0)}
    cpu = {"device": "cpu", "devices_per_node": 1, "peak": 1e11, "products": products}
    return toy_machine(**(cpu | changes))
