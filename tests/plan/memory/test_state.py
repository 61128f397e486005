"""Weights, gradients and optimizer state: bytes against Megatron-Core's own tensors, and the counts of experts."""

import json

import pytest
import torch

from megatron_fipo.config import Config, HeadConfig, ModelConfig, OptimizerSettings, ParallelConfig
from megatron_fipo.errors import UserError
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.model import parallel as process_groups
from megatron_fipo.model.mcore import make_optimizer_state
from megatron_fipo.plan.case import Experts
from megatron_fipo.plan.memory.state import Stage, stage_state
from megatron_fipo.trainer.rank_model import RankModel
from tests.gpu.policies import Shape
from tests.plan.cases import recipe_case
from tests.ranks import run_ranks


def _real_state(rank: int, world_size: int, config: Config) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state."""
    process_groups.initialize(config.parallel, seed=1)
    policy = RankModel(config.model, config.parallel, config.head, config.optimizer, 1.0, torch.device("cpu"))
    make_optimizer_state(policy.optimizer)
    parameters = [parameter for chunk in policy.modules for parameter in chunk.parameters()]
    masters = [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]
    (inner,) = policy.optimizer.chained_optimizers
    moments = [tensor for state in inner.optimizer.state.values() for tensor in state.values()]
    return (
        sum(parameter.nbytes for parameter in parameters),
        sum(parameter.main_grad.nbytes for parameter in parameters),
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


class TestExperts:
    LAYER = 5120 * 27648 * 3
    """Parameters of the feed-forward matrices of a layer of the 32B model."""

    def stage(self, experts: Experts | None, *overrides: str, index: int = 1) -> Stage:
        """A stage with layers only: 16 of them, on 8 tensor-parallel and 4 context-parallel ranks."""
        case = recipe_case("qwen2.5-32b", *overrides, experts=experts)
        return stage_state(case.config, case.family, case.architecture, index, case.experts)

    def test_a_rank_holds_its_share_of_the_experts_and_the_router(self):
        dense = self.stage(None)
        for ranks, held in ((1, 8), (2, 4), (4, 2)):
            stage = self.stage(Experts(count=8, per_token=2, parallel_size=ranks))
            more = 16 * (self.LAYER // 8 * (held - 1) + 8 * 5120)
            assert stage.parameters == dense.parameters + more
            assert stage.weight_bytes == 2 * stage.parameters
            assert stage.gradient_bytes == 4 * stage.parameters

    def test_their_optimizer_state_is_shared_by_the_ranks_with_the_same_experts(self):
        """4 context-parallel ranks: 2 of them have the same experts if 2 share those of a layer."""
        dense = self.stage(None)
        stage = self.stage(Experts(count=8, per_token=2, parallel_size=2))
        matrices = 16 * self.LAYER // 8
        others = dense.parameters - matrices + 16 * 8 * 5120
        assert stage.optimizer_bytes == others * 12 // 4 + 4 * matrices * 12 // 2

    def test_one_expert_is_a_dense_model(self):
        assert self.stage(Experts(count=1)) == self.stage(None)

    @pytest.mark.parametrize(("count", "ranks"), [(6, 4), (8, 8)])
    def test_experts_that_do_not_divide_are_refused(self, count, ranks):
        with pytest.raises(UserError, match=f"{ranks} expert-parallel ranks must divide the {count} experts"):
            self.stage(Experts(count=count, parallel_size=ranks))
