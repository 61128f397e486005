"""HybridModel in place of GPTModel: the same loss, gradients, routes and checkpoints, bit by bit where the arithmetic is the same.

Both have the weights of the same Hugging Face folder. Single ranks are compared bit by bit, layouts also with the float64
reference of `test_policy_grid.py` and `test_experts.py`.
"""

import tempfile
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_fipo.checkpoint import distributed
from megatron_fipo.config import HeadConfig
from megatron_fipo.model import mcore
from tests.distributed import test_distributed_checkpoint as dense_checkpoint
from tests.distributed import test_expert_checkpoint as expert_checkpoint
from tests.distributed import test_experts as experts
from tests.distributed import test_policy_grid as dense
from tests.distributed.test_distributed_checkpoint import forked_managers  # noqa: F401 (a fixture of the module)
from tests.distributed.tiny import write_model
from tests.model.reference import make_reference
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(mcore.VERSION < (0, 19), reason="HybridModel came with Megatron-Core 0.19")

DENSE = ("qwen2", "qwen2-tied", "qwen3", "llama")
"""Llama with the rotary scaling of Llama 3, for which HybridModel has no argument."""
TRAINED = {"trainable": True}


@pytest.fixture(scope="module")
def folders():
    with tempfile.TemporaryDirectory() as folder:
        made = {name: write_model(Path(folder) / name, **variant) for name, variant in dense.MODELS.items()}
        made |= {name: write_model(Path(folder) / name, family=name) for name in experts.MODELS}
        make_reference(Path(folder) / "llama", family="llama")
        yield {**made, "llama": Path(folder) / "llama"}


def hybrid(function):
    """A rank's function, with HybridModels."""

    def run(*arguments):
        mcore.USES_HYBRID_MODEL = True
        return function(*arguments)

    return run


def dense_step(function, folder: Path, layout: str):
    parallel = dense.LAYOUTS[layout]
    old = [offsets.astype("float32") - 4 for offsets in dense.batch()[1]]
    return run_ranks(parallel.world_size, function, folder, parallel, dense.FIPO, old, 160, HeadConfig())


def expert_step(function, folder: Path, layout: str, recompute: str = "none"):
    parallel = experts.LAYOUTS[layout]
    old = [offsets.astype("float32") - 4 for offsets in dense.batch()[1]]
    return run_ranks(parallel.world_size, function, folder, parallel, old, recompute, True, 160)


def assert_equal_steps(expected, found):
    """(statistics, gradient norm, gradients) of all ranks, bit by bit."""
    for (statistics, norm, gradients), (statistics_found, norm_found, gradients_found) in zip(
        expected, found, strict=True
    ):
        assert statistics == statistics_found
        assert norm == norm_found > 0
        assert set(gradients) == set(gradients_found)
        assert all(torch.equal(gradients_found[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("layout", ["1", "tp2", "tp2-sp", "cp2", "pp2", "pp2-vpp2", "tp2-sp-pp2"])
@pytest.mark.parametrize("name", DENSE)
def test_loss_and_every_gradient_are_those_of_gpt_model(folders, name, layout):
    expected = dense_step(dense.step_on_rank, folders[name], layout)
    assert_equal_steps(expected, dense_step(hybrid(dense.step_on_rank), folders[name], layout))


@pytest.mark.parametrize("layout", ["1", "tp2", "tp2-ep2", "cp2-ep2", "pp2", "pp2-vpp2-cp2-ep2"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", experts.MODELS)
def test_loss_and_every_gradient_of_experts_are_those_of_gpt_model(folders, name, recompute, layout):
    """The router's too, with replayed routes."""
    expected = expert_step(experts.step_on_rank, folders[name], layout, recompute)
    assert_equal_steps(expected, expert_step(hybrid(experts.step_on_rank), folders[name], layout, recompute))


def balanced_step(rank, world_size, folder, parallel):
    """A step with Megatron-Core's loss for the balance of experts, which counts layers."""
    policy = experts.new_policy(folder, parallel, distributed=False, trainable=True, load_balancing=0.1)
    old = [offsets.astype("float32") - 4 for offsets in dense.batch()[1]]
    result = policy.policy_step(
        dense.make_shards(policy, parallel, dense.batch()[0], old, 160), dense.FIPO, lr=0.0
    )
    return result.statistics, result.grad_norm, experts.gradients_of(policy)


@pytest.mark.parametrize("layout", ["1", "pp2"])
def test_load_balancing_is_that_of_gpt_model(folders, layout):
    parallel = experts.LAYOUTS[layout]
    arguments = (folders["qwen3_moe-mixed"], parallel)
    expected = run_ranks(parallel.world_size, balanced_step, *arguments)
    assert_equal_steps(expected, run_ranks(parallel.world_size, hybrid(balanced_step), *arguments))


def describe(rank, world_size, folder, parallel):
    """What this rank would save of its model, by what identifies it in a checkpoint; its class; the layers of its routers."""
    policy, _ = expert_checkpoint.new_policy(folder, parallel, TRAINED)
    state = distributed._sharded_state(policy.modules, None, is_loading=False)
    values = [
        value.build() if isinstance(value, ShardedTensorFactory) else value for value in nested_values(state)
    ]
    shards = sorted(
        (item.key, item.global_offset, item.global_shape, item.local_shape, item.replica_id)
        for item in nested_values(values)
        if isinstance(item, ShardedTensor)
    )
    return shards, type(policy.modules[0]), [routing.layers for routing in policy.routing]


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        *(
            (name, dense.LAYOUTS[layout])
            for name in ("qwen2-tied", "qwen3")
            for layout in ("tp2", "pp2-vpp2")
        ),
        *(
            (name, experts.LAYOUTS[layout])
            for name in experts.MODELS
            for layout in ("tp2", "pp2-vpp2-cp2-ep2")
        ),
    ],
)
def test_a_checkpoint_has_the_same_tensors(folders, name, parallel):
    expected = run_ranks(parallel.world_size, describe, folders[name], parallel)
    found = run_ranks(parallel.world_size, hybrid(describe), folders[name], parallel)
    for (shards, kind, layers), (shards_found, kind_found, layers_found) in zip(expected, found, strict=True):
        assert (kind.__name__, kind_found.__name__) == ("LogProbGPTModel", "LogProbHybridModel")
        assert shards == shards_found
        assert len(shards) > 5
        assert layers == layers_found


@pytest.mark.parametrize(("before", "after"), [(lambda rank: rank, hybrid), (hybrid, lambda rank: rank)])
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("layout", ["1", "tp2-dp2", "pp2-vpp2"])
def test_training_resumes_bit_by_bit_in_the_other_model(folders, tmp_path, layout, changes, before, after):
    """Weights and optimizer of a checkpoint of GPTModel in HybridModel, and the reverse."""
    parallel, folder = dense.LAYOUTS[layout], folders["qwen2"]
    write, read = before(dense_checkpoint.step_and_save), after(dense_checkpoint.load_and_step)
    straight = run_ranks(parallel.world_size, write, folder, parallel, tmp_path, 2, changes)
    resumed = run_ranks(parallel.world_size, read, folder, parallel, tmp_path, changes)
    dense_checkpoint.assert_same_training(straight, resumed)


@pytest.mark.parametrize(("name", "layout"), [("qwen3_moe", "tp2-ep2"), ("qwen3_moe-mixed", "pp2-dp2-ep2")])
def test_training_of_experts_resumes_bit_by_bit_in_hybrid_model(folders, tmp_path, name, layout):
    parallel = experts.LAYOUTS[layout]
    write, read = expert_checkpoint.step_and_save, hybrid(expert_checkpoint.load_and_step)
    straight = run_ranks(parallel.world_size, write, folders[name], parallel, tmp_path, 2, TRAINED, {})
    resumed = run_ranks(parallel.world_size, read, folders[name], parallel, tmp_path, TRAINED, {})
    dense_checkpoint.assert_same_training(straight, resumed)


def test_a_checkpoint_of_gpt_model_loads_under_another_layout(folders, tmp_path):
    """One rank's into pipeline stages of HybridModel, whose pattern has other parts on each."""
    one, many = dense.LAYOUTS["1"], dense.LAYOUTS["tp2-sp-pp2"]
    straight = run_ranks(1, dense_checkpoint.step_and_save, folders["qwen2"], one, tmp_path, 2, {})
    read = hybrid(dense_checkpoint.load_and_step)
    resumed = run_ranks(4, read, folders["qwen2"], many, tmp_path, {})
    expert_checkpoint.assert_close_training(straight, resumed)
