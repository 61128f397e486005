"""`docs/use-in-verl.md` under the real verl: its registry, its configuration, its call of a policy loss, its aggregation."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils
from verl.utils.import_utils import import_external_libs
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from megatron_fipo import fipo_loss
from tests.objective.test_golden import FILES, load
from tests.pages import code_blocks


@pytest.fixture(scope="module", autouse=True)
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page's module, imported by verl from the name in `model.external_lib`."""
    folder: Path = tmp_path_factory.mktemp("module")
    (folder / "fipo_verl.py").write_text("\n\n".join(code_blocks("use-in-verl.md")))
    sys.path.insert(0, str(folder))
    import_external_libs("fipo_verl")
    return sys.modules["fipo_verl"]


def actor(loss_mode: str = "fipo", **settings: Any) -> FSDPActorConfig:
    """verl's configuration of an actor, with the settings of the page unless others are given."""
    of_page = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 10.0}
    return FSDPActorConfig(
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        ppo_micro_batch_size_per_gpu=1,
        rollout_n=1,
        **(of_page | settings),
    )


Batch = dict[str, torch.Tensor]


def make_batch(rows: int, length: int, seed: int) -> Batch:
    """Responses of different lengths, with holes, ratios beyond the dual clip, and one response to drop."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths) & (torch.rand(rows, length, generator=generator) > 0.2)
    mask[:, 0] = mask[0, 2] = mask[0, 7] = True
    old = -torch.rand(rows, length, generator=generator)
    log_probs = old + 0.3 * torch.randn(rows, length, generator=generator)
    advantages = torch.randn(rows, 1, generator=generator)
    advantages[0] = -1.0
    log_probs[0, [2, 7]] += 5
    log_probs[1, 0] += 5
    return {
        "log_probs": log_probs,
        "old_log_probs": old,
        "advantages": advantages * mask,  # as verl computes them
        "response_mask": mask.long(),
        "lengths": lengths[:, 0],
    }


def verl_gradient(
    config: FSDPActorConfig, batch: Batch, tokens: int | None, sequences: int | None, ranks: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(loss, gradient [B, L], metrics) of a micro-batch by verl's `ppo_loss`, from a model's output without padding."""
    rows, length = batch["response_mask"].shape
    prompt = 3
    log_probs = batch["log_probs"].clone().requires_grad_()
    # verl reads the log-prob of a token at the position before it.
    pieces = [
        torch.cat([torch.zeros(prompt - 1), log_probs[row, :n], torch.zeros(1)])
        for row, n in enumerate(batch["lengths"].tolist())
    ]
    attention = torch.cat(
        [torch.ones(rows, prompt), torch.arange(length) < batch["lengths"][:, None]], dim=1
    ).long()
    fields = {name: batch[name] for name in ("old_log_probs", "advantages", "response_mask")}
    if "rollout_is_weights" in batch:
        fields["rollout_is_weights"] = batch["rollout_is_weights"]
    ids = {"prompts": torch.ones(rows, prompt).long(), "responses": torch.ones(rows, length).long()}
    data = TensorDict({**fields, **ids, "attention_mask": attention}, batch_size=rows)
    tensordict_utils.assign_non_tensor(
        data, dp_size=ranks, batch_num_tokens=tokens, global_batch_size=sequences
    )
    output = {"log_probs": torch.nested.as_nested_tensor(pieces, layout=torch.jagged)}
    loss, metrics = ppo_loss(config, output, data)
    loss.backward()
    assert log_probs.grad is not None
    return loss.detach(), log_probs.grad, metrics


def number(metric: Any) -> float:
    """verl 0.7.0 returns floats, later versions its `Metric`."""
    return metric if isinstance(metric, float) else metric.aggregate()


def own_gradient(batch: Batch, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the sum of FIPO's loss over the kept tokens, and which are kept, by this package."""
    log_probs = batch["log_probs"].clone().requires_grad_()
    result = fipo_loss(log_probs, batch["old_log_probs"], batch["advantages"], batch["response_mask"], config)
    (gradient,) = torch.autograd.grad(result.loss * result.loss_mask.sum(), log_probs)
    return gradient, result.loss_mask


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_mini_batch_is_the_mean_over_its_tokens(page: Any, ranks: int, seed: int) -> None:
    """verl adds the micro-batches of a rank and averages the gradient over ranks."""
    batches = [make_batch(4, 20, seed), make_batch(2, 50, seed + 10), make_batch(3, 33, seed + 20)]
    tokens = sum(int(batch["response_mask"].sum()) for batch in batches)
    for batch in batches:
        _, gradient, metrics = verl_gradient(actor(), batch, tokens, 9, ranks)
        own, kept = own_gradient(batch, page.FIPOConfig(**page.FIPO))
        assert not kept[0].any()
        torch.testing.assert_close(gradient / ranks, own / tokens)
        assert number(metrics["actor/policy/dropped_sequences"]) == 1
        assert number(metrics["actor/influence/max"]) == pytest.approx(1.2)
        assert number(metrics["actor/ppo_kl"]) != 0  # verl's own metrics remain


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_gradient_is_that_of_the_authors(page: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the denominator: the authors count the kept tokens, verl all response tokens."""
    golden, config = load(file)
    recipe = {name: getattr(config, name) for name in ("half_life", "influence_clip", "safety_threshold")}
    monkeypatch.setattr(page, "FIPO", recipe)
    log_probs = golden["logprobs"].requires_grad_()
    loss, _ = get_policy_loss_fn("fipo")(
        old_log_prob=golden["old_logprobs"],
        log_prob=log_probs,
        advantages=golden["advantages"],
        response_mask=golden["response_mask"].bool(),
        loss_agg_mode="token-mean",
        config=actor(
            clip_ratio_low=config.clip_low,
            clip_ratio_high=config.clip_high,
            clip_ratio_c=config.dual_clip,
        ),
        rollout_is_weights=None,
    )
    loss.backward()
    share = golden["loss_mask"].sum() / golden["response_mask"].sum()
    tolerance = 1e-8 if log_probs.dtype == torch.float64 else 1e-5  # the authors add 1e-8 to the count
    torch.testing.assert_close(
        loss, golden["loss"] * share, rtol=tolerance, atol=tolerance, check_dtype=False
    )
    torch.testing.assert_close(log_probs.grad, golden["grad"] * share, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_weights_of_one_give_the_loss_of_verl(
    page: Any, monkeypatch: pytest.MonkeyPatch, aggregation: str, corrected: bool
) -> None:
    monkeypatch.setattr(page, "FIPO", {"influence_clip": (1.0, 1.0), "drop_dual_clipped": False})
    batch = make_batch(5, 30, seed=3)
    if corrected:
        batch["rollout_is_weights"] = torch.rand(5, 30, generator=torch.Generator().manual_seed(4)) + 0.5
    seen, expected = (
        verl_gradient(actor(mode, loss_agg_mode=aggregation), batch, 400, 12, 2)
        for mode in ("fipo", "vanilla")
    )
    assert seen[0] != 0
    assert torch.equal(seen[0], expected[0])
    assert torch.equal(seen[1], expected[1])


@pytest.mark.parametrize("dual_clip", [3.0, 1.5])
def test_the_clip_bounds_are_those_of_verl(page: Any, dual_clip: float) -> None:
    batch = make_batch(4, 25, seed=5)
    tokens = int(batch["response_mask"].sum())
    _, gradient, _ = verl_gradient(actor(clip_ratio_c=dual_clip), batch, tokens, 4, 1)
    own, _ = own_gradient(batch, page.FIPOConfig(**page.FIPO, dual_clip=dual_clip))
    torch.testing.assert_close(gradient, own / tokens)


def test_a_micro_batch_without_a_kept_response_has_no_gradient() -> None:
    batch = {name: value[:1] for name, value in make_batch(3, 20, seed=6).items()}
    for tokens in (100, int(batch["response_mask"].sum())):
        loss, gradient, _ = verl_gradient(actor(), batch, tokens, 1, 1)
        assert loss == 0
        assert not gradient.any()
