"""The adapters in the documentation run as printed."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_fipo import fipo_loss

DOCS = Path(__file__).parents[2] / "docs"


def run_adapter(page: str) -> dict:
    """The names that the first code block of a page defines; the others, which import verl or trl, only have to compile."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    for block in blocks:
        compile(block, page, "exec")
    names: dict = {}
    exec(blocks[0], names)
    return names


def micro_batches() -> list[tuple[torch.Tensor, ...]]:
    """Two micro-batches of unequal size: log_probs, old log_probs, advantages, mask."""
    generator = torch.Generator().manual_seed(0)
    batches: list[tuple[torch.Tensor, ...]] = []
    for rows, length in ((3, 20), (2, 50)):
        old = -torch.rand(rows, length, generator=generator)
        new = (old + 0.2 * torch.randn(rows, length, generator=generator)).requires_grad_()
        advantages = torch.randn(rows, 1, generator=generator).expand(rows, length)
        batches.append((new, old, advantages, torch.rand(rows, length, generator=generator) > 0.2))
    return batches


def whole_gradient(batches: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """The gradient of the mean over all tokens, computed in one piece."""
    pad = 50
    joined = [
        torch.cat([torch.nn.functional.pad(b[i].detach(), (0, pad - b[i].shape[1])) for b in batches])
        for i in range(4)
    ]
    log_probs = joined[0].requires_grad_()
    fipo_loss(log_probs, joined[1], joined[2], joined[3]).loss.backward()
    assert log_probs.grad is not None
    return [log_probs.grad[:3, :20], log_probs.grad[3:]]


def assert_gradients(batches: list[tuple[torch.Tensor, ...]]) -> None:
    for (new, *_), expected in zip(batches, whole_gradient(batches), strict=True):
        torch.testing.assert_close(new.grad, expected)


def test_verl_adapter_gives_the_mini_batch_mean() -> None:
    """verl adds the micro-batches of a rank and averages over ranks; here each of two ranks has one."""
    loss_function = run_adapter("use-in-verl.md")["fipo_policy_loss"]
    batches = micro_batches()
    tokens = sum(int(mask.sum()) for *_, mask in batches)
    config = SimpleNamespace(global_batch_info={"batch_num_tokens": tokens, "dp_size": 2})
    for new, old, advantages, mask in batches:
        loss, metrics = loss_function(old, new, advantages, mask, "token-mean", config)
        (loss / 2).backward()
        assert metrics["actor/policy/tokens"] == mask.sum()
    assert_gradients(batches)


def test_verl_adapter_without_global_counts_is_the_micro_batch_mean() -> None:
    loss_function = run_adapter("use-in-verl.md")["fipo_policy_loss"]
    new, old, advantages, mask = micro_batches()[0]
    assert torch.equal(
        loss_function(old, new, advantages, mask)[0], fipo_loss(new, old, advantages, mask).loss
    )
    with pytest.raises(ValueError, match="rollout correction"):
        loss_function(old, new, advantages, mask, rollout_is_weights=torch.ones(3, 20))


def test_trl_adapter_gives_the_batch_mean() -> None:
    """DDP averages over processes; here each of two processes has one micro-batch."""
    loss_function = run_adapter("use-in-trl.md")["fipo_loss_for_trl"]
    batches = micro_batches()
    tokens = sum(int(mask.sum()) for *_, mask in batches)
    for new, old, advantages, mask in batches:
        inputs = {
            "old_per_token_logps": old,
            "advantages": advantages[:, 0],
            "completion_mask": torch.ones_like(mask).long(),
            "tool_mask": mask.long(),
            "num_items_in_batch": torch.tensor(tokens),
        }
        loss, _ = loss_function(new, inputs, num_processes=2)
        (loss / 2).backward()
    assert_gradients(batches)
    assert loss_function(new, {**inputs, "old_per_token_logps": None})[1].future_kl.abs().max() == 0
