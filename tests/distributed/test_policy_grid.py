"""No split may change a number: loss, statistics, every parameter's gradient and the updated weights, over real ranks.

The reference is the slow obvious path: transformers' model in float64, one unpadded sequence at a time, full log-softmax, the
token-by-token loss of `tests/objective/oracle.py`, plain autograd. Against it stand tensor, sequence, pipeline, virtual
pipeline, context and data parallelism and several micro-batchings, through Megatron-Core's own schedule and normalization.

Gradients are compared complete: the normalized `main_grad` of every shard replaces its parameter and exported in Hugging
Face names, so a shard that is wrong anywhere shows. What this does not exercise: bf16, Transformer Engine, NCCL.
"""

import tempfile
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
from megatron.core import parallel_state

from megatron_fipo.batching.packing import micro_batch_multiple, plan_micro_batches
from megatron_fipo.batching.shard import build_shard
from megatron_fipo.checkpoint.hf_export import iterate_hf_tensors
from megatron_fipo.config import HeadConfig, ParallelConfig
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.trainer.rank_model import RankModel
from tests.distributed.tiny import make_trajectories, settings, write_model
from tests.objective.oracle import OracleResult, Response, oracle_loss
from tests.ranks import run_ranks

COUNT = 12
FIPO = ObjectiveConfig(half_life=8.0, influence_clip=(0.8, 1.2), safety_threshold=3.0)
REFERENCE = replace(FIPO, name="fipo", normalization="reference_micro_batch")


MODELS: dict[str, dict[str, Any]] = {"qwen2": {}, "qwen2-tied": {"tied": True}, "qwen3": {"family": "qwen3"}}


@pytest.fixture(scope="module")
def folders():
    with tempfile.TemporaryDirectory() as folder:
        yield {name: write_model(Path(folder) / name, **variant) for name, variant in MODELS.items()}


def batch():
    """Trajectories and old log-prob offsets [COUNT, 64]: large enough that every rule of the loss has tokens to act on."""
    trajectories = make_trajectories(COUNT, seed=3)
    offsets = np.random.default_rng(9).normal(scale=0.4, size=(COUNT, 64))
    dropped, kept, *_ = (i for i, t in enumerate(trajectories) if i % 3 == 2 and t.response_length > 8)
    trajectories[dropped].advantage, offsets[dropped, :2] = -1.0, -3.0  # two dual-clipped tokens
    trajectories[kept].advantage, offsets[kept, 0] = -1.0, -3.0  # one
    return trajectories, offsets


def engine_log_probs(index: int, old_log_probs: np.ndarray) -> np.ndarray:
    """What the rollout engine reported for response `index`: the old log-probs, float32, with noise that often exceeds the cap."""
    noise = np.random.default_rng(index).normal(scale=0.5, size=len(old_log_probs))
    return old_log_probs + noise.astype(np.float32)


def hf_model(folder: Path):
    """transformers in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def hf_log_probs(model, trajectories, temperature: float):
    """Per trajectory log-probs and entropies [response length] with gradient."""
    scored = []
    for trajectory in trajectories:
        ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.response_ids]])
        logits = model(ids).logits[0, len(trajectory.prompt_ids) - 1 : -1] / temperature
        table = logits.log_softmax(dim=-1)
        labels = torch.tensor(trajectory.response_ids, dtype=torch.int64)[:, None]
        scored.append((table.gather(1, labels).squeeze(1), -(table.exp() * table).sum(dim=-1)))
    return scored


@pytest.fixture(scope="module")
def truth(folders):
    """Per (model, objective key): the oracle's result and gradients, and the old log-probs it used."""
    trajectories, offsets = batch()
    results = {}
    for name, folder in folders.items():
        for key, objective in {
            "fipo": FIPO,
            "grpo": replace(FIPO, name="grpo", entropy_coefficient=0.05),
            "tis": replace(FIPO, correction="tis", correction_cap=1.3),
            "mis": replace(FIPO, correction="mis", correction_cap=1.3),
        }.items():
            model = hf_model(folder)
            scored = hf_log_probs(model, trajectories, settings(folder, ParallelConfig())["temperature"])
            responses, old = [], []
            for index, (trajectory, (log_probs, entropy)) in enumerate(
                zip(trajectories, scored, strict=True)
            ):
                old_log_probs = log_probs.detach() + torch.from_numpy(offsets[index, : len(log_probs)])
                mask = torch.tensor(trajectory.response_mask, dtype=torch.float64)
                advantages = torch.full_like(mask, trajectory.advantage)
                old.append(old_log_probs.float().numpy())
                engine = torch.from_numpy(engine_log_probs(index, old[-1])).double()
                responses.append(
                    Response(
                        log_probs, old_log_probs, advantages, mask, entropy=entropy, rollout_log_probs=engine
                    )
                )
            result: OracleResult = oracle_loss(responses, objective)
            result.loss.backward()
            gradients = {weight: parameter.grad for weight, parameter in model.named_parameters()}
            results[name, key] = (objective, float(result.loss), gradients, old, result.kept)
    return results


def make_shards(policy: RankModel, parallel: ParallelConfig, trajectories, old, token_budget: int):
    """This rank's shards of the batch, with the given old log-probs and those of the engine in their rows."""
    trajectories = [
        replace(
            trajectory,
            rollout_log_probs=engine_log_probs(index, old[index][: trajectory.response_length]).tolist(),
        )
        for index, trajectory in enumerate(trajectories)
    ]
    multiple = parallel.length_multiple
    plan = plan_micro_batches(
        [trajectory.length for trajectory in trajectories],
        data_parallel_size=parallel.data_parallel_size,
        token_budget=token_budget,
        length_multiple=multiple,
        count_multiple=micro_batch_multiple(
            parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
        ),
    )
    shards = []
    for members in plan[parallel_state.get_data_parallel_rank()]:
        shard = build_shard(
            [trajectories[i] for i in members],
            context_parallel_size=parallel.context_parallel_size,
            context_parallel_rank=parallel_state.get_context_parallel_rank(),
            length_multiple=multiple,
            pad_token_id=0,
            max_position=256,
        )
        place = shard.row_position + 1 - shard.prompt_lengths[shard.row_sequence]
        values = [old[members[s]][p] for s, p in zip(shard.row_sequence, place, strict=True)]
        shards.append(shard.with_old_log_probs(torch.tensor(values, dtype=torch.float32)))
    return shards


def exported(policy: RankModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in iterate_hf_tensors(policy.modules) if tensor is not None}


def step_on_rank(rank, world_size, folder, parallel, objective, old, token_budget, head):
    """One step at learning rate 0: the reporting numbers and, on rank 0, the gradient of every parameter in Hugging Face names."""
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    arguments = settings(folder, parallel, head=head, clip_grad=0.0)
    arguments["optimizer"] = replace(arguments["optimizer"], distributed=False)
    policy = RankModel(**arguments, device=torch.device("cpu"))
    policy.load_hf(folder)
    trajectories, _ = batch()
    result = policy.policy_step(
        make_shards(policy, parallel, trajectories, old, token_budget), objective, lr=0.0
    )
    with torch.no_grad():
        for module in policy.modules:
            for parameter in module.parameters():
                parameter.copy_(parameter.main_grad)
    return result.statistics, result.grad_norm, exported(policy)


LAYOUTS = {
    "1": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2-sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "pp2-vpp2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "cp2": ParallelConfig(context_parallel_size=2),
    "dp2": ParallelConfig(data_parallel_size=2),
    "cp4": ParallelConfig(context_parallel_size=4),
    "dp4": ParallelConfig(data_parallel_size=4),
    "tp2-cp2": ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2),
    "tp2-sp-cp2": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2
    ),
    "tp2-sp-pp2": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2
    ),
    "tp2-dp2": ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=2),
    "pp2-cp2": ParallelConfig(pipeline_model_parallel_size=2, context_parallel_size=2),
    "pp2-vpp2-dp2": ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, data_parallel_size=2
    ),
    "cp2-dp2": ParallelConfig(context_parallel_size=2, data_parallel_size=2),
}
CASES = [
    *((layout, "fipo", False, 160, HeadConfig()) for layout in LAYOUTS),
    *((layout, "fipo", False, 4096, HeadConfig()) for layout in ("1", "cp2")),
    ("1", "fipo", False, 56, HeadConfig()),
    ("dp2", "fipo", False, 56, HeadConfig(logits_memory_mb=1)),
    *(
        (layout, "fipo", True, 160, HeadConfig())
        for layout in ("1", "tp2-sp", "pp2", "tp2-sp-pp2", "cp2-dp2")
    ),
    *(
        (layout, "grpo", False, 160, HeadConfig(logits_memory_mb=1))
        for layout in ("1", "tp2-sp-cp2", "pp2", "dp2")
    ),
    *((layout, "tis", False, 160, HeadConfig()) for layout in ("1", "cp2-dp2", "pp2")),
    *((layout, "mis", False, 160, HeadConfig()) for layout in ("cp2", "dp2")),
]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize(("layout", "key", "tied", "token_budget", "head"), CASES)
def test_loss_and_every_gradient_equal_the_oracle(folders, truth, layout, key, tied, token_budget, head):
    check_step(folders, truth, "qwen2-tied" if tied else "qwen2", layout, key, token_budget, head)


@pytest.mark.parametrize("layout", ["1", "tp2", "tp2-sp", "tp2-sp-cp2"])
def test_norms_of_heads_get_the_whole_gradient(folders, truth, layout):
    """Tensor-parallel ranks share the weight but not the heads that it norms: each has only a part of its gradient."""
    check_step(folders, truth, "qwen3", layout, "fipo", 160, HeadConfig())


def check_step(folders, truth, name, layout, key, token_budget, head):
    """One step of model `name` against the oracle: loss, gradient norm and every gradient."""
    parallel = LAYOUTS[layout]
    objective, loss, gradients, old, kept = truth[name, key]
    results = run_ranks(
        parallel.world_size, step_on_rank, folders[name], parallel, objective, old, token_budget, head
    )
    assert_same_step(results, loss, gradients)
    if objective.name == "fipo":
        for statistics, *_ in filter(itemgetter(0), results):
            assert statistics["policy/dropped_sequences"] == 1 == kept.count(False)


def assert_same_step(results, loss: float, gradients: dict[str, torch.Tensor]) -> None:
    """(statistics, gradient norm, gradients) of all ranks against the oracle's loss and gradients."""
    found = results[0][2]
    assert set(found) == set(gradients)
    errors = {weight: relative_error(found[weight], gradients[weight]) for weight in gradients}
    assert max(errors.values()) < 1e-5, {weight: error for weight, error in errors.items() if error >= 1e-5}
    norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    for statistics, grad_norm, _ in results:
        assert grad_norm == pytest.approx(norm, rel=1e-5)
        if statistics:
            assert statistics["policy/loss"] == pytest.approx(loss, rel=1e-5)


def test_reference_normalisation_depends_on_the_packing_and_ours_does_not(folders, truth):
    _, loss, _, old, _ = truth["qwen2", "fipo"]
    losses = {
        (objective.normalization, budget): run_ranks(
            1, step_on_rank, folders["qwen2"], LAYOUTS["1"], objective, old, budget, HeadConfig()
        )[0][0]
        for objective in (FIPO, REFERENCE)
        for budget in (56, 4096)
    }
    for budget in (56, 4096):
        assert losses["token_mean", budget]["policy/loss"] == pytest.approx(loss, rel=1e-5)
    small, large = (losses["reference_micro_batch", budget]["policy/loss"] for budget in (56, 4096))
    assert abs(small - large) > 0.01 * abs(large)
    gap = losses["token_mean", 56]["policy/normalization_gap"]
    assert gap == pytest.approx(abs(small - loss) / max(abs(small), abs(loss)), rel=1e-4)


def train_on_rank(rank, world_size, folder, parallel, old, token_budget):
    """Two real steps with Megatron's distributed optimizer; the updated weights on rank 0."""
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    policy = RankModel(**settings(folder, parallel, lr=1e-3), device=torch.device("cpu"))
    policy.load_hf(folder)
    trajectories, _ = batch()
    shards = make_shards(policy, parallel, trajectories, old, token_budget)
    results = [policy.policy_step(shards, FIPO, lr=1e-3) for _ in range(2)]
    return [result.statistics for result in results], exported(policy)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1"] + ["cp2-dp2-overlap"])
def test_updated_weights_equal_those_of_one_rank(folders, truth, layout):
    parallel = (
        replace(LAYOUTS["cp2-dp2"], overlap_communication=True)
        if layout == "cp2-dp2-overlap"
        else LAYOUTS[layout]
    )
    old = truth["qwen2", "fipo"][3]
    alone = run_ranks(1, train_on_rank, folders["qwen2"], LAYOUTS["1"], old, 160)[0][1]
    split = run_ranks(parallel.world_size, train_on_rank, folders["qwen2"], parallel, old, 160)[0][1]
    start = dict(iterate_safetensors(folders["qwen2"]))
    assert (
        max(relative_error(alone[name], start[name].double()) for name in alone) > 1e-3
    )  # the steps did something
    errors = {name: relative_error(split[name], alone[name].double()) for name in alone}
    assert max(errors.values()) < 1e-5, {name: error for name, error in errors.items() if error >= 1e-5}


def iterate_safetensors(folder: Path):
    from safetensors.torch import load_file

    yield from load_file(folder / "model.safetensors").items()


def score_then_step(rank, world_size, folder, parallel):
    """Old log-probs by the policy itself, then a step on the same shards."""
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    policy = RankModel(**settings(folder, parallel), device=torch.device("cpu"))
    policy.load_hf(folder)
    trajectories, _ = batch()
    zeros = [np.zeros(64, dtype=np.float32)] * COUNT
    shards = make_shards(policy, parallel, trajectories, zeros, 160)
    scores = policy.log_probs(shards)
    if policy.is_last_stage:
        shards = [shard.with_old_log_probs(values) for shard, values in zip(shards, scores, strict=True)]
    return policy.policy_step(shards, FIPO, lr=1e-3).statistics


@pytest.mark.parametrize("layout", ["1", "tp2-sp", "pp2-vpp2", "cp2", "tp2-cp2"])
def test_first_mini_step_reproduces_old_log_probs_bit_for_bit(folders, layout):
    reports = [
        r
        for r in run_ranks(LAYOUTS[layout].world_size, score_then_step, folders["qwen2"], LAYOUTS[layout])
        if r
    ]
    assert reports
    for statistics in reports:
        assert statistics["policy/sigma_log_ratio"] == 0.0
        assert statistics["policy/kl"] == 0.0
        assert statistics["influence/mean"] == 1.0


def step_with_nan(rank, world_size, folder, parallel, old):
    """A step after the final norm has lost a number; the other parameters before and after."""
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    policy = RankModel(**settings(folder, parallel), device=torch.device("cpu"))
    policy.load_hf(folder)
    with torch.no_grad():
        for module in policy.modules:
            for name, parameter in module.named_parameters():
                if name == "decoder.final_layernorm.weight":
                    parameter[0] = torch.nan
    policy.optimizer.reload_model_params()
    before = exported(policy)
    trajectories, _ = batch()
    result = policy.policy_step(make_shards(policy, parallel, trajectories, old, 160), FIPO, lr=1e-3)
    return result.skipped, result.statistics, before, exported(policy)


@pytest.mark.parametrize("layout", ["1", "pp2", "dp2"])
def test_a_broken_forward_is_reported_and_changes_no_weight(folders, truth, layout):
    results = run_ranks(
        LAYOUTS[layout].world_size,
        step_with_nan,
        folders["qwen2"],
        LAYOUTS[layout],
        truth["qwen2", "fipo"][3],
    )
    assert all(skipped for skipped, *_ in results)
    for _, statistics, _, _ in results:
        if statistics:
            assert statistics["policy/kept_tokens"] == 0
            assert statistics["policy/nonfinite_sequences"] == statistics["policy/sequences"] > 0
    _, _, before, after = results[0]
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True, msg=name)
