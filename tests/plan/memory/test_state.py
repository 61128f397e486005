"""Weights, gradients and optimizer state: bytes against Megatron-Core's own tensors, and the counts of experts."""

import json
from dataclasses import replace
from statistics import mean

import pytest
import torch

from megatron_fipo.config import (
    Config,
    HeadConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    RouterConfig,
)
from megatron_fipo.families.family import Experts
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.model import parallel as process_groups
from megatron_fipo.model.mcore import make_optimizer_state
from megatron_fipo.plan.memory.state import Stage, stage_state
from megatron_fipo.trainer.rank_model import RankModel
from tests.gpu.policies import Shape
from tests.plan.cases import expert_keys, recipe_case
from tests.ranks import run_ranks


def _real_state(rank: int, world_size: int, config: Config) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state."""
    process_groups.initialize(config.parallel, seed=1)
    policy = RankModel(config.model, config.parallel, config.head, config.optimizer, 1.0, torch.device("cpu"))
    make_optimizer_state(policy.optimizer)
    parameters = [parameter for chunk in policy.modules for parameter in chunk.parameters()]
    masters = [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]
    moments = [
        tensor
        for inner in policy.optimizer.chained_optimizers
        for state in inner.optimizer.state.values()
        for tensor in state.values()
    ]
    return (
        sum(parameter.nbytes for parameter in parameters),
        sum(parameter.main_grad.nbytes for parameter in parameters if parameter.requires_grad),
        sum(tensor.nbytes for tensor in masters + moments if isinstance(tensor, torch.Tensor)),
    )


@pytest.mark.parametrize("distributed", [True, False])
def test_bytes_in_bfloat16_are_those_of_megatrons_tensors(distributed, tmp_path):
    """With tied embeddings on two tensor-parallel and two data-parallel ranks; the optimizer's over both data-parallel ones,
    whose parts differ by a few elements."""
    values = Shape(2, 48, 80, 4, 2, 1030, tied=True).hf_config()
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    config = Config(
        model=ModelConfig(path=str(tmp_path), dtype="bfloat16"),
        parallel=ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=2),
        head=HeadConfig(workspace_mb=1),
        optimizer=OptimizerSettings(distributed=distributed),
    )
    found = run_ranks(4, _real_state, config)
    state = stage_state(config, *read_model_config(tmp_path), 0)
    assert {weights for weights, _, _ in found} == {state.weight_bytes}
    assert {gradients for _, gradients, _ in found} == {state.gradient_bytes}
    # ranks 0 and 2 have the same shards of the tensors
    assert found[0][2] + found[2][2] == 2 * state.optimizer_bytes


MIXTURE = Experts(count=8, per_token=2, ffn_hidden_size=40, normalized=True)
LAYOUTS = {
    "one": ParallelConfig(),
    "dp4 ep2": ParallelConfig(data_parallel_size=4, expert_model_parallel_size=2),
    "tp2 cp2 ep4": ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        context_parallel_size=2,
        expert_model_parallel_size=4,
    ),
    "tp2 dp2 ep2 etp2": ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        data_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=2,
    ),
    "pp2 vpp2 dp2 ep2": ParallelConfig(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        data_parallel_size=2,
        expert_model_parallel_size=2,
    ),
}


@pytest.mark.parametrize(
    ("layout", "trainable"),
    [
        ("one", True),
        ("dp4 ep2", False),
        ("tp2 cp2 ep4", True),
        ("tp2 dp2 ep2 etp2", False),
        ("pp2 vpp2 dp2 ep2", False),
    ],
)
def test_bytes_with_experts_are_those_of_megatrons_tensors(layout, trainable, tmp_path):
    """Four layers, the first without experts. Weights and gradients of every rank, and the optimizer state of a stage.
    `trainable` is the router's."""
    mixture = replace(MIXTURE, dense_layers=(0,))
    values = Shape(4, 48, 80, 4, 2, 1030, tied=False).hf_config() | expert_keys(mixture, head_size=12)
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    parallel = LAYOUTS[layout]
    config = Config(
        model=ModelConfig(path=str(tmp_path), dtype="bfloat16", router=RouterConfig(trainable=trainable)),
        parallel=parallel,
        head=HeadConfig(workspace_mb=1),
    )
    found = run_ranks(parallel.world_size, _real_state, config)
    for stage in range(parallel.pipeline_model_parallel_size):
        state = stage_state(config, *read_model_config(tmp_path), stage)
        ranks = found[stage * parallel.stage_size : (stage + 1) * parallel.stage_size]
        assert {weights for weights, _, _ in ranks} == {state.weight_bytes}
        assert {gradients for _, gradients, _ in ranks} == {state.gradient_bytes}
        assert mean(optimizer for _, _, optimizer in ranks) == state.optimizer_bytes


class TestExperts:
    """Qwen3-30B-A3B on 16 ranks, in two stages of 24 layers."""

    EXPERT = 3 * 2048 * 768

    def stage(self, *overrides: str) -> Stage:
        case = recipe_case("qwen3-30b-a3b", *overrides)
        return stage_state(case.config, case.family, case.architecture, 0)

    def test_a_rank_holds_its_share_of_the_experts(self):
        """tp 2 x dp 4: eight ranks share the experts of a layer, or four of them do twice."""
        for ranks in (1, 2, 4, 8):
            stage = self.stage(f"parallel.expert_model_parallel_size={ranks}")
            assert stage.expert_parameters == 24 * 128 // ranks * self.EXPERT
            halves = self.stage(
                f"parallel.expert_model_parallel_size={ranks // 2 or 1}",
                f"parallel.expert_tensor_parallel_size={min(2, ranks)}",
            )
            assert halves.expert_parameters == stage.expert_parameters

    def test_their_optimizer_state_is_shared_by_the_ranks_with_the_same_experts(self):
        stage = self.stage("parallel.expert_model_parallel_size=4")
        others = stage.parameters - stage.expert_parameters - 24 * 128 * 2048
        assert stage.optimizer_bytes == others * 12 // 4 + stage.expert_parameters * 12 // 2

    def test_a_frozen_router_has_weights_only(self):
        frozen, trained = self.stage(), self.stage("model.router.trainable=true")
        router = 24 * 128 * 2048
        assert frozen.weight_bytes == trained.weight_bytes
        assert trained.gradient_bytes - frozen.gradient_bytes == 4 * router
        assert trained.optimizer_bytes - frozen.optimizer_bytes == 12 * router // 4

    def test_fp8_copies_experts_but_no_router(self):
        plain, fp8 = self.stage(), self.stage("model.fp8=hybrid")
        attention = 24 * (2048 * (4096 + 2 * 512) + 4096 * 2048) // 2
        assert fp8.weight_bytes - plain.weight_bytes == 2 * (attention + plain.expert_parameters)
