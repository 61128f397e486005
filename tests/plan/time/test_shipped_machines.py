import pytest

from megatron_fipo.plan.machine_file import load_machine, machine_names

COMPUTE = ("attention_forward", "attention_backward", "memory")


def test_the_shipped_machines():
    assert {"a100-80gb", "h100-80gb", "h200"} <= set(machine_names())


@pytest.mark.parametrize("name", ["a100-80gb", "h100-80gb"])
def test_rates_that_were_not_measured_say_so(name):
    machine = load_machine(name)
    assert not any(getattr(machine, figure).calibrated for figure in COMPUTE)


def test_the_h200_was_measured():
    machine = load_machine("h200")
    assert all(getattr(machine, figure).calibrated for figure in COMPUTE)
    assert not machine.node.rate.calibrated
    assert not machine.decode_weights.calibrated


def test_an_a100_has_no_fp8():
    assert set(load_machine("a100-80gb").products) == {"bfloat16"}


@pytest.mark.parametrize("name", ["a100-80gb", "h100-80gb", "h200"])
def test_no_rate_is_above_the_data_sheet(name):
    machine = load_machine(name)
    for precision, products in machine.products.items():
        assert products.rate.high < machine.peak * (2 if precision.startswith("fp8") else 1)
    assert machine.attention_backward.value < machine.attention_forward.value < machine.peak
