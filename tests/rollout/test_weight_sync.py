"""Checksum and buckets; the push itself needs Ray and is tested in `tests/system`."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.rollout.weight_sync import WeightChecksum, _buckets


def checksum(tensors: list[tuple[str, torch.Tensor]]) -> str:
    result = WeightChecksum()
    for name, tensor in tensors:
        result.add(name, tensor)
    return result.hexdigest()


def some_tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("a", torch.randn(3, 4, generator=generator)),
        ("b", torch.randn(12, generator=generator).to(torch.bfloat16)),
        ("c", torch.randn((), generator=generator)),
        ("d", torch.zeros(0, 5)),
    ]


@given(st.permutations(range(4)))
def test_checksum_ignores_order(order):
    tensors = some_tensors()
    assert checksum([tensors[index] for index in order]) == checksum(tensors)


def test_checksum_sees_name_value_shape_dtype_and_absence():
    tensors = some_tensors()
    name, tensor = tensors[0]
    flipped = tensor.clone()
    flipped.view(torch.int32)[2, 3] ^= 1
    others = [
        [("A", tensor), *tensors[1:]],
        [(name, flipped), *tensors[1:]],
        [(name, tensor.reshape(4, 3)), *tensors[1:]],
        [(name, tensor.view(torch.int32)), *tensors[1:]],
        tensors[1:],
        [("b", tensor), ("a", tensors[1][1]), *tensors[2:]],
    ]
    assert len({checksum(tensors), *map(checksum, others)}) == len(others) + 1


def test_checksum_does_not_depend_on_the_layout_in_memory():
    tensor = torch.randn(4, 6)
    assert checksum([("a", tensor.t().contiguous().t())]) == checksum([("a", tensor)])


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 100))
def test_buckets_keep_order_and_stay_within_the_limit(sizes, limit):
    tensors = [(f"t{index}", torch.full((size,), index, dtype=torch.uint8)) for index, size in enumerate(sizes)]
    buckets = list(_buckets(tensors, limit))
    assert [name for bucket in buckets for name in bucket] == [name for name, _ in tensors]
    for bucket in buckets:
        assert sum(tensor.nbytes for tensor in bucket.values()) <= limit or len(bucket) == 1


def test_buckets_copy_because_exporters_reuse_their_buffer():
    buffer = torch.zeros(100)

    def export():
        for index in range(3):
            buffer.fill_(index)
            yield f"t{index}", buffer[index : index + 2]

    (bucket,) = _buckets(export(), 10_000)
    assert {name: tensor.tolist() for name, tensor in bucket.items()} == {"t0": [0, 0], "t1": [1, 1], "t2": [2, 2]}
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in bucket.values())


def test_ranks_without_tensors_only_iterate():
    seen = []

    def export():
        for index in range(3):
            seen.append(index)
            yield f"t{index}", None

    assert list(_buckets(export(), 10)) == []
    assert seen == [0, 1, 2]
