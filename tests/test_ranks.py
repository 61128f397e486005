import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def _sum(rank: int, world_size: int) -> float:
    value = torch.tensor(float(rank))
    dist.all_reduce(value)
    return value.item()


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one gives up")
    dist.barrier()


def test_results_come_back_by_rank():
    assert run_ranks(3, _sum) == [3.0, 3.0, 3.0]


def test_first_error_is_raised_with_its_rank():
    with pytest.raises(AssertionError, match="rank one gives up"):
        run_ranks(2, _fail_on_one)
