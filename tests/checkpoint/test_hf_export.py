"""The stream of Hugging Face tensors for weight sync matches its description and does not accumulate."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_fipo.checkpoint.convert.convert import to_hf, to_megatron
from megatron_fipo.checkpoint.hf_export import describe_hf_tensors, iterate_hf_tensors, save_hf
from megatron_fipo.checkpoint.manifest import hash_files, list_files, read_manifest, write_manifest
from megatron_fipo.checkpoint.model_folder import describe_export, open_model_folder
from megatron_fipo.checkpoint.random_weights import write_random_model
from megatron_fipo.config import ParallelConfig
from tests.checkpoint.conftest import no_progress
from tests.checkpoint.editing import EMBEDDING, HEAD, put, save_model, set_config, stored
from tests.model.reference import build, make_reference
from tests.ranks import run_ranks


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("to_host", [True, False])
def test_what_is_announced_on_every_rank_is_what_comes(tmp_path, tied, to_host):
    make_reference(tmp_path, tied, "qwen2")
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)

    def body(rank, world):
        chunks = build(tmp_path, parallel)
        announced = [(info.name, info.dtype, info.shape) for info in describe_hf_tensors(chunks)]
        received = [
            (name, None if tensor is None else (tensor.dtype, tuple(tensor.shape)))
            for name, tensor in iterate_hf_tensors(chunks, to_host=to_host)
        ]
        return announced, received

    (announced, received), *others = run_ranks(4, body)
    assert [(name, *described) for name, described in received] == announced
    for other_announced, other_received in others:
        assert other_announced == announced
        assert other_received == [(name, None) for name, _, _ in announced]


def test_a_later_stage_has_one_weight_on_its_way_at_a_time(tmp_path):
    """It must wait for a first stage that waits for engines, and not buffer all weights of its stage."""
    make_reference(tmp_path, False, "qwen2")
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)

    def body(rank, world):
        sent, in_flight, most = 0, 0, 0
        isend = dist.isend

        class Counted:
            def __init__(self, work):
                self.work = work

            def wait(self):
                nonlocal in_flight
                in_flight -= 1
                return self.work.wait()

        def counting(*args, **kwargs):
            nonlocal sent, in_flight, most
            sent += 1
            in_flight += 1
            most = max(most, in_flight)
            return Counted(isend(*args, **kwargs))

        dist.isend = counting
        for _ in iterate_hf_tensors(build(tmp_path, parallel)):
            pass
        return sent, most, in_flight

    first, second, third, fourth = run_ranks(4, body)
    assert first == second == fourth == (0, 0, 0)
    sent, most, left = third
    assert sent > 10
    assert (most, left) == (3, 0), "query, key and value are sent together"


# --- the config of an exported folder -----------------------------------------------------------------------

STALE = {
    "quantization_config": {"quant_method": "fp8"},
    "compression_config": {"format": "pack-quantized"},
    "transformers_weights": "old.safetensors",
}


@pytest.mark.parametrize(
    ("config", "names", "dtypes", "expected"),
    [
        ({"dtype": "float32"}, [HEAD], ["bfloat16"], {"dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, [HEAD], ["float32"], {"torch_dtype": "float32"}),
        (
            {"dtype": "bfloat16", "torch_dtype": "float16"},
            [HEAD],
            ["float32"],
            {"dtype": "float32", "torch_dtype": "float32"},
        ),
        ({}, [HEAD], ["bfloat16"], {"dtype": "bfloat16"}),
        ({"dtype": "bfloat16"}, [HEAD], ["float32", "bfloat16"], {"dtype": "bfloat16"}),
        ({"dtype": "float16"}, [HEAD], ["float32", "bfloat16"], {"dtype": "float32"}),
        ({"dtype": "float32", **STALE}, [HEAD], ["float32"], {"dtype": "float32"}),
        (
            {"dtype": "float32", "tie_word_embeddings": True, "vocab_size": 8},
            [HEAD],
            ["float32"],
            {"dtype": "float32", "vocab_size": 8},
        ),
        (
            {"dtype": "float32", "tie_word_embeddings": False},
            [EMBEDDING],
            ["float32"],
            {"dtype": "float32", "tie_word_embeddings": True},
        ),
    ],
)
def test_the_config_describes_what_was_written(config, names, dtypes, expected):
    found = describe_export(config, dict.fromkeys(names), dtypes)
    assert found == {"tie_word_embeddings": False} | expected


def by_training(source: Path, target: Path) -> None:
    run_ranks(1, lambda rank, world: save_hf(build(source, ParallelConfig(), "bfloat16"), source, target))


def by_conversion(source: Path, target: Path) -> None:
    to_megatron(source, target.parent / "converted", "bfloat16", no_progress)
    config = target.parent / "converted/hf/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **STALE}))
    converted = target.parent / "converted"
    manifest = read_manifest(converted)
    write_manifest(converted, hash_files(converted, list_files(converted)), manifest.info)
    to_hf(converted, target, "keep", no_progress)


def by_initialization(source: Path, target: Path) -> None:
    set_config(**STALE)(source)
    write_random_model(source, target, seed=0, dtype=torch.bfloat16)


@pytest.mark.parametrize("export", [by_training, by_conversion, by_initialization])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_can_be_read_in_one_way(tmp_path, export, tied):
    """Also if the folder that its config comes from has stale keys."""
    source = save_model(tmp_path / "source", tied=tied)
    if tied:
        put(HEAD, lambda tensors: tensors[EMBEDDING])(source)
    set_config(torch_dtype="float32", tie_word_embeddings=tied)(source)
    export(source, tmp_path / "target")
    config = json.loads((tmp_path / "target/config.json").read_text())
    assert not STALE.keys() & config.keys()
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert config["tie_word_embeddings"] is tied
    open_model_folder(tmp_path / "target")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype="auto")
    assert model.dtype is torch.bfloat16
    assert (HEAD in stored(tmp_path / "target")) is not tied
