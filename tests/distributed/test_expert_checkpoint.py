"""Experts and their optimizer saved under one layout resume under another, also with stages without experts."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_fipo.checkpoint import distributed
from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_checkpoint
from megatron_fipo.checkpoint.optimizer_blocks import DENSE, EXPERTS, distributed_parts
from megatron_fipo.config import ParallelConfig, RouterConfig
from megatron_fipo.errors import UserError
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.trainer.rank_model import RankModel
from tests.distributed.test_distributed_checkpoint import (
    assert_same_training,
    forked_managers,  # noqa: F401 (a fixture of the module)
    train,
)
from tests.distributed.test_experts import LAYOUTS as EXPERT_LAYOUTS
from tests.distributed.test_policy_grid import batch, make_shards
from tests.distributed.tiny import settings, write_model
from tests.model.reference import make_reference
from tests.ranks import run_ranks

LAYOUTS = {**EXPERT_LAYOUTS, "dp4": ParallelConfig(data_parallel_size=4)}
TRAINED, FROZEN = {"trainable": True}, {"trainable": False}


@pytest.fixture(scope="module")
def folders():
    """`late`: no experts in the first half of the layers, so none in the first of two pipeline stages."""
    with tempfile.TemporaryDirectory() as folder:
        made = {
            name: write_model(Path(folder) / name, family=name) for name in ("qwen3_moe", "qwen3_moe-mixed")
        }
        make_reference(Path(folder) / "late", family="qwen3_moe-mixed", mlp_only_layers=[0, 1])
        yield {**made, "late": Path(folder) / "late"}


def new_policy(folder: Path, parallel: ParallelConfig, router: dict, dtype: str = "float32", **optimizer):
    """A policy with the folder's weights, and this rank's shards of a batch."""
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    arguments = settings(folder, parallel, lr=1e-3, dtype=dtype, router=RouterConfig(**router))
    arguments["optimizer"] = replace(arguments["optimizer"], **optimizer)
    policy = RankModel(**arguments, device=torch.device("cpu"))
    policy.load_hf(folder)
    trajectories, offsets = batch()
    return policy, make_shards(policy, parallel, trajectories, offsets.astype("float32"), 160)


def step_and_save(rank, world_size, folder, parallel, target, steps, router, changes):
    """Some steps, a save, and three steps to compare with."""
    policy, shards = new_policy(folder, parallel, router, **changes)
    train(policy, shards, steps)
    CheckpointWriter().start(policy.modules, policy.optimizer, target, asynchronous=False)
    return train(policy, shards, 3)


def load_and_step(rank, world_size, folder, parallel, source, router, changes):
    policy, shards = new_policy(folder, parallel, router, **changes)
    load_checkpoint(policy.modules, policy.optimizer, source)
    return train(policy, shards, 3)


def assert_close_training(straight, resumed, tolerance: float = 1e-6):
    """The loss of the first step to a relative `tolerance`, later losses and weights to ten times that."""
    expected = next(losses for losses, _, _ in straight if losses[0] is not None)
    found = next(losses for losses, _, _ in resumed if losses[0] is not None)
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found == pytest.approx(expected, rel=10 * tolerance)
    for name, tensor in straight[0][1].items():
        torch.testing.assert_close(resumed[0][1][name], tensor, rtol=10 * tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def saved(folders):
    """By model, layout, router and optimizer: the folder saved after two steps, and how its ranks continued."""
    with tempfile.TemporaryDirectory() as folder:
        made = {}

        def make(model: str, layout: str, router=TRAINED, **changes):
            key = str((model, layout, router, changes))
            if key not in made:
                target = Path(folder) / str(len(made))
                target.mkdir()
                parallel = LAYOUTS[layout]
                arguments = (folders[model], parallel, target, 2, router, changes)
                made[key] = (target, run_ranks(parallel.world_size, step_and_save, *arguments))
            return made[key]

        yield make


def resume(folders, model, layout, source, router=TRAINED, **changes):
    parallel = LAYOUTS[layout]
    return run_ranks(parallel.world_size, load_and_step, folders[model], parallel, source, router, changes)


@pytest.mark.parametrize(
    ("model", "layout", "router"),
    [
        ("qwen3_moe", "1", TRAINED),
        ("qwen3_moe", "1", FROZEN),
        ("qwen3_moe", "tp2-ep2", TRAINED),
        ("qwen3_moe", "pp2-dp2-ep2", FROZEN),
        ("qwen3_moe-mixed", "dp2-ep2", TRAINED),
        ("late", "pp2-dp2-ep2", TRAINED),
    ],
    ids=str,
)
def test_the_same_layout_continues_bit_by_bit(folders, saved, model, layout, router):
    source, straight = saved(model, layout, router)
    assert_same_training(straight, resume(folders, model, layout, source, router))


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [
        ("qwen3_moe", "dp2-ep2", "1"),
        ("qwen3_moe", "1", "dp2-ep2"),
        ("qwen3_moe", "tp2-ep2", "dp2"),
        ("qwen3_moe", "1", "tp2-etp2"),
        ("qwen3_moe", "dp2-ep2", "tp2"),
        ("qwen3_moe", "pp2-dp2-ep2", "1"),
        ("qwen3_moe", "dp4-ep2", "dp4-ep4"),
        ("qwen3_moe-mixed", "tp2-cp2-ep2-etp2", "pp2-vpp2-cp2-ep2"),
        ("late", "pp2", "1"),
        ("late", "1", "pp2-dp2-ep2"),
    ],
)
def test_training_continues_under_another_layout(folders, saved, model, before, after):
    source, straight = saved(model, before)
    assert_close_training(straight, resume(folders, model, after, source))


OTHER_OPTIMIZERS = [
    {"dtype": "bfloat16"},
    {"distributed": False},
    {"dtype": "bfloat16", "distributed": False},
]


@pytest.mark.parametrize("changes", OTHER_OPTIMIZERS, ids=str)
@pytest.mark.parametrize(("model", "layout"), [("qwen3_moe", "dp2-ep2"), ("late", "pp2")])
def test_other_optimizers_continue_bit_by_bit(folders, saved, model, layout, changes):
    source, straight = saved(model, layout, **changes)
    assert_same_training(straight, resume(folders, model, layout, source, **changes))


@pytest.mark.parametrize(
    ("model", "before", "after", "dtype"),
    [
        ("qwen3_moe", "dp2-ep2", "1", "float32"),
        ("qwen3_moe", "1", "tp2-ep2", "float32"),
        ("late", "pp2-dp2-ep2", "1", "float32"),
        ("late", "1", "pp2-dp2-ep2", "bfloat16"),
        ("late", "pp2-dp2-ep2", "dp2-ep2", "bfloat16"),
    ],
)
def test_an_optimizer_that_is_not_distributed_continues_under_another_layout(
    folders, saved, model, before, after, dtype
):
    source, straight = saved(model, before, distributed=False, dtype=dtype)
    resumed = resume(folders, model, after, source, distributed=False, dtype=dtype)
    assert_close_training(straight, resumed, 1e-6 if dtype == "float32" else 2e-2)


def loaded_steps(rank, world_size, folder, parallel, source, changes):
    """Of each group of parameters: whether this rank has some, and the steps that Adam has counted."""
    policy, _ = new_policy(folder, parallel, TRAINED, **changes)
    load_checkpoint(policy.modules, policy.optimizer, source)
    inner = [part.optimizer for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])]
    return {(len(group["params"]) > 0, group.get("step")) for adam in inner for group in adam.param_groups}


@pytest.mark.parametrize("changes", [{}, {"distributed": False}], ids=str)
def test_every_part_counts_the_same_steps(folders, saved, changes):
    source, _ = saved("late", "1", **changes)
    for layout in ("dp2-ep2", "pp2-dp2-ep2"):
        parallel = LAYOUTS[layout]
        found = run_ranks(parallel.world_size, loaded_steps, folders["late"], parallel, source, changes)
        assert {step for of_rank in found for has_parameters, step in of_rank if has_parameters} == {2}


def test_a_run_saved_before_its_first_step_continues(folders, tmp_path):
    arguments = (folders["qwen3_moe"], LAYOUTS["dp2-ep2"], tmp_path, 0, TRAINED, {})
    straight = run_ranks(2, step_and_save, *arguments)
    assert_same_training(straight, resume(folders, "qwen3_moe", "dp2-ep2", tmp_path))


def parts_of_rank(rank, world_size, folder, parallel):
    policy, _ = new_policy(folder, parallel, TRAINED)
    parts = distributed_parts(policy.optimizer)
    return {name: sum(map(torch.numel, part.get_parameters())) for name, part in parts.items()}


def test_a_stage_without_experts_has_an_empty_part_for_them(folders):
    first, last = (
        run_ranks(4, parts_of_rank, folders["late"], LAYOUTS["pp2-dp2-ep2"])[rank] for rank in (0, 2)
    )
    assert first[EXPERTS] == 0 < first[DENSE]
    assert min(last[EXPERTS], last[DENSE]) > 0


def refusal(rank, world_size, folder, parallel, source, router):
    policy, _ = new_policy(folder, parallel, router)
    try:
        load_checkpoint(policy.modules, policy.optimizer, source)
    except UserError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(("before", "now"), [(FROZEN, TRAINED), (TRAINED, FROZEN)], ids=str)
def test_a_run_cannot_change_whether_its_router_is_trained(folders, saved, before, now):
    source, _ = saved("qwen3_moe", "1", before)
    answers = run_ranks(2, refusal, folders["qwen3_moe"], LAYOUTS["dp2-ep2"], source, now)
    values = f"{before['trainable']} there and {now['trainable']} here".lower()
    expected = f"does not fit this run: model.router.trainable is {values}, which a run cannot change"
    assert [answer.removeprefix(f"checkpoint {source} ") for answer in answers] == [expected] * 2


def prepended_dimensions(rank, world_size, folder, parallel):
    policy, _ = new_policy(folder, parallel, TRAINED)
    state = distributed._sharded_state(policy.modules, policy.optimizer, is_loading=False)
    values = [
        value.build() if isinstance(value, ShardedTensorFactory) else value for value in nested_values(state)
    ]
    return {item.prepend_axis_num for item in nested_values(values) if isinstance(item, ShardedTensor)}


def test_no_tensor_is_compared_with_those_of_all_other_experts(folders):
    """Megatron-Core does that with prepended dimensions: a quadratic number of comparisons (`stacked_axes.py`)."""
    found = run_ranks(2, prepended_dimensions, folders["qwen3_moe"], LAYOUTS["dp2-ep2"])
    assert found == [{0}, {0}]


def save_in_both_ways(rank, world_size, folder, parallel, own, megatrons):
    """A checkpoint of this package, and Megatron-Core's of the same state (it gathers the optimizer's)."""
    policy, shards = new_policy(folder, parallel, TRAINED)
    train(policy, shards, 2)
    CheckpointWriter().start(policy.modules, policy.optimizer, own, asynchronous=False)
    metadata = ensure_metadata_has_dp_cp_group(
        {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    )
    model = policy.modules[0].sharded_state_dict(metadata=metadata)
    optimizer = policy.optimizer.sharded_state_dict(dict(model), metadata=metadata)
    dist_checkpointing.save({"model": model, "optimizer": optimizer}, str(megatrons))


def all_tensors(rank, world_size, *folders):
    return [
        {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
        for loaded in (dist_checkpointing.load_plain_tensors(str(folder)) for folder in folders)
    ]


@pytest.mark.parametrize("layout", ["dp2-ep2", "tp2-cp2-ep2-etp2"])
def test_every_tensor_is_that_of_megatrons_format(folders, tmp_path, layout):
    both, parallel = [tmp_path / "own", tmp_path / "megatrons"], LAYOUTS[layout]
    for folder in both:
        folder.mkdir()
    run_ranks(parallel.world_size, save_in_both_ways, folders["qwen3_moe"], parallel, *both)
    own, megatrons = run_ranks(1, all_tensors, *both)[0]
    assert len([key for key in own if "experts" in key]) == 2 * 4
    assert own.keys() == megatrons.keys()
    assert all(torch.equal(tensor, megatrons[key]) for key, tensor in own.items())
