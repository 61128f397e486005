"""The adapters in the documentation, on plain tensors. `tests/adapters` runs them under the real TRL and verl."""

import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo import fipo_loss
from tests.pages import code_blocks, run_blocks

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""log_probs with gradient, old log_probs, advantages, mask: [B, L]."""


def micro_batches() -> list[Batch]:
    """Two micro-batches of unequal size."""
    generator = torch.Generator().manual_seed(0)
    batches: list[Batch] = []
    for rows, length in ((3, 20), (2, 50)):
        old = -torch.rand(rows, length, generator=generator)
        new = (old + 0.2 * torch.randn(rows, length, generator=generator)).requires_grad_()
        advantages = torch.randn(rows, 1, generator=generator).expand(rows, length)
        batches.append((new, old, advantages, torch.rand(rows, length, generator=generator) > 0.2))
    return batches


def joint_gradient(batches: list[Batch]) -> list[Tensor]:
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


def assert_gradients(batches: list[Batch]) -> None:
    for (new, *_), expected in zip(batches, joint_gradient(batches), strict=True):
        torch.testing.assert_close(new.grad, expected)


def ppo_sum(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The loss of TRL (dapo with delta) and of verl (vanilla) before the division, with the bounds of the recipe."""
    ratio = (new - old).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    return (torch.where(advantages < 0, torch.minimum(loss, -10 * advantages), loss) * mask).sum()


def test_both_pages_compute_the_same_weights() -> None:
    assert code_blocks("use-in-trl.md")[0] == code_blocks("use-in-verl.md")[0]


def test_all_blocks_compile() -> None:
    for page in ("use-in-trl.md", "use-in-verl.md"):
        for block in code_blocks(page):
            compile(block, page, "exec")


def load_trl_adapter(monkeypatch: pytest.MonkeyPatch, outputs: int) -> Any:
    """The page's trainer on a class with the interface of GRPOTrainer that it uses. `outputs` log-probs, entropies, ..."""

    class Trainer:
        accumulated, per_generation = 1, 2
        epsilon_low, epsilon_high, args = 0.2, 0.28, SimpleNamespace(delta=10.0)

        def __init__(self) -> None:
            self.model = torch.nn.Identity()
            self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}

        def _get_per_token_logps_and_entropies(self, model: Any, log_probs: Tensor) -> tuple:
            return (log_probs, torch.zeros_like(log_probs), None)[:outputs]

        def compute_loss(
            self, model: Any, inputs: dict, return_outputs: bool, num_items_in_batch: Any
        ) -> Tensor:
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            advantages = inputs["advantages"]  # before the log-probs, unlike TRL: the order does not matter
            values = self._get_per_token_logps_and_entropies(model, inputs["log_probs"])
            assert len(values) == outputs
            old = inputs.get("old_per_token_logps")
            old = values[0].detach() if old is None else old
            tokens = inputs["num_items_in_batch"] / 2 * self.accumulated / self.per_generation
            return ppo_sum(values[0], old, advantages, mask) / tokens

    module = ModuleType("trl")
    module.GRPOTrainer, module.GRPOConfig = Trainer, None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl", module)
    return run_blocks("use-in-trl.md", 0, 1)["FIPOTrainer"]()


@pytest.mark.parametrize("outputs", [2, 3])
@pytest.mark.parametrize("tools", [False, True])
def test_trl_adapter_gives_the_mean_over_a_step(
    monkeypatch: pytest.MonkeyPatch, outputs: int, tools: bool
) -> None:
    """Two processes with one micro-batch each. TRL counts the tokens of the two steps that were generated at once."""
    trainer = load_trl_adapter(monkeypatch, outputs)
    batches = micro_batches()
    tokens = sum(int(mask.sum()) for *_, mask in batches)
    for new, old, advantages, mask in batches:
        masks = (
            {"completion_mask": torch.ones_like(mask), "tool_mask": mask}
            if tools
            else {"completion_mask": mask}
        )
        inputs = {
            "log_probs": new,
            "old_per_token_logps": old,
            "advantages": advantages[:, 0],
            "num_items_in_batch": torch.tensor(2 * tokens),
            **masks,
        }
        (trainer.compute_loss(trainer.model, inputs) / 2).backward()
        assert inputs["advantages"] is not advantages
        assert inputs["advantages"].shape == new.shape[:1]
    assert_gradients(batches)
    assert len(trainer._metrics["train"]["influence/mean"]) == 2


def test_trl_adapter_without_old_log_probs_has_weights_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = load_trl_adapter(monkeypatch, 3)
    new, _, advantages, mask = micro_batches()[0]
    inputs = {
        "log_probs": new,
        "old_per_token_logps": None,
        "advantages": advantages[:, 0],
        "completion_mask": mask,
        "num_items_in_batch": 4 * mask.sum(),
    }
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, -(advantages * mask).sum() / mask.sum())
    assert trainer._metrics["train"]["influence/max"] == [1]
    trainer._get_per_token_logps_and_entropies(trainer.model, new)  # outside the loss: nothing to weight


def load_verl_adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's function, registered in a module with the interface of verl's that it uses."""
    registry: dict[str, Any] = {}

    def vanilla(
        *, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    ):  # type: ignore[no-untyped-def]
        assert (loss_agg_mode, rollout_is_weights) == ("token-mean", None)
        batch = config.global_batch_info
        total = ppo_sum(log_prob, old_log_prob, advantages, response_mask)
        return total / batch["batch_num_tokens"] * batch["dp_size"], {"actor/ppo_kl": 0.0}

    registry["vanilla"] = vanilla
    module = ModuleType("verl.trainer.ppo.core_algos")
    module.get_policy_loss_fn = registry.__getitem__  # type: ignore[attr-defined]
    module.register_policy_loss = lambda name: lambda f: registry.setdefault(name, f)  # type: ignore[attr-defined]
    for name in ("verl", "verl.trainer", "verl.trainer.ppo", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    run_blocks("use-in-verl.md", 0, 1)
    return registry["fipo"]


def test_verl_adapter_gives_the_mini_batch_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl adds the micro-batches of a rank and averages over ranks; here each of two ranks has one."""
    loss_function = load_verl_adapter(monkeypatch)
    batches = micro_batches()
    tokens = sum(int(mask.sum()) for *_, mask in batches)
    config = SimpleNamespace(
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=10.0,
        global_batch_info={"batch_num_tokens": tokens, "dp_size": 2},
    )
    for new, old, advantages, mask in batches:
        loss, metrics = loss_function(
            old_log_prob=old,
            log_prob=new,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode="token-mean",
            config=config,
            rollout_is_weights=None,
        )
        (loss / 2).backward()
        assert metrics["actor/policy/dropped_sequences"] == 0
        assert "actor/ppo_kl" in metrics
    assert_gradients(batches)
