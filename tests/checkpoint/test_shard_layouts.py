"""Every layout's `join` inverts its `shard`, for every tensor-parallel size that divides the weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.checkpoint.hf_writer import assign_shards
from megatron_fipo.checkpoint.shard_layouts import join, map_model, shard
from megatron_fipo.families.family import Architecture, Layout, Weight
from megatron_fipo.families.qwen2 import QWEN2


def architecture(groups: int, queries_per_group: int, head: int, vocab: int) -> Architecture:
    heads = groups * queries_per_group
    return Architecture(2, 24, 48, heads, groups, head, vocab, 64, 1e-6, 1e4, False)


@settings(deadline=None)
@given(
    size=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([4, 8]),
    queries=st.integers(1, 4),
    head=st.sampled_from([2, 6]),
    vocab=st.integers(1, 1400),
)
def test_join_undoes_shard(size, groups, queries, head, vocab):
    model = architecture(groups, queries, head, vocab)
    weights = [*QWEN2.weights(model), Weight("column", Layout.COLUMN, ("c",), ((8, 3),))]
    for weight in weights:
        parts = [torch.randn(shape) for shape in weight.shapes]
        shards = [shard(weight, parts, model, rank, size) for rank in range(size)]
        assert len({piece.shape for piece in shards}) == 1
        for part, again in zip(parts, join(weight, shards, model), strict=True):
            assert torch.equal(part, again), weight


def test_query_key_value_rows_are_grouped_as_megatron_groups_them():
    model = architecture(groups=2, queries_per_group=2, head=1, vocab=5)
    weight = Weight("qkv", Layout.QKV, ("q", "k", "v"), ((4,), (2,), (2,)))
    parts = [torch.tensor([10, 11, 12, 13]), torch.tensor([20, 21]), torch.tensor([30, 31])]
    assert shard(weight, parts, model, 0, 1).tolist() == [10, 11, 20, 30, 12, 13, 21, 31]
    assert shard(weight, parts, model, 1, 2).tolist() == [12, 13, 21, 31]


def test_a_parameter_without_a_rule_is_an_error():
    from megatron.core.models.gpt import GPTModel

    chunk = GPTModel.__new__(GPTModel)
    torch.nn.Module.__init__(chunk)
    chunk.family, chunk.architecture = QWEN2, architecture(2, 2, 4, 10)
    chunk.novelty = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="qwen2 has no rule for novelty"):
        map_model([chunk])


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_shards_hold_every_tensor_once_in_order_and_within_the_limit(sizes):
    names = [f"t{index}" for index in range(len(sizes))]
    files = assign_shards(dict(zip(names, sizes, strict=True)), 40)
    assert list(files) == names
    assert list(files.values()) == sorted(files.values())
    for file in set(files.values()):
        within = [size for name, size in zip(names, sizes, strict=True) if files[name] == file]
        assert sum(within) <= 40 or len(within) == 1
    if len(set(files.values())) == 1:
        assert set(files.values()) == {"model.safetensors"}
