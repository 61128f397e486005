"""Nothing between the log-probabilities and their gradient waits for the device."""

from collections.abc import Callable

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fipo import fipo_loss, future_kl
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss import policy_loss
from tests.objective.packed import packed_rows, random_responses, zigzag

FORBIDDEN_CALLS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "nonzero",
    "masked_select",
    "unique",
    "__bool__",
    "__int__",
    "__float__",
}
FORBIDDEN_KERNELS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal"}


class HostSyncError(AssertionError):
    pass


class NoHostCalls(TorchFunctionMode):
    """Refuses the Python calls that copy a number to the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in FORBIDDEN_CALLS:
            raise HostSyncError(function.__name__)
        return function(*args, **(kwargs or {}))


class NoHostKernels(TorchDispatchMode):
    """Refuses the operators that must know values on the host: scalar reads, data-dependent shapes, copies between devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in FORBIDDEN_KERNELS:
            raise HostSyncError(name)
        if name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            raise HostSyncError(f"{name} with a boolean mask")
        if name == "_to_copy" and kwargs.get("device", args[0].device) != args[0].device:
            raise HostSyncError(f"copy to {kwargs['device']}")
        return function(*args, **kwargs)


def run_watched(function: Callable[[], torch.Tensor]) -> None:
    with NoHostKernels(), NoHostCalls():
        function().backward()


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x.sum() * x.sum().item(),
        lambda x: x[x > 0].sum(),
        lambda x: x[x.nonzero()].sum(),
        lambda x: x.sum() if x.sum() > 0 else x.mean(),
        lambda x: x.to("meta").sum(),
        lambda x: x.sum() * x.detach().sum().tolist(),
    ],
)
def test_the_watch_sees_a_sync(bad) -> None:
    x = torch.randn(5, requires_grad=True)
    with pytest.raises(HostSyncError):
        run_watched(lambda: bad(x))


@pytest.mark.parametrize(
    ("name", "normalization"),
    [
        ("fipo", "token_mean"),
        ("fipo", "response_mean"),
        ("fipo", "reference_micro_batch"),
        ("dapo", "token_mean"),
        ("dapo", "reference_micro_batch"),
        ("grpo", "token_mean"),
    ],
)
@pytest.mark.parametrize("correction", ["none", "tis", "mis"])
def test_the_packed_loss_never_syncs(name, normalization, correction) -> None:
    rows, _ = packed_rows(random_responses(0, [300, 4]), [5, 6], zigzag([305, 10], 1), 0)
    log_probs = (rows.old_log_probs + 0.1).requires_grad_()
    objective = ObjectiveConfig(
        name=name,
        normalization=normalization,
        kl_coefficient=0.1 * (name == "grpo"),
        entropy_coefficient=0.1,
        correction=correction,
    )

    def loss() -> torch.Tensor:
        result = policy_loss(log_probs, -log_probs, rows, objective)
        result.statistics.merge(result.statistics).tensors()
        return result.loss_sum

    run_watched(loss)


def test_the_dense_loss_never_syncs() -> None:
    """Its plan depends on the shape alone, and is made once per shape."""
    old, mask = torch.randn(3, 200), torch.rand(3, 200) > 0.4
    log_probs = (old + 0.1).requires_grad_()
    fipo_loss(log_probs, old, old, mask)
    run_watched(lambda: fipo_loss(log_probs, old, old, mask).loss + future_kl(old, mask, 32.0).sum())
