"""Randomly initialized model folders."""

from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from megatron_fipo.checkpoint.random_weights import write_random_model
from tests.model.reference import make_reference


def test_weights_may_be_read_by_whoever_may_read_other_new_files(tmp_path):
    (tmp_path / "new").touch()
    make_reference(tmp_path / "source")
    write_random_model(tmp_path / "source", tmp_path / "model", seed=1)
    assert (tmp_path / "model/model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_random_model_is_reproducible_and_loads_in_transformers(tmp_path):
    make_reference(tmp_path / "source")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_model(tmp_path / "source", tmp_path / name, seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(a[name], c[name])
    assert not torch.equal(a[name], a["model.layers.1.mlp.gate_proj.weight"])
    assert abs(a[name].std() - 0.02) < 0.001
    loaded: Any = Qwen2ForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    model, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
