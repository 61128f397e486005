"""What `calibrate` measures on this CPU, in this process, for a tiny model: positive, and within what a CPU can do.

Here because compiling a layer and the engine start threads, after which a process cannot fork ranks.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megatron_fipo.calibrate import decode, layer, products, transfers
from megatron_fipo.calibrate.job import FIGURES, Job
from megatron_fipo.calibrate.measure import as_rank, main
from megatron_fipo.calibrate.messages import Device, Measured, Observed, Skipped
from megatron_fipo.calibrate.timing import LEAST_SAMPLES, timed
from megatron_fipo.config import save_config
from megatron_fipo.plan.case import Case
from tests.calibrate.tiny import save_tiny, tiny_case

CPU = torch.device("cpu")
MOST_FLOPS = 1e12
"""Of one core."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return folder


@pytest.fixture
def case(folder) -> Case:
    return tiny_case(folder)


def by_figure(messages) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {}
    for message in messages:
        if isinstance(message, Measured):
            found.setdefault(message.figure, []).append(message)
            assert len(message.seconds) >= LEAST_SAMPLES or message.figure in ("decode", "prefill", "disk")
            assert min(message.seconds) > 0
            assert all(feature > 0 for feature in message.features)
    return found


def test_products_of_every_shape_are_slower_than_the_core_can_be(case):
    found = by_figure(products.measure(case, CPU, 0.1))
    assert set(found) == {"products.float32", "decode_weights"}
    assert len({message.features[1] for message in found["products.float32"]}) > 1
    for message in found["products.float32"]:
        assert 1e6 < message.features[0] / message.point.median < MOST_FLOPS


def test_bfloat16_products_are_measured_too(folder):
    found = by_figure(products.measure(tiny_case(folder, "model.dtype=bfloat16"), CPU, 0.1))
    assert "products.bfloat16" in found


def test_fp8_is_skipped_with_the_reason():
    assert products.obstacle("float32") is None
    assert products.obstacle("fp8_blockwise") == "Transformer Engine is not installed"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_give_attention_host_time_and_themselves(folder, dtype):
    case = tiny_case(folder, f"model.dtype={dtype}")
    messages = list(layer.measure(case, CPU, 0.2))
    found = by_figure(messages)
    assert set(found) == {"attention_forward", "attention_backward", "layer_host", "layer"}
    for name in ("attention_forward", "attention_backward"):
        for message in found[name]:
            assert 1e5 < message.features[0] / message.point.median < MOST_FLOPS
    (host,), (complete,) = found["layer_host"], found["layer"]
    assert host.point.median < complete.point.median
    (reserved,) = [message for message in messages if isinstance(message, Observed)]
    assert 1e8 < reserved.value < 1e11
    assert not torch.distributed.is_initialized()


def test_copies_and_files_leave_nothing(tmp_path):
    found = by_figure([*transfers.measure(CPU, 0.2), *transfers.write_files(tmp_path, 0.2)])
    assert set(found) == {"memory", "host", "disk"}
    (memory,), (disk,) = found["memory"], found["disk"]
    assert 1e7 < memory.features[0] / memory.point.median < 2e12
    assert 1e5 < disk.features[0] / disk.point.median < 1e11
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(transfers, "FREE_SHARE", 0.0)
    assert list(transfers.write_files(tmp_path, 1.0)) == [
        Skipped("disk", f"{tmp_path} has too little free space")
    ]


def test_the_local_engine_decodes(case):
    found = by_figure(decode.measure(case, time.monotonic()))
    assert set(found) == {"decode", "prefill"}
    assert len(found["decode"]) >= 4
    for message in found["decode"]:
        steps, sequences, cached = message.features
        assert steps <= sequences <= cached


def test_a_part_that_fails_costs_its_figures_alone(folder, case, monkeypatch):
    def broken(*_):
        raise RuntimeError("a driver\nerror")
        yield

    job = job_of(case, folder, budget_s=1.0)
    monkeypatch.setattr(layer, "measure", broken)
    monkeypatch.setattr(transfers, "FILE_BYTES", 2**24)
    messages = list(as_rank(job, CPU))
    assert isinstance(messages[0], Device)
    assert messages[0].count == 0
    skipped = [message for message in messages if isinstance(message, Skipped)]
    assert skipped == [Skipped(figure, "a driver error") for figure in FIGURES["layer"]]
    assert {"memory", "disk", "products.float32"} < set(by_figure(messages))


def test_a_process_that_fails_ends_with_the_reason(folder, case, capfd, monkeypatch):
    job = job_of(case, folder / "absent", budget_s=1.0)
    monkeypatch.setattr("megatron_fipo.calibrate.measure.end_with", lambda parent: None)
    assert main("rank", json.dumps(asdict(job))) == 1
    assert "no configuration file" in capfd.readouterr().err


def job_of(case: Case, folder: Path, budget_s: float) -> Job:
    if folder.is_dir():
        save_config(case.config, folder / "config.yaml")
    return Job(str(folder), str(folder / "base.yaml"), str(folder), budget_s, 1, 0)


def test_timed_repeats_a_short_call_and_respects_its_budget():
    calls = []
    samples = timed(lambda: calls.append(sum(range(200))), CPU, 0.05)
    assert len(calls) > len(samples)
    assert len(timed(lambda: sum(range(2_000_000)), CPU, 0.0)) == LEAST_SAMPLES
