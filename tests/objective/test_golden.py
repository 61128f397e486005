"""The authors' own loss, executed: `tests/golden/fipo_loss` holds its inputs and outputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_fipo import FIPOConfig, fipo_loss, future_kl

FILES = sorted((Path(__file__).parents[1] / "golden" / "fipo_loss").glob("*.npz"))


def load(file: Path) -> tuple[dict[str, torch.Tensor], FIPOConfig]:
    with np.load(file) as archive:
        arrays = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "config"}
        settings = json.loads(str(archive["config"]))
    names = ("influence_clip", "safety_threshold", "clip_low", "clip_high", "dual_clip")
    return arrays, FIPOConfig(
        half_life=settings["decay_half_life"], **{name: settings[name] for name in names}
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_matches_the_reference(file: Path) -> None:
    golden, config = load(file)
    tolerance = 1e-9 if golden["logprobs"].dtype == torch.float64 else 1e-5
    log_probs = golden["logprobs"].requires_grad_()
    result = fipo_loss(
        log_probs, golden["old_logprobs"], golden["advantages"], golden["response_mask"], config
    )
    result.loss.backward()

    assert log_probs.grad is not None
    tokens = golden["loss_mask"].sum()
    smoothing = tokens / (tokens + 1e-8)  # the authors add 1e-8 to the token count
    assert result.loss.dtype == golden["logprobs"].dtype
    torch.testing.assert_close(
        result.loss * smoothing, golden["loss"].to(result.loss.dtype), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(log_probs.grad * smoothing, golden["grad"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.future_kl, golden["future_kl"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        result.influence_weights, golden["influence_weights"], rtol=tolerance, atol=tolerance
    )
    assert torch.equal(result.loss_mask, golden["loss_mask"].to(result.loss_mask.dtype))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_statistics_match_the_reference(file: Path) -> None:
    golden, config = load(file)
    seen = fipo_loss(
        golden["logprobs"], golden["old_logprobs"], golden["advantages"], golden["response_mask"], config
    ).statistics
    expected = {
        "policy/kl": golden["policy_kl"],
        "policy/dual_clip_fraction": golden["dual_clip_fraction"],
        "influence/mean": golden["influence_weight_mean"],
        "influence/min": golden["influence_weight_min"],
        "influence/max": golden["influence_weight_max"],
    }
    for name, value in expected.items():
        assert seen[name].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-7), name
    clipped = seen["policy/clip_fraction_high"] + seen["policy/clip_fraction_low"]
    assert clipped.item() == pytest.approx(golden["clip_fraction"].item(), rel=1e-6)
    responses = golden["response_mask"].any(1)
    assert (
        seen["policy/dropped_sequences"].item()
        == (responses & ~golden["loss_mask"].bool().any(1)).sum().item()
    )
    assert seen["policy/kept_tokens"].item() == golden["loss_mask"].sum().item()


def test_golden_files_exercise_the_rules() -> None:
    """Dropped responses, holes and both clip bounds occur, so that the comparison means something."""
    arrays = [load(file)[0] for file in FILES]
    assert len(FILES) == 11
    assert any((a["loss_mask"] != a["response_mask"]).any() for a in arrays)
    assert any((a["response_mask"].diff(dim=1) > 0).any() for a in arrays)
    assert any((a["influence_weights"] == 0.8).any() for a in arrays)


def test_future_kl_alone_matches_the_reference() -> None:
    golden, config = load(next(file for file in FILES if file.stem == "holes"))
    log_ratio = golden["logprobs"] - golden["old_logprobs"]
    torch.testing.assert_close(
        future_kl(log_ratio, golden["response_mask"], config.half_life),
        golden["future_kl"],
        rtol=1e-9,
        atol=1e-9,
    )
