"""`docs/use-in-trl.md` under the real TRL."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from trl import GRPOTrainer

from megatron_fipo import FIPOConfig, fipo_loss
from tests.adapters.trl_runs import FIPOTrainer, UnweightedTrainer, make_trainer, train
from tests.pages import ROOT, run_blocks

RESCALES = Version(version("trl")) >= Version("1.9.1")
"""Since then TRL divides by the tokens of one optimizer step, not by those of all that were generated at once."""


def test_the_page_runs_as_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    log = [
        entry for entry in run_blocks("use-in-trl.md")["trainer"].state.log_history if "grad_norm" in entry
    ]
    assert len(log) == 4
    assert log[0]["influence/max"] == log[0]["influence/mean"] == 1  # the policy is still the old one
    assert all(
        1 < entry["influence/max"] < 1.201 and entry["policy/sigma_log_ratio"] > 0 for entry in log[1:]
    )


@pytest.mark.parametrize(
    ("per_generation", "accumulated", "iterations", "mask_truncated"),
    [
        (4, 1, 1, False),
        (4, 1, 1, True),
        (4, 2, 1, True),
        (2, 2, 2, False),
        (1, 1, 3, True),
        (8, 2, 2, False),
        (2, 4, 1, False),
    ],
)
def test_weights_of_one_give_the_gradient_of_dapo(
    tmp_path: Path, per_generation: int, accumulated: int, iterations: int, mask_truncated: bool
) -> None:
    settings = {
        "steps_per_generation": per_generation,
        "gradient_accumulation_steps": accumulated,
        "num_iterations": iterations,
        "mask_truncated_completions": mask_truncated,
    }
    ours, log = train(UnweightedTrainer, tmp_path, **settings)
    theirs, their_log = train(GRPOTrainer, tmp_path, **settings)
    assert [entry["grad_norm"] for entry in log] == pytest.approx([entry["grad_norm"] for entry in their_log])
    assert all(entry["grad_norm"] > 1e-3 for entry in log)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    truncated = [entry["completions/clipped_ratio"] for entry in log if "completions/clipped_ratio" in entry]
    assert 0 < sum(truncated) / len(truncated) < 1  # both kinds occur


def test_two_processes(tmp_path: Path) -> None:
    """Weights of 1 give TRL's own weights; FIPO's differ, and are the same on both ranks."""
    launch = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.adapters.trl_runs",
    ]
    result = subprocess.run(
        [sys.executable, "-m", *launch, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-3000:]
    runs = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for run in runs:
        torch.testing.assert_close(run["UnweightedTrainer"], run["GRPOTrainer"], rtol=1e-6, atol=1e-8)
    assert all(
        torch.equal(*pair) for pair in zip(runs[0]["FIPOTrainer"], runs[1]["FIPOTrainer"], strict=True)
    )
    assert any(
        not torch.allclose(*pair) for pair in zip(runs[0]["FIPOTrainer"], runs[0]["GRPOTrainer"], strict=True)
    )


def batch(trainer: GRPOTrainer, *, tools: bool = False, per_token: bool = False) -> dict[str, Any]:
    """Six completions: left- and right-padded, one masked entirely, ratios beyond the dual clip for either sign of A."""
    generator = torch.Generator().manual_seed(0)
    rows, prompt, length = 6, 5, 24
    prompt_mask = torch.arange(prompt) >= torch.tensor([0, 2, 1, 3, 0, 2])[:, None]
    mask = torch.arange(length) < torch.tensor([24, 17, 9, 0, 20, 12])[:, None]
    ids = torch.randint(3, 15, (rows, prompt + length), generator=generator)
    attention = torch.cat([prompt_mask, mask], 1).long()
    log_probs = log_probs_of(trainer, ids, attention, length).detach()
    old = log_probs - 0.3 * torch.randn(rows, length, generator=generator)
    advantages = torch.tensor([1.5, -1.0, -0.5, 2.0, -1.5, 0.5])
    old[0, 3] = log_probs[0, 3] - 3  # A > 0
    old[1, 4] = log_probs[1, 4] - 3  # A < 0, one: dual-clipped
    old[4, [2, 9]] = log_probs[4, [2, 9]] - 3  # A < 0, two: dropped
    inputs = {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": prompt_mask.long(),
        "completion_ids": ids[:, prompt:],
        "completion_mask": mask.long(),
        "old_per_token_logps": old,
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(700.0),  # of more than these rows
    }
    if tools:
        tools_mask = torch.rand(rows, length, generator=generator) > 0.3
        inputs["tool_mask"] = (tools_mask | (log_probs - old > 2)).long()
    if per_token:
        inputs["advantages"] = advantages[:, None] * (0.5 + torch.rand(rows, length, generator=generator))
    return inputs


def log_probs_of(
    trainer: GRPOTrainer, ids: torch.Tensor, attention: torch.Tensor, length: int
) -> torch.Tensor:
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, length)[0]


def gradients(trainer: GRPOTrainer, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(trainer.model.parameters()), materialize_grads=True))


def fresh(trainer: type[GRPOTrainer], folder: Path, **settings: Any) -> GRPOTrainer:
    """A trainer within a step of two micro-batches, eight of which were generated at once."""
    made = make_trainer(trainer, folder, gradient_accumulation_steps=2, steps_per_generation=8, **settings)
    made.current_gradient_accumulation_steps = 2
    made.model.train()
    return made


RECIPE_32B: dict[str, Any] = {"half_life": 32.0, "influence_clip": (1.0, 1.2), "safety_threshold": 10.0}
RECIPE_7B: dict[str, Any] = {"half_life": 32.0, "influence_clip": (0.8, 1.2), "safety_threshold": 3.0}


@pytest.mark.parametrize(
    ("fipo", "clip", "inputs"),
    [
        (RECIPE_32B, (0.2, 0.28, 10.0), {}),
        (RECIPE_32B, (0.2, 0.28, 10.0), {"tools": True}),
        (RECIPE_32B, (0.2, 0.28, 10.0), {"per_token": True}),
        (RECIPE_7B, (0.2, 0.28, 10.0), {"tools": True, "per_token": True}),
        ({**RECIPE_7B, "half_life": 3.0}, (0.1, 0.1, 3.0), {}),
        ({"influence_clip": None}, (0.2, 0.28, 10.0), {}),
        ({**RECIPE_32B, "drop_dual_clipped": False}, (0.2, 0.28, 10.0), {}),
    ],
)
def test_gradient_is_that_of_fipo_over_the_tokens_of_a_step(
    tmp_path: Path, fipo: dict[str, Any], clip: tuple[float, float, float], inputs: dict[str, bool]
) -> None:
    low, high, dual = clip
    trainer = fresh(FIPOTrainer, tmp_path, epsilon=low, epsilon_high=high, delta=dual)
    trainer.fipo = fipo
    given = batch(trainer, **inputs)
    before = {name: value.clone() for name, value in given.items()}
    seen = gradients(trainer, trainer.compute_loss(trainer.model, given))
    assert all(torch.equal(given[name], value) for name, value in before.items())  # TRL uses them again

    mask = given["completion_mask"] * given.get("tool_mask", 1)
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    attention = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    log_probs = log_probs_of(trainer, ids, attention, mask.shape[1])
    advantages = given["advantages"].reshape(len(mask), -1).expand(mask.shape)
    config = FIPOConfig(**fipo, clip_low=low, clip_high=high, dual_clip=dual)
    result = fipo_loss(log_probs, given["old_per_token_logps"], advantages, mask, config)
    dropped = (mask.any(1) & ~result.loss_mask.any(1)).sum()
    assert dropped == (1 if config.drops else 0)
    tokens = 700 * (2 / 8 if RESCALES else 1)
    expected = gradients(trainer, result.loss * result.loss_mask.sum() / tokens)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-7)
    assert trainer._metrics["train"]["policy/dropped_sequences"] == [dropped]


def test_evaluation_has_weights_of_one(tmp_path: Path) -> None:
    """Evaluation has no old log-probs, and its metrics do not mix with those of training."""
    ours, theirs = fresh(FIPOTrainer, tmp_path), fresh(GRPOTrainer, tmp_path)
    given = batch(ours) | {"old_per_token_logps": None}
    losses = []
    for trainer in (ours, theirs):
        trainer.model.eval()
        losses.append(trainer.compute_loss(trainer.model, given))
    torch.testing.assert_close(*losses)
    assert ours._metrics["eval"]["influence/max"] == [1]
    assert "influence/max" not in ours._metrics["train"]


def test_a_version_that_takes_the_log_probs_from_elsewhere_is_refused(tmp_path: Path) -> None:
    class Elsewhere(FIPOTrainer):  # type: ignore[misc, valid-type]
        _get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies

    trainer = fresh(Elsewhere, tmp_path)
    with pytest.raises(RuntimeError, match="does not support this version of TRL"):
        trainer.compute_loss(trainer.model, batch(trainer))


def test_delta_is_required(tmp_path: Path) -> None:
    trainer = fresh(FIPOTrainer, tmp_path, delta=None)
    with pytest.raises(ValueError, match="dual_clip must be above 1, not None"):
        trainer.compute_loss(trainer.model, batch(trainer))
