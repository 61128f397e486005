"""The driver of NVIDIA's GPUs as the kernel, or else nvidia-smi, reports it."""

from pathlib import Path

import pytest
import torch

from megatron_fipo.environment import Driver, find_accelerators, find_cards, find_driver, this_machine

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (dvs-builder)\nGCC version: 12.3.0\n"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"


def install_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    ("text", "version"), [(OPEN, "580.159.04"), (CLOSED, "535.104.05"), ("?", "unknown version")]
)
def test_the_kernels_driver(tmp_path, text, version):
    (tmp_path / "version").write_text(text, encoding="utf-8")
    assert find_driver(tmp_path) is None, "no GPU"
    for gpu in ("0000:1b:00.0", "0000:43:00.0"):
        (tmp_path / "gpus" / gpu).mkdir(parents=True)
    assert find_driver(tmp_path) == Driver(version, 2)


def test_nvidia_smi_is_asked_where_the_kernel_shows_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_driver(tmp_path / "absent") is None
    install_smi(tmp_path, "printf '535.104.05\\n535.104.05\\n'", monkeypatch)
    assert find_driver(tmp_path / "absent") == Driver("535.104.05", 2)
    install_smi(tmp_path, "echo No devices were found", monkeypatch)
    assert find_driver(tmp_path / "absent") is None
    install_smi(tmp_path, "echo NVIDIA-SMI has failed; exit 9", monkeypatch)
    assert find_driver(tmp_path / "absent") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of this machine is in use")
@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, Driver("535.104.05", 1)),
        ("0", Driver("535.104.05", 1)),
        ("", None),
        ("-1", None),
        ("NoDevFiles", None),
    ],
)
def test_a_driver_is_unused_unless_its_gpus_are_hidden(visible, found, tmp_path, monkeypatch):
    install_smi(tmp_path, "echo 535.104.05", monkeypatch)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_accelerators().unused_driver == found
    assert find_cards() == ()
    assert this_machine().gpus == 0
