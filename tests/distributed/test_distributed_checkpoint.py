"""Weights and optimizer saved under one layout resume under another; a misfit or damage is one sentence on every rank."""

import multiprocessing
import re
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_fipo.checkpoint import distributed
from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_checkpoint, load_weights_only
from megatron_fipo.config import ParallelConfig
from megatron_fipo.errors import UserError
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.trainer import rank_model
from megatron_fipo.trainer.rank_model import RankModel
from tests.distributed.test_policy_grid import FIPO, LAYOUTS, batch, exported, make_shards
from tests.distributed.tiny import settings, write_model
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def model():
    with tempfile.TemporaryDirectory() as folder:
        yield write_model(Path(folder) / "model")


@pytest.fixture(autouse=True, scope="module")
def forked_managers():
    """Megatron's queue of results lives in a process that each rank spawns, which takes seconds of imports; fork it instead."""
    with pytest.MonkeyPatch.context() as patch:
        for name in {"_get_write_results_queue", "get_write_results_queue"} & set(vars(filesystem_async)):
            patch.setattr(filesystem_async, name, forked_results_queue)
        yield


def forked_results_queue():
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    return filesystem_async._results_queue


def new_policy(folder: Path, parallel: ParallelConfig, dtype: str = "float32", **changes):
    """A policy with the folder's weights, and this rank's shards of a batch. `changes` are settings of the optimizer."""
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    arguments = settings(folder, parallel, lr=1e-3, dtype=dtype)
    arguments["optimizer"] = replace(arguments["optimizer"], **changes)
    policy = RankModel(**arguments, device=torch.device("cpu"))
    policy.load_hf(folder)
    trajectories, offsets = batch()
    return policy, make_shards(policy, parallel, trajectories, offsets.astype("float32"), 160)


def optimizer_state(policy: RankModel, copy: bool = True) -> list[torch.Tensor]:
    """Everything this rank's optimizer holds: its own copy of the parameters, both moments, and the step."""
    optimizers = [
        part.optimizer for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    ]
    groups = [group for inner in optimizers for group in inner.param_groups]
    parts = [
        part
        for inner in optimizers
        for group in inner.param_groups
        for p in group["params"]
        for part in (p, *inner.state[p].values())
    ]
    steps = torch.tensor([float(group.get("step", 0)) for group in groups])
    return [*(part.detach().clone() if copy else part for part in parts), steps]


def train(policy: RankModel, shards, steps: int):
    """The loss of each step (None on ranks that do not see it), then weights and this rank's optimizer state."""
    losses = [policy.policy_step(shards, FIPO, lr=1e-3).statistics.get("policy/loss") for _ in range(steps)]
    return losses, exported(policy), optimizer_state(policy)


def step_and_save(rank, world_size, folder, parallel, target, steps, changes):
    """Some steps, a save, and three steps to compare with."""
    policy, shards = new_policy(folder, parallel, **changes)
    train(policy, shards, steps)
    CheckpointWriter().start(policy.modules, policy.optimizer, target, asynchronous=False)
    return train(policy, shards, 3)


def load_and_step(rank, world_size, folder, parallel, source, changes):
    policy, shards = new_policy(folder, parallel, **changes)
    load_checkpoint(policy.modules, policy.optimizer, source)
    return train(policy, shards, 3)


def assert_same_training(straight, resumed):
    """Bit by bit, on every rank."""
    for (losses, weights, state), (losses_found, weights_found, state_found) in zip(
        straight, resumed, strict=True
    ):
        assert losses == losses_found
        assert all(torch.equal(weights_found[name], tensor) for name, tensor in weights.items())
        assert len(state) > 10
        assert all(torch.equal(*pair) for pair in zip(state, state_found, strict=True))


@pytest.fixture(scope="module")
def saved(model):
    """By layout: the folder that it saved after two steps, and how its ranks continued. Each is trained once."""
    with tempfile.TemporaryDirectory() as folder:
        made = {}

        def make(layout: str):
            if layout not in made:
                target = Path(folder) / layout
                target.mkdir()
                world_size = LAYOUTS[layout].world_size
                made[layout] = (
                    target,
                    run_ranks(world_size, step_and_save, model, LAYOUTS[layout], target, 2, {}),
                )
            return made[layout]

        yield make


@pytest.mark.parametrize("layout", ["1", "tp2-dp2", "pp2-vpp2"])
def test_the_same_layout_goes_on_bit_by_bit(model, saved, layout):
    source, straight = saved(layout)
    resumed = run_ranks(LAYOUTS[layout].world_size, load_and_step, model, LAYOUTS[layout], source, {})
    assert_same_training(straight, resumed)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tp2-dp2", "pp2"),
        ("tp2-dp2", "1"),
        ("pp2-vpp2", "cp2"),
        ("1", "tp2-sp"),
        ("1", "dp2"),
        ("cp4", "tp2-dp2"),
        ("pp2-vpp2-dp2", "dp4"),
    ],
)
def test_training_goes_on_under_another_layout(model, saved, before, after):
    source, straight = saved(before)
    resumed = run_ranks(LAYOUTS[after].world_size, load_and_step, model, LAYOUTS[after], source, {})
    expected = next(losses for losses, _, _ in straight if losses[0] is not None)
    found = next(losses for losses, _, _ in resumed if losses[0] is not None)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, tensor in straight[0][1].items():
        torch.testing.assert_close(resumed[0][1][name], tensor, rtol=1e-5, atol=1e-6)


def with_megatrons_format(function):
    """A rank's function, with Megatron-Core's own format, which gathers the optimizer's state."""

    def run(*arguments):
        distributed.distributed_parts = lambda optimizer: {}
        return function(*arguments)

    return run


@pytest.mark.parametrize("gathered", ["writer", "reader"])
@pytest.mark.parametrize("layout", ["cp4", "tp2-dp2"])
def test_the_state_without_a_gather_is_that_of_megatrons_format(model, tmp_path, layout, gathered):
    """Checkpoints of version 0.1 load, and Megatron-Core's own reader takes those of this one."""
    write, read = step_and_save, load_and_step
    if gathered == "writer":
        write = with_megatrons_format(write)
    else:
        read = with_megatrons_format(read)
    parallel = LAYOUTS[layout]
    straight = run_ranks(parallel.world_size, write, model, parallel, tmp_path, 2, {})
    assert_same_training(straight, run_ranks(parallel.world_size, read, model, parallel, tmp_path, {}))


def with_numbered_parameters(function):
    """A rank's function that saves as version 0.1, which numbered the parameters of the optimizer's one part."""

    def run(*arguments):
        state_of_parts = distributed.sharded_optimizer_state

        def numbered(*of_state):
            state = state_of_parts(*of_state)
            return {**state, "param_state": dict(enumerate(state["param_state"].values()))}

        distributed.sharded_optimizer_state = numbered
        return function(*arguments)

    return run


def test_checkpoints_of_a_version_without_parts_of_the_optimizer_load(model, tmp_path):
    parallel, write = LAYOUTS["tp2-dp2"], with_numbered_parameters(step_and_save)
    straight = run_ranks(parallel.world_size, write, model, parallel, tmp_path, 2, {})
    assert_same_training(
        straight, run_ranks(parallel.world_size, load_and_step, model, parallel, tmp_path, {})
    )


def addresses_of_blocks(rank, world_size, folder, pinned):
    """Of the optimizer's tensors, of what is saved, and of what is loaded into. `pinned`: whether memory counts as that."""
    policy, _ = new_policy(folder, LAYOUTS["1"])
    torch.Tensor.is_pinned = lambda tensor: pinned
    kept = []  # until all addresses are known, so that none is used again
    for is_loading in (False, True):
        state = distributed._sharded_state(policy.modules, policy.optimizer, is_loading)
        entries = state["optimizer"]["param_state"].values()
        kept.append([part.data for entry in entries for parts in entry["blocks"].values() for part in parts])
    kept.append(optimizer_state(policy, copy=False))
    return [{part.untyped_storage().data_ptr() for part in parts} for parts in kept]


def test_a_writer_gets_copies_of_pinned_memory(model):
    [(saved, loaded, live)] = run_ranks(1, addresses_of_blocks, model, False)
    assert saved <= live
    assert loaded <= live
    [(saved, loaded, live)] = run_ranks(1, addresses_of_blocks, model, True)
    assert not saved & live
    assert loaded <= live


def with_small_buckets(function, size: int = 5_000):
    """A rank's function, with gradients in buckets of a few tensors, each divided among the ranks."""

    def run(*arguments):
        rank_model.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=size)
        return function(*arguments)

    return run


def test_buckets_of_gradients_do_not_show_in_a_checkpoint(model, saved, tmp_path):
    parallel = replace(LAYOUTS["dp2"], overlap_communication=True)
    source, _ = saved("dp2")
    straight = run_ranks(2, load_and_step, model, parallel, source, {})
    resumed = run_ranks(2, with_small_buckets(load_and_step), model, parallel, source, {})
    assert straight[0][0] == pytest.approx(resumed[0][0], rel=1e-6)
    write, read = with_small_buckets(step_and_save), with_small_buckets(load_and_step)
    straight = run_ranks(2, write, model, parallel, tmp_path, 2, {})
    assert_same_training(straight, run_ranks(2, read, model, parallel, tmp_path, {}))


def test_ranks_may_have_no_element_of_a_bucket(model, tmp_path):
    """With a bucket for each tensor the last ranks have only padding of most of them."""
    parallel = replace(LAYOUTS["dp4"], overlap_communication=True)
    write, read = with_small_buckets(step_and_save, 1), with_small_buckets(load_and_step, 1)
    straight = run_ranks(4, write, model, parallel, tmp_path, 2, {})
    assert_same_training(straight, run_ranks(4, read, model, parallel, tmp_path, {}))
    ((losses, _, _),) = run_ranks(1, load_and_step, model, LAYOUTS["1"], tmp_path, {})
    assert losses == pytest.approx(straight[0][0], rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bfloat16"}, {"distributed": False}, {"dtype": "bfloat16", "distributed": False}],
    ids=str,
)
def test_other_optimizers_go_on_bit_by_bit(model, tmp_path, changes):
    straight = run_ranks(1, step_and_save, model, LAYOUTS["1"], tmp_path, 1, changes)
    assert_same_training(straight, run_ranks(1, load_and_step, model, LAYOUTS["1"], tmp_path, changes))


def test_a_run_saved_before_its_first_step_goes_on(model, tmp_path):
    straight = run_ranks(2, step_and_save, model, LAYOUTS["dp2"], tmp_path, 0, {})
    assert_same_training(straight, run_ranks(2, load_and_step, model, LAYOUTS["dp2"], tmp_path, {}))


def adam_settings(rank, world_size, folder, parallel, source):
    policy, _ = new_policy(folder, parallel, adam_beta2=0.5, adam_eps=1e-3)
    load_checkpoint(policy.modules, policy.optimizer, source)
    return {(group["betas"], group["eps"], group["step"]) for group in policy.optimizer.param_groups}


def test_the_settings_of_adam_are_those_of_the_present_run(model, saved):
    beta1 = settings(model, LAYOUTS["1"])["optimizer"].adam_beta1
    assert run_ranks(1, adam_settings, model, LAYOUTS["1"], saved("1")[0]) == [{((beta1, 0.5), 1e-3, 2)}]


def save_weights(rank, world_size, folder, parallel, target):
    policy, shards = new_policy(folder, parallel)
    train(policy, shards, 1)
    CheckpointWriter().start(policy.modules, None, target, asynchronous=False)
    return exported(policy)


def load_weights(rank, world_size, folder, parallel, sources):
    policy, shards = new_policy(folder, parallel)
    train(policy, shards, 3)
    before, found = optimizer_state(policy)[1:3], []
    for source in sources:
        load_weights_only(policy.modules, source)
        found.append(exported(policy))
    assert all(torch.equal(*pair) for pair in zip(before, optimizer_state(policy)[1:3], strict=True))
    return found


def test_weights_alone_come_from_checkpoints_with_and_without_optimizer(model, saved, tmp_path):
    (tmp_path / "weights").mkdir()
    weights = run_ranks(2, save_weights, model, LAYOUTS["tp2"], tmp_path / "weights")[0]
    (tmp_path / "start").mkdir()
    run_ranks(1, step_and_save, model, LAYOUTS["1"], tmp_path / "start", 0, {})
    found = run_ranks(2, load_weights, model, LAYOUTS["pp2"], [tmp_path / "start", tmp_path / "weights"])[0]
    original = run_ranks(1, loaded_from_hf, model)[0]
    assert all(torch.equal(found[0][name], tensor) for name, tensor in original.items())
    assert all(torch.equal(found[1][name], tensor) for name, tensor in weights.items())


def loaded_from_hf(rank, world_size, folder):
    return exported(new_policy(folder, LAYOUTS["1"])[0])


def try_loading(rank, world_size, folder, parallel, sources):
    """The sentence that each folder gets, and whether anything had changed by then."""
    policy, shards = new_policy(folder, parallel)
    _, weights, state = train(policy, shards, 1)
    answers = []
    for source in sources:
        try:
            load_checkpoint(policy.modules, policy.optimizer, source)
            answers.append(("loaded", True))
        except UserError as error:
            same = all(torch.equal(weights[name], tensor) for name, tensor in exported(policy).items())
            same = same and all(
                torch.equal(*pair) for pair in zip(state, optimizer_state(policy), strict=True)
            )
            answers.append((str(error), not same))
    return answers


def check_refused(answers, *expected: str):
    """On every rank the same words, in one line, and nothing changed."""
    for of_rank in answers:
        for (message, changed), words in zip(of_rank, expected, strict=True):
            assert words in message
            assert "\n" not in message
            assert not changed


def test_a_checkpoint_of_another_model_names_what_differs(saved, tmp_path):
    shallow = write_model(tmp_path / "shallow", layers=2)
    tied = write_model(tmp_path / "tied", tied=True)
    source, _ = saved("tp2-dp2")
    for folder, difference in (
        (shallow, "does not fit this run: num_layers is 4 there and 2 here"),
        (tied, "does not fit this run: share_embeddings_and_output_weights is False there and True here"),
    ):
        check_refused(run_ranks(2, try_loading, folder, LAYOUTS["tp2"], [source]), difference)


def test_damaged_and_incomplete_checkpoints_are_one_sentence_on_every_rank(model, saved, tmp_path):
    source, _ = saved("1")
    names = ["no_index", "garbled_index", "no_common", "not_complete", "absent"]
    for name in names[:-1]:
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "no_index" / ".metadata").unlink()
    (tmp_path / "garbled_index" / ".metadata").write_bytes(b"\x80garbage")
    common = tmp_path / "no_common" / "common.pt"  # part of the data from Megatron-Core 0.19 on
    apart = common.exists()
    (common if apart else next(common.parent.glob("*.distcp"))).unlink()
    (tmp_path / "not_complete" / "metadata.json").unlink()
    (tmp_path / "weights").mkdir()
    run_ranks(2, save_weights, model, LAYOUTS["tp2"], tmp_path / "weights")
    answers = run_ranks(
        2, try_loading, model, LAYOUTS["tp2"], [tmp_path / name for name in [*names, "weights"]]
    )
    check_refused(
        answers,
        *[f"checkpoint {tmp_path / name} cannot be read: rank 0:" for name in names],
        "it lacks optimizer.",
    )
    assert ("if Megatron-Core 0.19 or later wrote it" in answers[0][names.index("no_common")][0]) == apart


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_data_are_one_sentence_on_every_rank(model, saved, tmp_path, damage):
    shutil.copytree(saved("tp2-dp2")[0], tmp_path / "copy")
    largest = max((tmp_path / "copy").glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "cut":
        largest.write_bytes(largest.read_bytes()[:2000])
    else:
        largest.unlink()
    for [(message, _)] in run_ranks(2, try_loading, model, LAYOUTS["dp2"], [tmp_path / "copy"]):
        # The same file holds the common state, read first, from Megatron-Core 0.19 on.
        assert re.match(f"checkpoint {tmp_path / 'copy'} (is damaged|cannot be read): rank ", message)
        assert "Traceback" not in message
        assert "\n" not in message
