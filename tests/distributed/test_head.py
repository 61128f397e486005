"""The log-prob head against autograd through full float64 logits: values and gradients, shard by shard; and what it holds.

A head can have the right forward and a wrong tensor-parallel gradient, so every case compares the gradient of the hidden states
and of this rank's slice of the weight. With ROWS rows in float64 a workspace of 1 MiB is a slab of 128 columns.
"""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fipo.config import HeadConfig, ParallelConfig
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.logprob_head.head import HeadRequest, response_log_probs
from tests.ranks import run_ranks

TOKENS, ROWS, HIDDEN, VOCABULARY, TEMPERATURE = 500, 450, 10, 300, 0.7
WIDE, NARROW, KEEP = HeadConfig(), HeadConfig(workspace_mb=1), HeadConfig(workspace_mb=1, logits_memory_mb=1)
BORDERS = (0, 127, 128, 159, 160, 191, 192, 255, 256, 299)
"""Words where a slab or a rank's slice begins or ends in one of the cases below."""


def _inputs(columns: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[: len(BORDERS)] = torch.tensor(BORDERS)
    given = {
        "hidden": draw(TOKENS, 1, HIDDEN),
        "weight": draw(columns, HIDDEN),
        "rows": torch.randperm(TOKENS, generator=generator)[:ROWS].sort().values,
        "labels": labels,
        "grad_log_probs": draw(ROWS),
        "grad_entropy": draw(ROWS),
    }
    given["grad_log_probs"][4], given["grad_entropy"][4] = 0, 0
    given["grad_log_probs"][5], given["grad_entropy"][6] = 0, 0
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}


def _reference(given: dict[str, torch.Tensor], entropy_gradient: bool) -> dict[str, torch.Tensor]:
    given = {
        name: value.detach().double() if value.is_floating_point() else value for name, value in given.items()
    }
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    logits = hidden[given["rows"], 0] @ weight[:VOCABULARY].t() / TEMPERATURE
    log_probabilities = logits.log_softmax(dim=-1)
    log_probs = log_probabilities.gather(1, given["labels"][:, None]).squeeze(1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    _loss(given, log_probs, entropy, entropy_gradient).backward()
    return {
        "log_probs": log_probs.detach(),
        "entropy": entropy.detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
    }


def _loss(given, log_probs, entropy, entropy_gradient):
    loss = (log_probs * given["grad_log_probs"]).sum()
    return loss + (entropy * given["grad_entropy"]).sum() if entropy_gradient else loss


def _head_on_rank(
    rank: int,
    world_size: int,
    columns: int,
    settings: HeadConfig,
    sequence_parallel: bool,
    entropy_gradient: bool,
) -> dict[str, torch.Tensor]:
    given = _inputs(columns)
    hidden = given["hidden"].chunk(world_size)[rank] if sequence_parallel else given["hidden"]
    hidden = hidden.clone().requires_grad_()
    weight = given["weight"].chunk(world_size)[rank].clone().requires_grad_()
    request = HeadRequest(given["rows"], given["labels"], VOCABULARY, TEMPERATURE, settings, entropy_gradient)
    log_probs, entropy = response_log_probs(hidden, weight, request, dist.group.WORLD, sequence_parallel)
    _loss(given, log_probs, entropy, entropy_gradient).backward()
    return {
        "log_probs": log_probs.detach(),
        "entropy": entropy.detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
    }


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize(
    ("world_size", "columns", "sequence_parallel", "settings"),
    [
        (1, 300, False, WIDE),
        (1, 300, False, NARROW),  # 128, 128 and 44 columns
        (1, 320, False, KEEP),  # two slabs of three are kept
        (1, 512, False, NARROW),  # the last slab is padding alone
        (2, 384, False, NARROW),
        (2, 384, True, KEEP),
        (2, 640, False, NARROW),  # the second slice is padding alone
        (4, 320, True, WIDE),
        (4, 640, False, KEEP),  # the second slice is partly padding
    ],
)
def test_values_and_gradients_equal_full_logits(
    world_size, columns, sequence_parallel, settings, entropy_gradient
):
    expected = _reference(_inputs(columns), entropy_gradient)
    shards = run_ranks(world_size, _head_on_rank, columns, settings, sequence_parallel, entropy_gradient)
    hidden_shards = (
        expected["hidden"].chunk(world_size) if sequence_parallel else [expected["hidden"]] * world_size
    )
    weight_shards = expected["weight"].chunk(world_size)
    for shard, hidden, weight in zip(shards, hidden_shards, weight_shards, strict=True):
        torch.testing.assert_close(shard["log_probs"], expected["log_probs"], rtol=0, atol=1e-12)
        torch.testing.assert_close(shard["entropy"], expected["entropy"], rtol=0, atol=1e-12)
        torch.testing.assert_close(shard["hidden"], hidden, rtol=0, atol=1e-12)
        torch.testing.assert_close(shard["weight"], weight, rtol=0, atol=1e-12)


def _one_rank(
    given: dict[str, torch.Tensor],
    settings: HeadConfig = NARROW,
    entropy_gradient: bool = False,
    vocabulary: int = VOCABULARY,
):
    request = HeadRequest(given["rows"], given["labels"], vocabulary, TEMPERATURE, settings, entropy_gradient)
    return response_log_probs(given["hidden"], given["weight"], request, None, False)


@pytest.mark.parametrize("settings", [WIDE, NARROW, KEEP], ids=["wide", "narrow", "keep"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_half_precision_costs_the_gradient_its_rounding_and_the_values_nothing(settings, entropy_gradient):
    """Products of bf16 numbers, summed in float32: log-probs as in float32, gradients to bf16's two or three digits."""
    given = _inputs(320, torch.bfloat16)
    expected = _reference(given, entropy_gradient)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    log_probs, entropy = _one_rank(given, settings, entropy_gradient)
    assert log_probs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected["log_probs"], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected["entropy"], rtol=0, atol=1e-5)
    _loss(given, log_probs, entropy, entropy_gradient).backward()
    for found, exact in ((hidden.grad, expected["hidden"]), (weight.grad, expected["weight"])):
        assert found.dtype == torch.bfloat16
        assert (found.double() - exact).norm() < 0.01 * exact.norm()


def test_kept_distances_are_rounded_least_where_the_probability_is_highest():
    """Logits near 1,000 keep 8 bits of their distance to the row's highest, not of themselves (where bf16 steps by 4)."""
    given = _inputs(300, torch.bfloat16)
    given["hidden"][..., 0], given["weight"][:, 0] = 32, 32
    expected = _reference(given, False)["hidden"]
    given["hidden"].requires_grad_()
    _loss(given, *_one_rank(given, HeadConfig(logits_memory_mb=512)), False).backward()
    assert (given["hidden"].grad.double() - expected)[..., 1:].norm() < 0.02 * expected[..., 1:].norm()


def test_a_second_backward_is_refused_and_the_callers_hidden_states_stay():
    """Backward clears rows of the head's own copy of the hidden states, so it could not be right a second time."""
    given = _inputs(320)
    before = given["hidden"].clone()
    log_probs, _ = _one_rank(given | {"hidden": given["hidden"].requires_grad_()})
    loss = (log_probs * given["grad_log_probs"]).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(given["hidden"], before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_rows_gives_zero_gradient_on_every_parameter():
    given = _inputs(320)
    given |= {"rows": given["rows"][:0], "labels": given["labels"][:0]}
    given["hidden"].requires_grad_()
    given["weight"].requires_grad_()
    log_probs, _ = _one_rank(given)
    log_probs.sum().backward()
    assert given["hidden"].grad.abs().max() == 0
    assert given["weight"].grad.abs().max() == 0


@pytest.mark.parametrize("settings", [NARROW, KEEP], ids=["recompute", "keep"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_a_row_without_gradient_contains_its_own_nan(settings, entropy_gradient):
    given = _inputs(320)
    clean = _inputs(320)
    for inputs in (given, clean):
        inputs["grad_log_probs"][1], inputs["grad_entropy"][1] = 0, 0
        inputs["hidden"].requires_grad_()
        inputs["weight"].requires_grad_()
    with torch.no_grad():
        given["hidden"][given["rows"][1]] = torch.nan
    log_probs, entropy = _one_rank(given, settings, entropy_gradient)
    assert log_probs.isnan().nonzero().flatten().tolist() == [1]
    _loss(
        given,
        torch.where(log_probs.isnan(), 0.0, log_probs),
        torch.where(entropy.isnan(), 0.0, entropy),
        entropy_gradient,
    ).backward()
    _loss(clean, *_one_rank(clean, settings, entropy_gradient), entropy_gradient).backward()
    torch.testing.assert_close(given["weight"].grad, clean["weight"].grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(given["hidden"].grad, clean["hidden"].grad, rtol=0, atol=1e-12)
    assert given["hidden"].grad[given["rows"][1]].abs().max() == 0


def test_products_on_a_gpu_take_half_precision_and_give_float32():
    """The operators of the GPU's path, by shape and dtype alone."""
    given = {name: value.to("meta") for name, value in _inputs(320, torch.bfloat16).items()}
    weight = given["weight"].requires_grad_()
    weight.main_grad = torch.empty(weight.shape, device="meta")
    given["hidden"].requires_grad_()
    with Kernels() as kernels:
        log_probs, _ = _one_rank(given)
        log_probs.sum().backward()
    assert given["hidden"].grad.dtype == torch.bfloat16
    assert [name for name in kernels.names if "mm" in name] == ["mm.dtype_out"] * 3 + [
        "mm.dtype_out",
        "addmm.dtype_out",
        "addmm.dtype_out",
    ] * 3


class Kernels(TorchDispatchMode):
    """Names of all operators, and every tensor that one made, as (operator, bytes); views of an argument are not made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function).removeprefix("aten.")
        if name == "addmm.dtype_out":  # on the meta device torch 2.10 and 2.11 take the dtype for a factor
            function, args = torch.ops.aten.mm.dtype_out, args[1:]
        result = function(*args, **kwargs)
        self.names.append(name)
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            inside = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            if all(
                result.untyped_storage().data_ptr() != value.untyped_storage().data_ptr() for value in inside
            ):
                self.made.append((name, result.nbytes))
        return result


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tensor_is_larger_than_the_workspace_or_of_the_weights_size(dtype, entropy_gradient):
    columns = 2**15  # four slabs
    given = _inputs(columns, dtype)
    rows = slice(0, 16)
    given |= {name: given[name][rows] for name in ("rows", "labels", "grad_log_probs", "grad_entropy")}
    weight = given["weight"].requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    given["hidden"].requires_grad_()
    assert weight.nbytes > 2**20
    with Kernels() as kernels:
        _loss(given, *_one_rank(given, NARROW, entropy_gradient, columns), entropy_gradient).backward()
    assert max(size for _, size in kernels.made) <= 2**20 / 2  # a slab exists twice: logits and exponentials


def test_kept_logits_are_bounded_by_the_budget_and_absent_by_default():
    given = _inputs(2**12, torch.float32)
    given["hidden"].requires_grad_()
    saved: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    for memory_mb, kept in ((0, 0), (1, 2), (2, 4)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            _one_rank(given, HeadConfig(workspace_mb=1, logits_memory_mb=memory_mb), vocabulary=2**12)
        assert sum(size == ROWS * 256 for size in saved) == kept


@pytest.mark.parametrize(
    ("weight_dtype", "main_dtype"),
    [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")],
)
@pytest.mark.parametrize("settings", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_weights_gradient_is_added_to_main_grad(weight_dtype, main_dtype, settings):
    given = _inputs(320, getattr(torch, weight_dtype))
    expected = _reference(given, False)["weight"]
    weight = given["weight"].requires_grad_()
    weight.main_grad = torch.full(weight.shape, 2.0, dtype=getattr(torch, main_dtype))
    before = weight.detach().clone()
    for times in (1, 2):  # weight.grad is not cleared in between, as Megatron would
        _loss(given, *_one_rank(given, settings), False).backward()
        error = (weight.main_grad.double() - 2.0 - times * expected).norm() / (times * expected.norm())
        assert error < (1e-5 if weight_dtype == "float32" else 0.005)
    assert weight.grad_added_to_main_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("tied", [False, True])
def test_beside_main_grad_only_a_tied_weight_gets_memory_for_a_gradient(tied):
    given = _inputs(320, torch.float32)
    weight = given["weight"].requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    weight.zero_out_wgrad = tied
    with Kernels() as kernels:
        _one_rank(given, WIDE)[0].sum().backward()
    assert sum(size == weight.nbytes for _, size in kernels.made) == tied
    if tied:
        assert weight.grad.abs().max() == 0
    else:
        assert weight.grad.data_ptr() == weight.data_ptr()


def test_two_uses_of_a_weight_in_one_backward_leave_it_alone():
    """Autograd adds what both return before Megatron's hook sees it; it must not do so in the weight's memory."""
    given = _inputs(320, torch.float32)
    weight = given["weight"].requires_grad_()
    weight.main_grad, before = torch.zeros_like(weight), weight.detach().clone()
    expected = _reference(given, False)["weight"]
    (_loss(given, *_one_rank(given), False) + _loss(given, *_one_rank(given), False)).backward()
    assert torch.equal(weight, before)
    torch.testing.assert_close(weight.main_grad.double(), 2 * expected, rtol=1e-4, atol=1e-4)


class OutputLayer(torch.nn.Module):
    """The head after hidden states, or after an embedding that shares its weight."""

    def __init__(self, given: dict[str, torch.Tensor], tied: bool) -> None:
        super().__init__()
        self.given = given
        self.weight = torch.nn.Parameter(given["weight"].clone())
        self.tied = tied
        if tied:
            self.weight.zero_out_wgrad = True

    def forward(self) -> torch.Tensor:
        tokens = torch.arange(TOKENS) % VOCABULARY
        hidden = self.weight[tokens].unsqueeze(1) if self.tied else self.given["hidden"]
        return _loss(self.given, *_one_rank(self.given | {"hidden": hidden, "weight": self.weight}), False)


def _through_megatron(rank: int, world_size: int, tied: bool, overlap: bool):
    """Two micro-batches on each of two data-parallel ranks, the second scaled by 3: (main_grad, .grad, whether the weight changed)."""
    model_parallel.initialize(ParallelConfig(data_parallel_size=world_size), seed=1)
    layer = OutputLayer(_inputs(320, torch.float32), tied)
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, calculate_per_token_loss=True
    )
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    model = DistributedDataParallel(config, ddp_config, layer)
    before = layer.weight.detach().clone()
    with model.no_sync():
        model().backward()
    (3 * (rank + 1) * model()).backward()
    model.finish_grad_sync()
    assert parallel_state.get_data_parallel_world_size() == world_size
    return layer.weight.main_grad.clone(), layer.weight.grad, torch.equal(layer.weight, before)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_through_megatrons_data_parallel_wrapper_the_gradient_is_autograds(tied, overlap):
    given = _inputs(320, torch.float32)
    plain = OutputLayer(
        {name: value.double() if value.is_floating_point() else value for name, value in given.items()}, tied
    )
    plain().backward()
    for main_grad, grad, unchanged in run_ranks(2, _through_megatron, tied, overlap):
        torch.testing.assert_close(
            main_grad.double(), (2 + 3 * 1 + 3 * 2) * plain.weight.grad, rtol=1e-4, atol=1e-3
        )
        assert grad is None
        assert unchanged
