"""The stream of Hugging Face tensors for weight sync matches its description and does not accumulate."""

import pytest
import torch.distributed as dist

from megatron_fipo.checkpoint.hf_export import describe_hf_tensors, iterate_hf_tensors
from megatron_fipo.config import ParallelConfig
from tests.model.reference import build, make_reference
from tests.ranks import run_ranks


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("to_host", [True, False])
def test_what_is_announced_on_every_rank_is_what_comes(tmp_path, tied, to_host):
    make_reference(tmp_path, tied, "qwen2")
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)

    def body(rank, world):
        chunks = build(tmp_path, parallel)
        announced = [(info.name, info.dtype, info.shape) for info in describe_hf_tensors(chunks)]
        received = [
            (name, None if tensor is None else (tensor.dtype, tuple(tensor.shape)))
            for name, tensor in iterate_hf_tensors(chunks, to_host=to_host)
        ]
        return announced, received

    (announced, received), *others = run_ranks(4, body)
    assert [(name, *described) for name, described in received] == announced
    for other_announced, other_received in others:
        assert other_announced == announced
        assert other_received == [(name, None) for name, _, _ in announced]


def test_a_later_stage_has_one_weight_on_its_way_at_a_time(tmp_path):
    """It must wait for a first stage that waits for engines, and not buffer all weights of its stage."""
    make_reference(tmp_path, False, "qwen2")
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)

    def body(rank, world):
        sent, in_flight, most = 0, 0, 0
        isend = dist.isend

        class Counted:
            def __init__(self, work):
                self.work = work

            def wait(self):
                nonlocal in_flight
                in_flight -= 1
                return self.work.wait()

        def counting(*args, **kwargs):
            nonlocal sent, in_flight, most
            sent += 1
            in_flight += 1
            most = max(most, in_flight)
            return Counted(isend(*args, **kwargs))

        dist.isend = counting
        for _ in iterate_hf_tensors(build(tmp_path, parallel)):
            pass
        return sent, most, in_flight

    first, second, third, fourth = run_ranks(4, body)
    assert first == second == fourth == (0, 0, 0)
    sent, most, left = third
    assert sent > 10
    assert (most, left) == (3, 0), "query, key and value are sent together"
