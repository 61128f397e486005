"""Tokens from logits by inverse CDF, with one uniform number for each row."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_fipo.engine.protocol import SamplingParams

BLOCK = 256
"""Tokens of the vocabulary in a block of the CDF."""


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverse CDF: (tokens [B] int64, their log-probs [B] float32).

    `logits` [B, V] of any float dtype, `uniforms` [B] float64 in [0, 1). The uniform number selects one of the tokens
    that truncation keeps. The CDF is that of float64 probabilities.
    """
    return _sample(logits, uniforms, sampling, _exact)


def sample_fast(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """As `sample_tokens`; without truncation the CDF is that of float32 probabilities, for a third of the memory traffic.

    A uniform number within 4e-7 of a boundary of the CDF may give another token than there: both sums of float32 probabilities
    are off by at most 1e-7.
    """
    return _sample(logits, uniforms, sampling, _by_blocks)


def _sample(
    logits: Tensor, uniforms: Tensor, sampling: SamplingParams, search: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    log_probs = _log_probs(logits, sampling)
    if sampling.temperature == 0:
        tokens = log_probs.argmax(dim=-1)
    elif sampling.top_p < 1 or sampling.top_k or sampling.min_p:
        tokens = _truncated(log_probs, uniforms, sampling)
    else:
        tokens = search(log_probs, uniforms)
    return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)


def _log_probs(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """[B, V] float32, at temperature 1 if sampling is greedy."""
    logits = logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    return torch.log_softmax(logits, dim=-1)


def _exact(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [B] by the CDF over all tokens in float64."""
    return _search(log_probs.double().exp(), uniforms)


def _truncated(log_probs: Tensor, uniforms: Tensor, sampling: SamplingParams) -> Tensor:
    probs, order = log_probs.double().exp().sort(dim=-1, descending=True, stable=True)
    ranks = _search(_truncate(probs, sampling), uniforms)
    return order.gather(-1, ranks[:, None]).squeeze(-1)


def _search(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first index [B] whose cumulative probability exceeds the row's uniform number; `probs` [B, N] float64.

    With u <= 1 - 2^-53, u * total rounds below total: the search never passes the last likely token. It does
    for NaN, which the log-probs then report.
    """
    cdf = probs.cumsum(dim=-1)
    ranks = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    return ranks.squeeze(-1).clamp_(max=probs.shape[-1] - 1)


def _by_blocks(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [B] by one CDF over blocks of tokens and one within the block that is found.

    Of [B, V] only the probabilities are written, in float32.
    """
    rows, vocabulary = log_probs.shape
    count = -(-vocabulary // BLOCK)
    padded = log_probs.new_empty(rows, count * BLOCK)
    padded[:, vocabulary:] = 0
    torch.exp(log_probs, out=padded[:, :vocabulary])
    probs = padded.view(rows, count, BLOCK)
    ends = probs.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = uniforms[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=count - 1)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = probs.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(dim=-1)
    # The sum of the block may round above its cumulative sum: stay below the latter.
    rest = torch.minimum(target - start, inside[:, -1:] * (1 - 2**-53))
    rank = torch.searchsorted(inside, rest, right=True).clamp_(max=BLOCK - 1)
    return (block * BLOCK + rank).squeeze(1).clamp_(max=vocabulary - 1)


def _truncate(probs: Tensor, sampling: SamplingParams) -> Tensor:
    """Zero probabilities that are not sampled from; `probs` [B, V] is in descending order.

    As in vLLM: min-p compares with the most likely token, top-k then keeps the first, and top-p the smallest set of these
    whose share of their sum reaches `top_p`.
    """
    probs = probs * (probs >= sampling.min_p * probs[:, :1])
    if sampling.top_k:
        probs[:, sampling.top_k :] = 0
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs * (before < sampling.top_p * probs.sum(-1, keepdim=True))
    return probs
