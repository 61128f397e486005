"""A flat range of a tensor is a few blocks of it, in order and complete."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.checkpoint.optimizer_blocks import blocks

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(st.data())
def test_the_blocks_of_a_range_are_its_elements_in_order(data):
    shape = data.draw(SHAPES)
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(0, prod(shape)))
    tensor = torch.arange(prod(shape)).view(shape)
    found = blocks(shape, start, stop)
    elements = []
    for block in found:
        assert len(block.offset) == len(block.shape) == len(shape)
        part = tensor[tuple(slice(at, at + size) for at, size in zip(block.offset, block.shape, strict=True))]
        assert part.shape == block.shape
        elements += part.flatten().tolist()
    assert elements == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def test_complete_tensors_and_rows_are_one_block():
    assert [(block.offset, block.shape) for block in blocks((4, 3), 0, 12)] == [((0, 0), (4, 3))]
    assert [(block.offset, block.shape) for block in blocks((4, 3), 3, 9)] == [((1, 0), (2, 3))]
    assert [(block.offset, block.shape) for block in blocks((4, 3), 4, 5)] == [((1, 1), (1, 1))]
