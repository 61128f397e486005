"""The log-prob head against autograd through full float64 logits: values and gradients, shard by shard.

A head can have the right forward and a wrong tensor-parallel gradient, so every case compares the gradient of the hidden states
and of this rank's slice of the weight.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.config import HeadConfig
from megatron_fipo.model.head import HeadRequest, response_log_probs
from tests.ranks import run_ranks

TOKENS, HIDDEN, VOCABULARY, TEMPERATURE = 24, 10, 27, 0.7


def _inputs(columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    rows = torch.tensor([1, 2, 3, 7, 8, 9, 10, 15, 20, 23])
    return {
        "hidden": draw(TOKENS, 1, HIDDEN),
        "weight": draw(columns, HIDDEN),
        "rows": rows,
        "labels": torch.randint(0, VOCABULARY, rows.shape, generator=generator),
        "grad_log_probs": draw(*rows.shape) * (rows != 9),
        "grad_entropy": draw(*rows.shape) * (rows != 9),
    }


def _reference(columns: int, entropy_gradient: bool) -> dict[str, torch.Tensor]:
    given = _inputs(columns)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    logits = hidden[given["rows"], 0] @ weight[:VOCABULARY].t() / TEMPERATURE
    log_probabilities = logits.log_softmax(dim=-1)
    log_probs = log_probabilities.gather(1, given["labels"][:, None]).squeeze(1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    loss = (log_probs * given["grad_log_probs"]).sum()
    if entropy_gradient:
        loss = loss + (entropy * given["grad_entropy"]).sum()
    loss.backward()
    return {
        "log_probs": log_probs.detach(),
        "entropy": entropy.detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
    }


def _head_on_rank(
    rank: int, world_size: int, columns: int, settings: HeadConfig, sequence_parallel: bool, entropy_gradient: bool
) -> dict[str, torch.Tensor]:
    given = _inputs(columns)
    hidden = given["hidden"].chunk(world_size)[rank] if sequence_parallel else given["hidden"]
    hidden = hidden.clone().requires_grad_()
    weight = given["weight"].chunk(world_size)[rank].clone().requires_grad_()
    request = HeadRequest(given["rows"], given["labels"], VOCABULARY, TEMPERATURE, settings, entropy_gradient)
    log_probs, entropy = response_log_probs(hidden, weight, request, dist.group.WORLD, sequence_parallel)
    loss = (log_probs * given["grad_log_probs"]).sum()
    if entropy_gradient:
        loss = loss + (entropy * given["grad_entropy"]).sum()
    loss.backward()
    return {"log_probs": log_probs.detach(), "entropy": entropy.detach(), "hidden": hidden.grad, "weight": weight.grad}


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize(
    ("world_size", "columns", "sequence_parallel", "settings"),
    [
        (1, 27, False, HeadConfig(chunk_size=1024)),
        (1, 32, False, HeadConfig(chunk_size=3)),
        (1, 32, False, HeadConfig(chunk_size=3, logits_memory_mb=1)),
        (2, 32, False, HeadConfig(chunk_size=4)),
        (2, 32, True, HeadConfig(chunk_size=4)),
        (2, 56, False, HeadConfig(chunk_size=4)),  # the second slice is padding alone
        (4, 32, True, HeadConfig(chunk_size=7, logits_memory_mb=1)),
    ],
)
def test_values_and_gradients_equal_full_logits(world_size, columns, sequence_parallel, settings, entropy_gradient):
    expected = _reference(columns, entropy_gradient)
    shards = run_ranks(world_size, _head_on_rank, columns, settings, sequence_parallel, entropy_gradient)
    hidden_shards = expected["hidden"].chunk(world_size) if sequence_parallel else [expected["hidden"]] * world_size
    weight_shards = expected["weight"].chunk(world_size)
    for shard, hidden, weight in zip(shards, hidden_shards, weight_shards, strict=True):
        torch.testing.assert_close(shard["log_probs"], expected["log_probs"], rtol=0, atol=1e-12)
        torch.testing.assert_close(shard["entropy"], expected["entropy"], rtol=0, atol=1e-12)
        torch.testing.assert_close(shard["hidden"], hidden, rtol=0, atol=1e-12)
        torch.testing.assert_close(shard["weight"], weight, rtol=0, atol=1e-12)


def _one_rank(given: dict[str, torch.Tensor], entropy_gradient: bool = False, memory_mb: int = 0):
    request = HeadRequest(given["rows"], given["labels"], VOCABULARY, TEMPERATURE, HeadConfig(4, memory_mb), entropy_gradient)
    return response_log_probs(given["hidden"], given["weight"], request, None, False)


def test_weight_gradient_goes_into_main_grad_in_float32():
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in _inputs(32).items()}
    weight = given["weight"].requires_grad_()
    weight.main_grad = torch.full(weight.shape, 2.0)
    log_probs, _ = _one_rank(given)
    assert log_probs.dtype == torch.float32
    log_probs.sum().backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad.abs().max() == 0
    expected = _inputs(32)
    exact = expected["weight"].requires_grad_()
    _one_rank(expected)[0].sum().backward()
    torch.testing.assert_close(weight.main_grad - 2.0, exact.grad.float(), rtol=0.05, atol=0.1)


def test_no_rows_gives_zero_gradient_on_every_parameter():
    given = _inputs(32)
    given |= {"rows": given["rows"][:0], "labels": given["labels"][:0]}
    given["hidden"].requires_grad_()
    given["weight"].requires_grad_()
    log_probs, _ = _one_rank(given)
    log_probs.sum().backward()
    assert given["hidden"].grad.abs().max() == 0
    assert given["weight"].grad.abs().max() == 0


def test_a_row_without_gradient_contains_its_own_nan():
    given = _inputs(32)
    given["hidden"][2] = torch.nan
    given["hidden"].requires_grad_()
    given["weight"].requires_grad_()
    log_probs, _ = _one_rank(given)
    assert log_probs[1].isnan()
    torch.where(log_probs.isnan(), 0.0, log_probs).sum().backward()
    assert given["weight"].grad.isfinite().all()
    assert given["hidden"].grad.isfinite().all()


def test_kept_logits_are_bounded_by_the_budget_and_absent_by_default():
    given = {k: v.float() if v.is_floating_point() else v for k, v in _inputs(2**15).items()}
    given["hidden"].requires_grad_()
    saved: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    for memory_mb, kept in ((0, 0), (1, 2)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            _one_rank(given, memory_mb=memory_mb)
        assert sum(size == 4 * 2**15 for size in saved) == kept
