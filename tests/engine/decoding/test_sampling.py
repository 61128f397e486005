"""Tokens by inverse CDF: their distribution, truncation, extreme numbers, and the two ways to search a CDF."""

from collections.abc import Callable

import pytest
import torch

from megatron_fipo.engine.decoding.sampling import BLOCK, sample_fast, sample_tokens
from megatron_fipo.engine.protocol import SamplingParams

PLAIN = SamplingParams(1.0, 1.0, 1)
both = pytest.mark.parametrize("sample", [sample_tokens, sample_fast])


@both
def test_sampling_follows_the_distribution_and_truncation(sample: Callable):
    """Inverse CDF on an even grid of uniform numbers gives each token its exact probability."""
    probs = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3])
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = probs.log().expand(len(grid), -1)

    def shares(sampling: SamplingParams) -> list[float]:
        drawn, log_probs = sample(logits, grid, sampling)
        torch.testing.assert_close(log_probs, torch.log_softmax(logits / sampling.temperature, -1)[0, drawn])
        return (torch.bincount(drawn, minlength=5) / len(grid)).tolist()

    assert shares(SamplingParams(1.0, 1.0, 1)) == pytest.approx(probs.tolist(), abs=2e-4)
    assert shares(SamplingParams(0.5, 1.0, 1)) == pytest.approx(
        (probs**2 / (probs**2).sum()).tolist(), abs=2e-4
    )
    assert shares(SamplingParams(1.0, 0.69, 1)) == pytest.approx([0, 4 / 7, 0, 0, 3 / 7], abs=2e-4)
    assert shares(SamplingParams(1.0, 0.75, 1)) == pytest.approx(
        [0, 0.4 / 0.95, 0, 0.25 / 0.95, 0.3 / 0.95], abs=2e-4
    )
    assert shares(SamplingParams(1.0, 1.0, 1, top_k=2)) == pytest.approx([0, 4 / 7, 0, 0, 3 / 7], abs=2e-4)
    assert shares(SamplingParams(1.0, 0.6, 1, top_k=3)) == pytest.approx([0, 4 / 7, 0, 0, 3 / 7], abs=2e-4)
    assert shares(SamplingParams(1.0, 1.0, 1, min_p=0.7)) == pytest.approx([0, 4 / 7, 0, 0, 3 / 7], abs=2e-4)
    assert shares(SamplingParams(1.0, 1.0, 1, top_k=9, min_p=0.01)) == pytest.approx(probs.tolist(), abs=2e-4)


@both
@pytest.mark.parametrize("vocabulary", [4, BLOCK, 3 * BLOCK + 5])
def test_extreme_uniform_numbers_never_draw_an_impossible_token(sample: Callable, vocabulary: int):
    logits = torch.full((3, vocabulary), -torch.inf)
    logits[:, 1], logits[:, -2] = 0.1, 0.7
    uniforms = torch.tensor([0.0, 1 - 2**-53, 1 - 1e-9], dtype=torch.float64)
    assert sample(logits, uniforms, PLAIN)[0].tolist() == [1, vocabulary - 2, vocabulary - 2]


@pytest.mark.parametrize("vocabulary", [5, BLOCK, BLOCK + 1, 4_999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_give_the_tokens_of_a_cdf_over_all(vocabulary: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(2_000, vocabulary, generator=generator)).to(dtype)
    uniforms = torch.rand(2_000, generator=generator, dtype=torch.float64)
    for sampling in (PLAIN, SamplingParams(0.6, 1.0, 1)):
        tokens, log_probs = sample_fast(logits, uniforms, sampling)
        expected, expected_log_probs = sample_tokens(logits, uniforms, sampling)
        same = tokens == expected
        assert (~same).sum() <= 1 + vocabulary // 1_000, "boundaries within float32's rounding are rare"
        assert torch.equal(log_probs[same], expected_log_probs[same])


@both
@pytest.mark.parametrize("vocabulary", [32, 2 * BLOCK])
def test_logits_that_are_no_numbers_show_in_the_log_probs(sample: Callable, vocabulary: int):
    """And do not address memory out of bounds."""
    logits = torch.full((2, vocabulary), torch.nan)
    uniforms = torch.tensor([0.0, 0.5], dtype=torch.float64)
    for sampling in (PLAIN, SamplingParams(1.0, 0.9, 1), SamplingParams(0.0, 1.0, 1)):
        tokens, log_probs = sample(logits, uniforms, sampling)
        assert log_probs.isnan().all()
        assert ((tokens >= 0) & (tokens < vocabulary)).all()
