"""The command on this machine: a file that loads, one sentence for what is refused, and nothing left after Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_fipo.cli.main import main
from megatron_fipo.plan.machine_file import load_machine
from tests.calibrate.tiny import RECIPE, overrides, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    save_tiny(folder)
    return folder


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    base = ["--base", str(folder / "base.yaml"), "--output", str(folder / output)]
    return ["calibrate", str(RECIPE), *base, *overrides(folder), *more]


def start(folder: Path, output: str, *more: str) -> subprocess.Popen:
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_fipo.cli", *arguments(folder, output, *more)],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background shell starts its commands with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_the_command_measures_this_machine(folder):
    process = start(folder, "files/cpu.yaml")
    output, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    assert errors.count("measuring:") == 3
    machine = load_machine(str(folder / "files/cpu.yaml"))
    assert (machine.name, machine.device, machine.devices_per_node) == ("cpu", "cpu", 2)
    assert set(machine.products) == {"float32"}
    assert machine.products["float32"].rate.calibrated
    assert 1e8 < machine.products["float32"].rate.value < 1e12
    assert 1e7 < machine.memory.value < 1e12
    assert machine.layer_host.value < 10
    assert not machine.network.rate.calibrated
    assert "several nodes" in machine.network.rate.source
    assert output.count("Not measured: ") >= 2
    assert f"wrote {folder / 'files/cpu.yaml'}" in output
    assert not (folder / "runs").exists()
    assert list((folder / "temporary").iterdir()) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_command_leaves_no_process_and_no_half_file(folder, sent):
    process = start(folder, "interrupted.yaml")
    assert process.stderr is not None
    assert "measuring: copies" in process.stderr.readline()
    child = _child(process.pid)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -9)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()
    assert list(folder.glob("*interrupted*")) == []
    if sent == signal.SIGINT:
        assert list((folder / "temporary").iterdir()) == []


def _child(parent: int) -> psutil.Process:
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(parent).children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return children[0]


@pytest.mark.parametrize(
    ("output", "more", "part"),
    [
        ("base.yaml/x", [], "--output"),
        ("model", [], "is a folder; give the name of a file"),
        ("x.yaml", ["model.path=nowhere"], "no model folder nowhere"),
        ("x.yaml", ["optimizer.lr=fast"], "optimizer.lr"),
        ("x.yaml", ["paralel.data_parallel_size=2"], "did you mean"),
        ("x.yaml", ["parallel.tensor_model_parallel_size=3"], "tensor_model_parallel_size"),
        ("x.yaml", ["--base", "h100-80bg"], "there is no machine 'h100-80bg'"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_measured(
    folder, capsys, monkeypatch, output, more, part
):
    monkeypatch.setattr("megatron_fipo.calibrate.run.calibrate", lambda *_: pytest.fail("it measured"))
    assert main(arguments(folder, output, *more)) == 2
    sentence = capsys.readouterr().err.strip()
    assert part in sentence
    assert "\n" not in sentence


def test_a_missing_configuration_is_refused(capsys):
    assert main(["calibrate", "nowhere.yaml"]) == 2
    assert "no configuration file nowhere.yaml" in capsys.readouterr().err


def test_help_says_what_is_measured_and_where_it_goes(capsys):
    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    text = capsys.readouterr().out
    for word in ("CONFIG", "--output FILE", "--base MACHINE", "calibrated: false", "machine.yaml"):
        assert word in text
