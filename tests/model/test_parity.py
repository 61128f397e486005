"""Models built by this package compute the logits of transformers, in every parallel layout."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.config import ParallelConfig
from tests.model.reference import build, gather_logits, logits_of_rank, make_reference, pack, sequences
from tests.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "tp2_sp_cp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "dp2_ep2": {"data_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp2_sp_ep2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
    },
    "tp2_sp_etp2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_tensor_parallel_size": 2,
    },
    "pp2_cp2_ep2": {
        "pipeline_model_parallel_size": 2,
        "context_parallel_size": 2,
        "expert_model_parallel_size": 2,
    },
    "dp4_ep4": {"data_parallel_size": 4, "expert_model_parallel_size": 4},
}
DENSE_LAYOUTS = tuple(name for name in LAYOUTS if "ep" not in name and "etp" not in name)


OTHER_LAYOUTS = ("one", "tp2", "tp2_sp", "pp2")
"""For the families that differ from Qwen2 only in their table: the layouts that depend on its entries."""
CASES = [
    *(("qwen2", tied, layout) for tied in ("untied", "tied") for layout in DENSE_LAYOUTS),
    *((family, "untied", layout) for family in ("qwen3", "llama") for layout in OTHER_LAYOUTS),
    *((family, "tied", layout) for family in ("qwen3", "llama") for layout in ("one", "pp2")),
    *(
        ("qwen3_moe", "untied", layout)
        for layout in LAYOUTS
        if not layout.startswith("tp2") or "sp" in layout
    ),
    *(("qwen3_moe-mixed", "untied", layout) for layout in ("one", "pp2_vpp2", "tp2_sp_ep2", "pp2_cp2_ep2")),
]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """By family and tied embeddings: the model's folder and transformers' logits of each sequence alone."""

    @cache
    def make(family: str, tied: str) -> tuple[Path, torch.Tensor]:
        folder = tmp_path_factory.mktemp(f"{family}-{tied}")
        model = make_reference(folder, tied == "tied", family)
        with torch.no_grad():
            return folder, torch.cat([model(sequence[None]).logits[0] for sequence in sequences()])

    return make


@pytest.fixture(scope="module", params=["untied", "tied"])
def reference(request, references):
    return references("qwen2", request.param)


@pytest.mark.parametrize(("family", "tied", "layout"), CASES)
def test_packed_logits_equal_those_of_transformers_on_single_sequences(references, family, tied, layout):
    folder, expected = references(family, tied)
    parallel = ParallelConfig(**LAYOUTS[layout])
    results = run_ranks(parallel.world_size, lambda rank, world: logits_of_rank(folder, parallel))
    # All data-parallel ranks have the same sequences.
    results = results[: parallel.world_size // parallel.data_parallel_size]
    logits = gather_logits(results, parallel.tensor_model_parallel_size)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_close(reference):
    folder, expected = reference
    (result,) = run_ranks(1, lambda rank, world: logits_of_rank(folder, ParallelConfig(), "bfloat16"))
    error = (gather_logits([result], 1) - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.03


def gradients(folder, recompute: str) -> dict[str, torch.Tensor | None]:
    """By parameter: the gradient of the mean squared logit on this rank."""
    parallel = ParallelConfig(context_parallel_size=2)
    (chunk,) = build(folder, parallel, recompute=recompute)
    input_ids, packed, _ = pack(parallel)
    logits = chunk(input_ids=input_ids, position_ids=None, attention_mask=None, packed_seq_params=packed)
    logits.square().mean().backward()
    return {name: parameter.grad for name, parameter in chunk.named_parameters()}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(reference, recompute):
    folder, _ = reference
    expected = run_ranks(2, lambda rank, world: gradients(folder, "none"))
    found = run_ranks(2, lambda rank, world: gradients(folder, recompute))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
