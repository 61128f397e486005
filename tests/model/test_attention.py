"""Bucketed, context-parallel packed attention equals plain attention per sequence, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_fipo.config import ParallelConfig
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.attention import attend, attention_plan, build_plan, zigzag_owner
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def dense(query, key, value, lengths):
    """Each sequence alone: [T, heads, d]."""
    outputs = []
    for parts in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in parts)
        outputs.append(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)[0].transpose(
                0, 1
            )
        )
    return torch.cat(outputs)


def random_tensors(tokens: int, heads: int = 4, groups: int = 2, width: int = 3):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [
        (tokens, heads, width),
        (tokens, groups, width),
        (tokens, groups, width),
        (tokens, heads, width),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def rank_tokens(lengths: list[int], cp_size: int) -> list[torch.Tensor]:
    """The tokens of the pack on each context-parallel rank."""
    sizes = torch.tensor(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    owner, _ = zigzag_owner(positions, sizes.repeat_interleave(sizes), cp_size)
    return [(owner == rank).nonzero().flatten() for rank in range(cp_size)]


@settings(deadline=None, max_examples=60)
@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6), cp_size=st.sampled_from([1, 2, 4]))
def test_all_ranks_together_equal_dense_attention(chunks, cp_size):
    lengths = [count * 2 * cp_size if cp_size > 1 else count for count in chunks]
    query, key, value, upstream = random_tensors(sum(lengths))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    expected = dense(query, key, value, lengths)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)

    tokens = rank_tokens(lengths, cp_size) if cp_size > 1 else [torch.arange(sum(lengths))]
    gathered = torch.cat((key, value), dim=-1)[torch.cat(tokens)]
    output = torch.zeros_like(expected)
    for rank, mine in enumerate(tokens):
        plan = build_plan(torch.tensor(lengths), rank, cp_size, CPU)
        output = output.index_copy(0, mine, attend(plan, query[mine], gathered, scale=0.3))
    torch.testing.assert_close(output, expected)
    for grad, expected_grad in zip(
        torch.autograd.grad(output, inputs, upstream), expected_grads, strict=True
    ):
        torch.testing.assert_close(grad, expected_grad)


def test_zigzag_chunks_follow_megatron():
    owner, offset = zigzag_owner(torch.arange(8), torch.full((8,), 8), cp_size=2)
    assert owner.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert offset.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def test_gradients_cross_context_parallel_ranks():
    """The module with its gather, on two real ranks."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_fipo.model.attention import PackedAttention

    lengths = [4, 12, 40]
    query, key, value, upstream = random_tensors(sum(lengths))

    def body(rank, world):
        model_parallel.initialize(ParallelConfig(context_parallel_size=2), seed=1)
        config = TransformerConfig(
            num_layers=1, hidden_size=12, num_attention_heads=4, num_query_groups=2, context_parallel_size=2
        )
        attention = PackedAttention(config, 1, None, "self", softmax_scale=0.3)
        mine = rank_tokens(lengths, 2)[parallel_state.get_context_parallel_rank()]
        inputs = [tensor[mine].detach().requires_grad_() for tensor in (query, key, value)]
        output = attention(*inputs, None, packed_seq_params=packed_parameters(lengths))
        return mine, output.detach(), torch.autograd.grad(output, inputs, upstream[mine].flatten(1))

    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    expected = dense(query, key, value, lengths)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for mine, output, grads in run_ranks(2, body):
        torch.testing.assert_close(output, expected[mine].flatten(1).detach())
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad[mine])


def packed_parameters(lengths: list[int], longest: int | None = None) -> PackedSeqParams:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = longest or max(lengths)
    return PackedSeqParams("thd", cu_seqlens, cu_seqlens, None, None, longest, longest)


def test_the_plan_is_made_once_per_pack():
    packed, other = packed_parameters([3, 5]), packed_parameters([3, 5])
    assert attention_plan(packed, 0, 1, CPU) is attention_plan(packed, 0, 1, CPU)
    assert attention_plan(packed, 0, 1, CPU) is not attention_plan(other, 0, 1, CPU)


def test_memory_is_far_below_a_dense_mask():
    """100 short sequences and a long one: padding stays within the factor of two of a bucket."""
    plan = build_plan(torch.tensor([60] * 100 + [2000]), 0, 1, CPU)
    assert sum(batch * width for bucket in plan.buckets for batch, width, _ in [bucket.size]) == 8000


def test_bad_packs_are_refused():
    with pytest.raises(ValueError, match="multiples of 4 for 2"):
        build_plan(torch.tensor([4, 6]), 0, 2, CPU)
    with pytest.raises(ValueError, match="max_seqlen_q is 4"):
        attention_plan(packed_parameters([3, 5], longest=4), 0, 1, CPU)
    with pytest.raises(ValueError, match="'sbhd'"):
        attention_plan(PackedSeqParams("sbhd"), 0, 1, CPU)
