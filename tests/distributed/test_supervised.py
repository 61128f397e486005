"""Supervised steps: the loss and every gradient are those of the response tokens alone, in every kind of layout."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
from megatron.core import parallel_state

from megatron_fipo.batching.packing import plan_micro_batches
from megatron_fipo.batching.shard import build_shard
from megatron_fipo.config import ParallelConfig
from megatron_fipo.driver.sft_data import imitated
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.trainer.rank_model import RankModel
from tests.distributed.test_policy_grid import exported, hf_log_probs, hf_model, relative_error
from tests.distributed.tiny import make_trajectories, settings, write_model
from tests.ranks import run_ranks

LAYOUTS = {
    "1": ParallelConfig(),
    "tp2-sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "cp2-dp2": ParallelConfig(context_parallel_size=2, data_parallel_size=2),
}


def examples():
    return [
        imitated(str(index), made.prompt_ids, made.response_ids)
        for index, made in enumerate(make_trajectories(9, seed=5, longest=20))
    ]


@pytest.fixture(scope="module")
def truth():
    """A folder, and transformers' mean cross-entropy of the response tokens in float64 with its gradients."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "model")
        model = hf_model(path)
        scored = [log_probs for log_probs, _ in hf_log_probs(model, examples(), 1.0)]
        loss = -torch.cat(scored).mean()
        loss.backward()
        yield (
            path,
            float(loss.detach()),
            {name: parameter.grad for name, parameter in model.named_parameters()},
        )


def step_on_rank(rank, world_size, folder, parallel):
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    arguments = settings(folder, parallel, clip_grad=0.0) | {"temperature": 1.0}
    arguments["optimizer"] = replace(arguments["optimizer"], distributed=False)
    policy = RankModel(**arguments, device=torch.device("cpu"))
    policy.load_hf(folder)
    rows = examples()
    plan = plan_micro_batches(
        [row.length for row in rows],
        data_parallel_size=parallel.data_parallel_size,
        token_budget=96,
        length_multiple=parallel.length_multiple,
    )
    shards = [
        build_shard(
            [rows[index] for index in members],
            context_parallel_size=parallel.context_parallel_size,
            context_parallel_rank=parallel_state.get_context_parallel_rank(),
            length_multiple=parallel.length_multiple,
            pad_token_id=0,
            max_position=256,
        )
        for members in plan[parallel_state.get_data_parallel_rank()]
    ]
    measured = policy.supervised_loss(shards)
    result = policy.supervised_step(shards, lr=0.0)
    with torch.no_grad():
        for module in policy.modules:
            for parameter in module.parameters():
                parameter.copy_(parameter.main_grad)
    return measured, result.statistics, exported(policy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient_are_those_of_the_response_tokens(truth, layout):
    folder, loss, gradients = truth
    parallel = LAYOUTS[layout]
    results = run_ranks(parallel.world_size, step_on_rank, folder, parallel)
    reporting = [(measured, statistics) for measured, statistics, _ in results if statistics]
    assert reporting
    for measured, statistics in reporting:
        assert measured == pytest.approx(loss, rel=1e-6)
        assert statistics["loss"] == pytest.approx(loss, rel=1e-5)
        assert statistics["tokens"] == sum(len(row.response_ids) for row in examples())
    found = results[0][2]
    errors = {name: relative_error(found[name], gradients[name]) for name in gradients}
    assert max(errors.values()) < 1e-5, {name: error for name, error in errors.items() if error >= 1e-5}


def test_prompt_rows_get_no_gradient_of_the_head():
    """The final hidden states of all positions that predict no response token."""
    with tempfile.TemporaryDirectory() as folder:
        (rows,) = run_ranks(1, hidden_gradients, write_model(Path(folder) / "model"))
    gradient, predicting = rows
    assert 0 < predicting.sum() < len(predicting)
    assert gradient[~predicting].abs().max() == 0 < gradient[predicting].abs().sum(dim=1).min()


def hidden_gradients(rank, world_size, folder):
    """Gradient of the normed hidden states [tokens, hidden], and which tokens predict a response token."""
    torch.set_num_threads(1)
    model_parallel.initialize(ParallelConfig(), seed=1)
    policy = RankModel(**settings(folder, ParallelConfig()), device=torch.device("cpu"))
    policy.load_hf(folder)
    shard = build_shard(
        examples(),
        context_parallel_size=1,
        context_parallel_rank=0,
        length_multiple=1,
        pad_token_id=0,
        max_position=256,
    )
    seen = []
    norm = policy.modules[0].decoder.final_layernorm
    norm.register_forward_hook(lambda *arguments: arguments[-1].register_hook(seen.append) and None)
    policy.supervised_step([shard], lr=0.0)
    predicting = torch.zeros(shard.input_ids.numel(), dtype=torch.bool)
    start = 0
    for row in examples():
        first = start + len(row.prompt_ids) - 1
        predicting[first : first + len(row.response_ids)] = True
        start += row.length
    return seen[0].reshape(len(predicting), -1), predicting
