"""The implementation that a call takes, and the error if the requested one cannot run."""

import pytest
import torch

from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.kernels import choice as kernel_choice
from megatron_fipo.objective.kernels.choice import describe_kernels, kernels_obstacle, takes_triton
from megatron_fipo.objective.loss import policy_loss
from tests.objective.packed import packed_rows, random_responses, zigzag

ANY = (torch.float32,)


def test_plain_torch_computes_on_a_cpu_unless_told_otherwise() -> None:
    assert not takes_triton("auto", torch.zeros(1), ANY)
    assert not takes_triton("torch", torch.zeros(1), ANY)
    assert describe_kernels("auto", torch.device("cpu")) == "plain torch"


@pytest.mark.parametrize(
    ("installed", "interpret", "dtype", "message"),
    [
        (
            False,
            "0",
            torch.float32,
            "kernels is triton, but Triton is not installed .pip install triton.; use auto or torch",
        ),
        (True, "0", torch.float32, "the tensors are on cpu"),
        (True, "1", torch.bfloat16, "its kernels do not take torch.bfloat16"),
    ],
)
def test_a_wish_for_triton_that_cannot_be_met_is_refused(
    installed, interpret, dtype, message, monkeypatch
) -> None:
    monkeypatch.setattr(kernel_choice, "_has_triton", lambda: installed)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(ValueError, match=message):
        takes_triton("triton", torch.zeros(1, dtype=dtype), ANY)
    assert not takes_triton("auto", torch.zeros(1, dtype=dtype), ANY)


def test_the_obstacle_is_known_before_a_run_starts(monkeypatch) -> None:
    monkeypatch.setattr(kernel_choice, "_has_triton", lambda: False)
    cpu = torch.device("cpu")
    assert kernels_obstacle("triton", cpu) == "Triton is not installed (pip install triton)"
    assert kernels_obstacle("auto", cpu) is kernels_obstacle("torch", cpu) is None


def test_an_unknown_choice_is_named() -> None:
    with pytest.raises(ValueError, match="one of auto, torch, triton, not 'cuda'"):
        takes_triton("cuda", torch.zeros(1), ANY)


def test_the_loss_refuses_before_any_collective(monkeypatch) -> None:
    monkeypatch.setattr(kernel_choice, "_has_triton", lambda: False)
    rows, _ = packed_rows(random_responses(0, [5]), [3], zigzag([8], 1), 0)
    with pytest.raises(ValueError, match="Triton is not installed"):
        policy_loss(
            rows.old_log_probs,
            None,
            rows,
            ObjectiveConfig(),
            group_that_must_not_be_asked(),
            kernels="triton",
        )


def group_that_must_not_be_asked():
    class Group:
        def __getattr__(self, name):
            raise AssertionError(f"the group was asked for {name}")

    return Group()


def test_a_gpu_without_triton_says_so(monkeypatch) -> None:
    monkeypatch.setattr(kernel_choice, "_has_triton", lambda: False)
    described = describe_kernels("auto", torch.device("cuda"))
    assert (
        described == "plain torch, the same numbers more slowly: Triton is not installed (pip install triton)"
    )
    assert describe_kernels("torch", torch.device("cuda")) == "plain torch"


def test_a_gpu_that_is_too_old_says_so(monkeypatch) -> None:
    monkeypatch.setattr(kernel_choice, "_has_triton", lambda: True)
    monkeypatch.setattr(kernel_choice, "_capability", lambda device: (7, 0))
    assert "compute capability 7.0 and Triton needs 8.0" in describe_kernels("auto", torch.device("cuda"))
