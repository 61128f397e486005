"""A rank's random numbers continue where they were saved, on the same rank and in the same layout only."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_fipo.checkpoint.rng import load_rng, save_rng
from megatron_fipo.config import ParallelConfig
from megatron_fipo.errors import UserError
from megatron_fipo.model import parallel as model_parallel
from tests.ranks import run_ranks

TP2 = ParallelConfig(tensor_model_parallel_size=2)


def draw() -> list[torch.Tensor]:
    """Numbers from the default generator and from each state that Megatron keeps."""
    tracker = get_cuda_rng_tracker()
    numbers = [torch.rand(5)]
    for name in sorted(tracker.get_states()):
        with tracker.fork(name):
            numbers.append(torch.rand(5))
    return numbers


def save_draw_load_draw(rank, world_size, folder):
    model_parallel.initialize(TP2, seed=1)
    torch.manual_seed(100 + rank)
    draw()
    save_rng(folder, rank)
    dist.barrier()
    first = draw()
    torch.manual_seed(7)
    draw()
    assert load_rng(folder, rank, world_size)
    return first, draw()


def test_each_rank_draws_what_would_have_come_next(tmp_path):
    drawn = run_ranks(2, save_draw_load_draw, tmp_path)
    for first, second in drawn:
        assert len(first) > 1
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not torch.equal(drawn[0][0][0], drawn[1][0][0])
    assert sorted(path.name for path in tmp_path.glob("rng/*")) == [
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    ]


def load_elsewhere(rank, world_size, parallel, folder):
    model_parallel.initialize(parallel, seed=1)
    before = torch.get_rng_state()
    answer = load_rng(folder, rank, world_size)
    return answer, torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(pipeline_model_parallel_size=2),
        ParallelConfig(context_parallel_size=2),
        ParallelConfig(data_parallel_size=2),
        ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=2),
    ],
    ids=["1", "pp2", "cp2", "dp2", "tp2-dp2"],
)
def test_another_layout_takes_nothing(tmp_path, parallel):
    run_ranks(2, save_draw_load_draw, tmp_path)
    assert set(run_ranks(parallel.world_size, load_elsewhere, parallel, tmp_path)) == {(False, True)}


def load_damaged(rank, world_size, folder):
    model_parallel.initialize(TP2, seed=1)
    try:
        load_rng(folder, rank, world_size)
    except UserError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("damage", ["missing", "malformed"])
def test_a_missing_or_damaged_file_is_named(tmp_path, damage):
    run_ranks(2, save_draw_load_draw, tmp_path)
    path = tmp_path / "rng" / "rank_00001.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:50])
    assert run_ranks(2, load_damaged, tmp_path)[0] == "loaded"
    assert str(path) in run_ranks(2, load_damaged, tmp_path)[1]


def save_nowhere(rank, world_size, folder):
    model_parallel.initialize(ParallelConfig(), seed=1)
    try:
        save_rng(folder / "absent", rank)
    except UserError as error:
        return str(error)
    return "saved"


def test_a_disk_that_refuses_is_a_sentence(tmp_path):
    assert run_ranks(1, save_nowhere, tmp_path)[0].startswith(f"cannot write {tmp_path}")
