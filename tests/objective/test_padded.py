"""The framework-free API: shapes, dtypes, refusals, and what importing it costs."""

import subprocess
import sys

import pytest
import torch

from megatron_fipo import FIPOConfig, fipo_loss, future_kl
from megatron_fipo.objective import padded
from megatron_fipo.objective.config import ObjectiveConfig
from tests.objective.oracle import future_kl_by_definition, oracle_loss
from tests.objective.packed import random_responses


def batch(length: int = 60):
    members = random_responses(4, [length] * 5, outliers=0.03)
    stacked = (
        torch.stack([getattr(r, name) for r in members])
        for name in ("log_probs", "old_log_probs", "advantages", "mask")
    )
    log_probs, old, advantages, mask = stacked
    return members, (log_probs.detach().requires_grad_(), old, advantages, mask)


@pytest.mark.parametrize("normalization", ["token_mean", "response_mean", "reference_micro_batch"])
def test_matches_the_oracle(normalization) -> None:
    config = FIPOConfig(influence_clip=(0.8, 1.2), normalization=normalization)
    members, (log_probs, old, advantages, mask) = batch()
    expected = oracle_loss(members, config)
    result = fipo_loss(log_probs, old, advantages, mask, config)
    result.loss.backward()
    expected.loss.backward()
    assert result.loss.dtype == torch.float64
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    torch.testing.assert_close(
        log_probs.grad, torch.stack([r.log_probs.grad for r in members]), rtol=1e-10, atol=1e-14
    )
    assert result.loss_mask.any(1).tolist() == expected.kept
    assert not all(expected.kept)


def test_the_filter_of_future_kl_can_be_switched_off() -> None:
    """Without it a token above the dual clip enters F of the tokens before it: 3 and more at the token itself."""
    found = {}
    for filtered in (True, False):
        config = FIPOConfig(influence_clip=None, drop_dual_clipped=False, filter_future_kl=filtered)
        members, (log_probs, old, advantages, mask) = batch()
        expected = oracle_loss(members, config)
        result = fipo_loss(log_probs, old, advantages, mask, config)
        result.loss.backward()
        expected.loss.backward()
        torch.testing.assert_close(result.future_kl, torch.stack(expected.future_kl), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            log_probs.grad, torch.stack([r.log_probs.grad for r in members]), rtol=1e-10, atol=1e-14
        )
        found[filtered] = result
        outliers = ((log_probs - old).exp() > config.dual_clip) & mask.bool()
    assert outliers.any()
    added = found[False].future_kl - found[True].future_kl
    assert (added[outliers] > 2.3).all()
    assert (found[False].influence_weights != found[True].influence_weights).any()
    share = "policy/dual_clip_fraction"
    assert found[False].statistics[share] == found[True].statistics[share] > 0


def test_whatever_lies_under_the_mask_is_ignored() -> None:
    _, (log_probs, old, advantages, mask) = batch()
    clean = fipo_loss(log_probs, old, advantages, mask)
    dirty = torch.where(mask.bool(), log_probs.detach(), torch.nan).requires_grad_()
    result = fipo_loss(dirty, old, advantages, mask)
    result.loss.backward()
    assert torch.equal(result.loss, clean.loss)
    assert torch.equal(result.future_kl, clean.future_kl)
    assert dirty.grad is not None
    assert dirty.grad.isfinite().all()
    assert result.statistics["policy/nonfinite_sequences"] == 0


def test_masks_of_every_kind_mean_the_same() -> None:
    _, (log_probs, old, advantages, mask) = batch()
    losses = [
        fipo_loss(log_probs, old, advantages, mask.to(dtype)).loss
        for dtype in (torch.bool, torch.uint8, torch.float32)
    ]
    assert losses[0] == losses[1] == losses[2]


def test_half_precision_is_raised() -> None:
    _, (log_probs, old, advantages, mask) = batch()
    leaf = log_probs.detach().bfloat16().requires_grad_()
    result = fipo_loss(leaf, old.bfloat16(), advantages.bfloat16(), mask)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert leaf.grad.dtype == torch.bfloat16
    x = old.bfloat16()
    expected = torch.stack([future_kl_by_definition(row, 32.0) for row in (x.double() * mask)])
    torch.testing.assert_close(future_kl(x, mask, 32.0).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (3, 1)])
def test_small_and_empty_batches(shape) -> None:
    log_probs = torch.zeros(shape, requires_grad=True)
    zeros = torch.zeros(shape)
    result = fipo_loss(log_probs, zeros, zeros, torch.zeros(shape, dtype=torch.bool))
    result.loss.backward()
    assert result.loss == 0
    assert result.future_kl.shape == shape
    assert log_probs.grad is not None
    assert not log_probs.grad.any()


def test_bad_inputs_are_named() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(
        ValueError,
        match=r"old_log_probs must be floating \[2, 3\] like response_mask, not torch.float32 \[2, 4\]",
    ):
        fipo_loss(x, torch.zeros(2, 4), x, mask)
    with pytest.raises(ValueError, match=r"log_probs must be floating .* not torch.int64"):
        fipo_loss(x.long(), x, x, mask)
    with pytest.raises(ValueError, match="advantages must be floating"):
        fipo_loss(x, x, torch.zeros(2), mask)
    with pytest.raises(
        ValueError, match=r"response_mask must be bool, integer or floating .* not torch.complex64"
    ):
        fipo_loss(x, x, x, mask.to(torch.complex64))
    with pytest.raises(ValueError, match=r"\[B, L\], not torch.float32 \[3\]"):
        future_kl(x[0], mask[0], 32.0)
    with pytest.raises(ValueError, match="half_life must be positive, not 0"):
        future_kl(x, mask, 0)


BAD_SETTINGS = [
    (FIPOConfig, {"half_life": 0.0}),
    (FIPOConfig, {"half_life": float("nan")}),
    (FIPOConfig, {"influence_clip": (1.2, 1.0)}),
    (FIPOConfig, {"influence_clip": (-0.5, 1.0)}),
    (FIPOConfig, {"influence_clip": (1.0,)}),
    (FIPOConfig, {"safety_threshold": -3.0}),
    (FIPOConfig, {"clip_low": 1.5}),
    (FIPOConfig, {"clip_high": -0.1}),
    (FIPOConfig, {"dual_clip": 0.5}),
    (FIPOConfig, {"normalization": "mean"}),
    (FIPOConfig, {"normalization": None}),
    (FIPOConfig, {"normalization": 1}),
    (FIPOConfig, {"half_life": None}),
    (FIPOConfig, {"name": None}),
    (ObjectiveConfig, {"name": "ppo"}),
    (ObjectiveConfig, {"name": "grpo", "kl_coefficient": -0.1}),
    (ObjectiveConfig, {"name": "fipo", "kl_coefficient": 0.1}),
    (ObjectiveConfig, {"entropy_coefficient": -0.1}),
    (ObjectiveConfig, {"correction": "clip"}),
    (ObjectiveConfig, {"correction_cap": 0.0}),
    (ObjectiveConfig, {"correction_cap": float("nan")}),
]


@pytest.mark.parametrize(("kind", "values"), BAD_SETTINGS, ids=lambda value: str(value))
def test_impossible_settings_are_named(kind, values) -> None:
    field, value = list(values.items())[-1]
    with pytest.raises(ValueError) as caught:
        kind(**values)
    assert str(value) in str(caught.value)
    assert field.split("_coefficient")[0] in f"{caught.value} name"


def test_the_default_device_does_not_matter() -> None:
    _, (log_probs, old, advantages, mask) = batch()
    expected = fipo_loss(log_probs, old, advantages, mask).loss
    padded._rectangle.cache_clear()
    with torch.device("meta"):
        found = fipo_loss(log_probs, old, advantages, mask)
    assert torch.equal(found.loss, expected)


def test_without_tokens_the_lowest_weight_is_a_plain_zero() -> None:
    nothing = torch.zeros(2, 3)
    statistics = fipo_loss(nothing, nothing, nothing, nothing).statistics
    assert str(float(statistics["influence/min"])) == "0.0"
    assert not any(statistics.values())


TORCH_ONLY = """
import importlib.metadata, sys

FROM_TORCH = {"torch", "functorch", "torchgen", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock",
              "fsspec", "typing_extensions"}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top not in FROM_TORCH and top != "megatron_fipo":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
from megatron_fipo import FIPOConfig, fipo_loss, future_kl

log_probs = (-torch.rand(2, 300)).requires_grad_()
mask = torch.arange(300) < torch.tensor([[300], [140]])
result = fipo_loss(log_probs, log_probs.detach() - 0.1, torch.ones(2, 300), mask, FIPOConfig(half_life=8.0))
result.loss.backward()
assert log_probs.grad.abs().sum() > 0 and future_kl(log_probs, mask, 32.0).shape == (2, 300)
print("imported", sorted({name.split(".")[0] for name in sys.modules} & {"numpy", "megatron", "ray", "yaml"}))
"""


def test_the_loss_runs_with_torch_and_nothing_else() -> None:
    """Loss, gradient and FutureKL in a fresh interpreter in which importing anything but torch fails, NumPy included."""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", TORCH_ONLY], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "imported []"
