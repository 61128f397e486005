import pytest

from megatron_fipo.node.preflight.facts import Gpu, Xid
from megatron_fipo.node.preflight.gpus import inspect_gpus, parse_kernel_log, parse_listing
from tests.node.fake_smi import HEALTHY, install_smi


def test_listing() -> None:
    text = "0, NVIDIA H100 80GB HBM3, 0, No, No\n7, NVIDIA H100 80GB HBM3, 3, Yes, No\n"
    assert parse_listing(text) == (
        Gpu(0, "NVIDIA H100 80GB HBM3", 0, False, False),
        Gpu(7, "NVIDIA H100 80GB HBM3", 3, True, False),
    )


def test_counters_that_a_gpu_lacks() -> None:
    assert parse_listing("0, NVIDIA L4, [N/A], [N/A], [N/A]") == (Gpu(0, "NVIDIA L4", None, None, None),)


@pytest.mark.parametrize("line", ["No devices were found", "0, NVIDIA L4", "Unable to determine, a, b, c, d"])
def test_a_line_that_lists_no_gpu_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match=line):
        parse_listing(line)


def test_hardware_errors_in_the_kernel_log() -> None:
    log = """\
[    1.000000] NVRM: loading NVIDIA UNIX x86_64 Kernel Module
[ 3600.500000] NVRM: Xid (PCI:0000:1b:00): 79, pid=1, GPU has fallen off the bus.
[ 7200.000000] NVRM: Xid (PCI:0000:43:00): 31, pid=77, name=python, Ch 00000001
[10800.000000] NVRM: Xid (0000:43:00): 48, pid=77, DBE
"""
    assert parse_kernel_log(log, 10800.0) == (Xid(79, "0000:1b:00", 2.0), Xid(48, "0000:43:00", 0.0))


def test_the_installed_tool_is_asked(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", install_smi(tmp_path, HEALTHY * 2), prepend=":")
    listed = inspect_gpus().listed
    assert listed is not None
    assert [gpu.name for gpu in listed] == ["NVIDIA H100 80GB HBM3"] * 2


def test_an_error_of_the_tool_is_kept(tmp_path, monkeypatch) -> None:
    lost = "Unable to determine the device handle for GPU0000:1B:00.0: GPU is lost."
    monkeypatch.setenv("PATH", install_smi(tmp_path, f"{lost}\n", code=15), prepend=":")
    found = inspect_gpus()
    assert found.listed is None
    assert found.smi_error == lost
