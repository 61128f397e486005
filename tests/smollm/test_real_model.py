"""SmolLM2-135M-Instruct on Megatron-Core: logits of transformers, bits after conversion, its template, and equal FIPO steps."""

from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_fipo.batching.packing import plan_micro_batches
from megatron_fipo.batching.shard import build_shard
from megatron_fipo.checkpoint.convert.convert import to_hf, to_megatron
from megatron_fipo.config import ParallelConfig
from megatron_fipo.driver.sft_data import imitated
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.trainer.rank_model import RankModel
from tests.checkpoint.conftest import no_progress
from tests.distributed.tiny import settings
from tests.model.reference import build
from tests.ranks import run_ranks
from tests.smollm.real_model import FOLDER, needs_smollm, prompts, rows, tokenizer

pytestmark = [needs_smollm, pytest.mark.slow, pytest.mark.timeout(1800)]


def reference_logits(dtype: torch.dtype) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].float() for ids in prompts(2)]


def packed_logits(rank: int, world_size: int, dtype: str) -> torch.Tensor:
    """Logits [tokens, vocabulary] of the prompts in one pack."""
    (chunk,) = build(FOLDER, ParallelConfig(), dtype)
    lengths = torch.tensor([len(ids) for ids in prompts(2)])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    with torch.no_grad():
        output = chunk(
            input_ids=torch.tensor([[token for ids in prompts(2) for token in ids]]),
            position_ids=None,
            attention_mask=None,
            packed_seq_params=PackedSeqParams("thd", bounds, bounds, bounds, bounds, longest, longest),
        )
    return output[0].float()


def test_logits_in_float32_equal_those_of_transformers():
    (found,) = run_ranks(1, packed_logits, "float32")
    expected = torch.cat(reference_logits(torch.float32))
    assert expected.abs().max() > 10
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-4)


def test_logits_in_bfloat16_are_as_close_to_float32_as_those_of_transformers():
    (found,) = run_ranks(1, packed_logits, "bfloat16")
    exact = torch.cat(reference_logits(torch.float32))
    theirs = torch.cat(reference_logits(torch.bfloat16))

    def error(logits: torch.Tensor) -> float:
        return float((logits - exact).norm() / exact.norm())

    assert 1e-4 < error(found) < 1.5 * error(theirs)
    agreeing = (found.argmax(-1) == exact.argmax(-1)).float().mean()
    assert agreeing > 0.95


def test_conversion_to_megatron_and_back_keeps_every_bit(tmp_path: Path):
    assert to_megatron(FOLDER, tmp_path / "checkpoint", "keep", no_progress).rounded == set()
    to_hf(tmp_path / "checkpoint", tmp_path / "back", "keep", no_progress)
    found, expected = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (tmp_path / "back", FOLDER)
    )
    assert found.keys() == expected.keys()
    assert len(found) == 272
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype is torch.bfloat16
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def test_prompts_are_those_that_transformers_renders():
    for row, ids in zip(rows(8), prompts(8), strict=True):
        rendered = tokenizer().apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True
        )
        assert list(ids) == rendered["input_ids"]


LAYOUTS = {
    "1": ParallelConfig(),
    "tp3": ParallelConfig(tensor_model_parallel_size=3),
    "cp2": ParallelConfig(context_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
}
FIPO = ObjectiveConfig(half_life=32.0, influence_clip=(0.8, 1.2), safety_threshold=3.0)


def responses():
    """Written solutions, every other one with a wrong answer and a negative advantage."""
    encode = tokenizer()
    made = []
    for index, (row, prompt) in enumerate(zip(rows(8), prompts(8), strict=True)):
        text = row["response"] + ("0" if index % 2 else "")
        ids = [*encode(text, add_special_tokens=False)["input_ids"], encode.eos_token_id]
        response = imitated(str(index), prompt, ids)
        response.advantage = -1.0 if index % 2 else 1.0
        made.append(response)
    return made


def iteration(rank: int, world_size: int, parallel: ParallelConfig) -> list[dict[str, float]]:
    """Old log-probs, then two mini-steps, as an iteration: the statistics of both steps."""
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    policy = RankModel(
        **settings(FOLDER, parallel, lr=1e-5) | {"temperature": 1.0}, device=torch.device("cpu")
    )
    policy.load_hf(FOLDER)
    made = responses()
    results = []
    mini_batches = [_shards(made[:4], parallel), _shards(made[4:], parallel)]
    scored = []
    for shards in mini_batches:
        old = policy.log_probs(shards)
        last = policy.is_last_stage
        scored.append(
            [shard.with_old_log_probs(values) for shard, values in zip(shards, old, strict=True)]
            if last
            else shards
        )
    for shards in scored:
        result = policy.policy_step(shards, FIPO, lr=1e-5)
        results.append(result.statistics | {"grad_norm": result.grad_norm})
    return results


def _shards(made, parallel: ParallelConfig):
    plan = plan_micro_batches(
        [response.length for response in made],
        data_parallel_size=1,
        token_budget=512,
        length_multiple=parallel.length_multiple,
    )
    return [
        build_shard(
            [made[index] for index in members],
            context_parallel_size=parallel.context_parallel_size,
            context_parallel_rank=parallel_state.get_context_parallel_rank(),
            length_multiple=parallel.length_multiple,
            pad_token_id=0,
            max_position=8192,
        )
        for members in plan[0]
    ]


@pytest.fixture(scope="module")
def alone():
    (results,) = run_ranks(1, iteration, LAYOUTS["1"], timeout_s=900)
    assert results[1]["policy/sigma_log_ratio"] > 1e-3  # the first step changed the policy
    return results


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1"])
def test_an_iteration_has_the_same_loss_in_every_layout(alone, layout):
    parallel = LAYOUTS[layout]
    ranks = run_ranks(parallel.world_size, iteration, parallel, timeout_s=1200)
    reporting = [results for results in ranks if "policy/loss" in results[0]]
    assert reporting
    for results in reporting:
        for found, expected in zip(results, alone, strict=True):
            assert found["policy/loss"] == pytest.approx(expected["policy/loss"], abs=1e-4)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert results[0]["policy/sigma_log_ratio"] == 0.0
