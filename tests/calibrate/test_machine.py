"""A machine is made of what was measured; the rest is another machine's, with the reason."""

from dataclasses import replace

import pytest

from megatron_fipo.calibrate.machine import Found, assemble, inverse
from megatron_fipo.calibrate.messages import (
    Device,
    Measured,
    Message,
    Observed,
    Skipped,
    as_line,
    from_line,
)
from megatron_fipo.calibrate.render import figures, quantity
from megatron_fipo.plan.machine import Machine
from megatron_fipo.plan.machine_file import load_machine, save_machine
from megatron_fipo.plan.time.engine import decode_step
from tests.calibrate.test_shapes import countdown
from tests.plan.machines import MACHINE

H100 = Device("NVIDIA H100 80GB HBM3", 4, 80 * 2**30)
CPU = Device("cpu", 0, 64 * 2**30)
UNKNOWN_GPU = Device("NVIDIA Z9", 1, 2**30)


def once(figure: str, *features: float, seconds: float) -> Measured:
    return Measured(figure, features, (seconds, seconds, seconds))


def result(*messages: Message, failures: dict[str, str] | None = None, case=None):
    return assemble(
        case or countdown("model.dtype=bfloat16"), "mine", 4, 2**40, "here", Found(messages, failures or {})
    )


def test_measured_figures_replace_those_of_the_base():
    found = result(
        H100,
        once("products.bfloat16", 6e14, 1024.0, seconds=1.5),
        once("products.bfloat16", 6e14, 512.0, seconds=2.0),
        once("attention_forward", 3e14, seconds=1.0),
        once("memory", 2e12, seconds=0.5),
        once("layer_host", 2.0, seconds=0.004),
        once("node", 6.0, 1e3, seconds=6e-5),
        once("node", 6.0, 3e11, seconds=1.0 + 6e-5),
        Observed("reserved_bytes", 3e9),
    )
    machine = found.machine
    assert (machine.name, machine.device, machine.devices_per_node) == ("mine", H100.name, 4)
    assert (machine.device_bytes, machine.host_bytes, machine.peak) == (80 * 2**30, 2**40, 989e12)
    assert machine.products["bfloat16"].half == pytest.approx(512)
    assert machine.products["bfloat16"].rate.value == pytest.approx(6e14)
    assert machine.attention_forward.value == pytest.approx(3e14)
    assert machine.memory.value == pytest.approx(4e12)
    assert machine.layer_host.value == pytest.approx(0.002)
    assert machine.node.rate.value == pytest.approx(3e11, rel=1e-3)
    assert machine.node.latency.value == pytest.approx(1e-5, rel=1e-3)
    assert machine.reserved_bytes.value == 3e9
    assert machine.memory.source == "a copy, here"
    measured = {name for name, figure in figures(machine) if figure.calibrated}
    assert measured == {
        "products.bfloat16", "attention_forward", "memory", "layer_host", "node.rate", "node.latency", "reserved_bytes",
    }  # fmt: skip


def test_what_was_not_measured_is_the_base_s_and_says_why(tmp_path):
    found = result(
        H100, Skipped("disk", "the folder is full"), failures={"network": "one node", "decode": "no vLLM"}
    )
    machine = found.machine
    assert machine.disk.value == MACHINE.disk.value
    assert not machine.disk.calibrated
    assert machine.disk.source == "machine test (a test), not measured here: the folder is full"
    assert found.reasons["disk"] == "the folder is full"
    assert found.reasons["network"] == "one node"
    assert found.reasons["memory"] == "it was not measured"
    assert not machine.network.latency.calibrated
    assert not machine.products["fp8_blockwise"].rate.calibrated
    assert "float32" not in machine.products
    save_machine(machine, tmp_path / "mine.yaml")
    assert load_machine(str(tmp_path / "mine.yaml")) == machine


def test_decoding_is_the_base_s_if_its_engine_or_its_weights_were_not_measured():
    engine_alone = once("decode", 32.0, 320.0, 3200.0, seconds=1.0)
    for message in (engine_alone, once("decode_weights", 1e6, seconds=1e-3)):
        machine = result(H100, message).machine
        for name in ("decode_weights", "decode_cache", "decode_step", "decode_sequence"):
            assert getattr(machine, name).value == getattr(MACHINE, name).value
            assert not getattr(machine, name).calibrated


def test_decoding_predicts_the_steps_that_it_was_fitted_on():
    case = countdown()
    truth = replace(case, machine=cpu_machine())
    messages: list[Message] = [CPU, *products("float32", 5e10)]
    weights = truth.machine.decode_weights.value
    messages.append(once("decode_weights", weights, seconds=1.0))
    for sequences in (4.0, 40.0, 400.0):
        for length in (20.0, 100.0):
            cached = sequences * length
            step = decode_step(truth, sequences, cached).value
            messages.append(once("decode", 30.0, 30 * sequences, 30 * cached, seconds=30 * step))
    machine = result(*messages, case=case).machine
    for sequences, cached in ((10.0, 500.0), (300.0, 20_000.0)):
        predicted = decode_step(replace(case, machine=machine), sequences, cached).value
        assert predicted == pytest.approx(decode_step(truth, sequences, cached).value, rel=0.02)


def cpu_machine() -> Machine:
    """Without a trace of an H100 in what a decoding step takes."""
    figure = MACHINE.memory

    def of(value: float):
        return replace(figure, value=value, low=value, high=value)

    rate = replace(MACHINE.products["bfloat16"], rate=of(5e10))
    return replace(
        MACHINE,
        products={"float32": rate},
        decode_weights=of(8e9),
        decode_cache=of(2e9),
        decode_step=of(3e-3),
        decode_sequence=of(4e-5),
    )


def products(precision: str, rate: float) -> list[Message]:
    return [
        once(f"products.{precision}", 1e9, side, seconds=1e9 / rate * (1 + 32 / side))
        for side in (32.0, 64.0, 128.0)
    ]


def test_on_a_cpu_memory_makes_a_layer_as_long_as_it_was():
    """Slower than a copy: the layer takes longer than its products and its attention."""
    messages = [
        CPU,
        *products("float32", 5e10),
        once("memory", 1e10, seconds=1.0),
        once("attention_forward", 1e10, seconds=1.0),
        once("attention_backward", 1e10, seconds=1.0),
    ]
    quick, slow = (
        result(*messages, once("layer", 7680.0, 3e5, 2.0, seconds=seconds), case=countdown()).machine
        for seconds in (0.8, 1.6)
    )
    assert slow.memory.value < quick.memory.value < 1e10
    assert slow.memory.low <= slow.memory.value <= slow.memory.high
    assert "between the products" in slow.memory.source
    assert quick.device_bytes == 16 * 2**30
    assert quick.peak == pytest.approx(5e10 * 128 / 160)  # the fastest product


def test_a_gpu_without_a_data_sheet_has_its_fastest_product_as_peak():
    assert result(UNKNOWN_GPU, once("products.bfloat16", 5e14, 512.0, seconds=1.0)).machine.peak == 5e14


def test_inverse_finds_the_value_or_the_nearer_end():
    assert inverse(lambda x: 10 / x, 2.0, 0.1, 100.0) == pytest.approx(5.0)
    assert inverse(lambda x: 10 / x, 1e-9, 0.1, 100.0) == pytest.approx(100.0)
    assert inverse(lambda x: 10 / x, 1e9, 0.1, 100.0) == pytest.approx(0.1)


def test_messages_survive_their_lines():
    for message in (
        H100,
        once("node", 6.0, 1e3, seconds=6e-5),
        Skipped("disk", "full"),
        Observed("reserved_bytes", 3e9),
    ):
        assert from_line(as_line(message)) == message


def test_quantities_have_units():
    assert quantity(4.213e12, "memory") == "4.21 TB/s"
    assert quantity(7.5e14, "products.bfloat16") == "750 TFLOP/s"
    assert quantity(1.2e-5, "node.latency") == "12 µs"
    assert quantity(0.05, "fragmentation") == "0.05"
