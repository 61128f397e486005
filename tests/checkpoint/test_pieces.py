"""For any division into pieces, each row is copied exactly once."""

from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_fipo.checkpoint.convert import pieces
from megatron_fipo.checkpoint.convert.name_map import megatron_shape
from megatron_fipo.checkpoint.convert.pieces import CopyStep, steps_to_hf, steps_to_megatron
from megatron_fipo.families.family import Layout
from megatron_fipo.families.qwen2 import QWEN2
from tests.checkpoint.test_shard_layouts import architecture


def hf_rows(found: list[CopyStep], padding: bool) -> dict[str, list[int]]:
    """By tensor, the copied rows; with `padding`, rows after the end of the tensor are not counted."""
    rows: dict[str, list[int]] = {}
    for step in found:
        shapes = dict(zip(step.weight.names, step.weight.shapes, strict=True))
        for name in [step.name] if step.name else step.weight.names:
            last = shapes[name][0] if step.name is None else step.first_row + step.rows
            rows.setdefault(name, []).extend(
                range(step.first_row, min(last, shapes[name][0]) if padding else last)
            )
    return rows


def megatron_rows(found: list[CopyStep]) -> list[int]:
    return [row for step in found for row in range(step.piece.first, step.piece.first + step.rows)]


@settings(deadline=None)
@given(piece_bytes=st.integers(1, 4000), vocab=st.integers(1, 1400))
def test_pieces_to_megatron_cover_both_sides(piece_bytes, vocab):
    model = architecture(groups=4, queries_per_group=2, head=2, vocab=vocab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        for weight in QWEN2.weights(model):
            found = list(steps_to_megatron(weight, model, itemsize=4))
            assert megatron_rows(found) == list(range(megatron_shape(weight)[0]))
            assert hf_rows(found, padding=True) == {
                name: list(range(shape[0])) for name, shape in zip(weight.names, weight.shapes, strict=True)
            }
            row = prod(megatron_shape(weight)[1:]) * 4
            assert all(
                step.name is None or step.rows * row <= max(piece_bytes, row) + 128 * row for step in found
            )


@settings(deadline=None)
@given(
    cuts=st.lists(st.integers(1, 95), max_size=6), columns=st.sampled_from([1, 2]), vocab=st.integers(1, 96)
)
def test_pieces_to_hugging_face_follow_the_stored_chunks(cuts, columns, vocab):
    model = architecture(groups=4, queries_per_group=2, head=2, vocab=vocab)
    for weight in QWEN2.weights(model):
        full = (96, *weight.shapes[0][1:]) if weight.layout is Layout.VOCABULARY else megatron_shape(weight)
        edges = sorted({0, full[0], *(cut for cut in cuts if cut < full[0])})
        width = [size // columns for size in full[1:]]
        layers = [()] if weight.layer is None else [(0,), (1,)]
        chunks = [
            ChunkStorageMetadata(
                Size((*layer, first, *(side * size for size in width))),
                Size((*(1 for _ in layer), last - first, *width)),
            )
            for layer in layers
            for first, last in pairwise(edges)
            for side in range(columns if width else 1)
        ]
        found = list(steps_to_hf(weight, model, full, chunks))
        assert all(weight.layer is None or step.piece.offset[0] == weight.layer for step in found)
        rows = hf_rows(found, padding=False)
        assert {name: sorted(found_rows) for name, found_rows in rows.items()} == {
            name: list(range(shape[0])) for name, shape in zip(weight.names, weight.shapes, strict=True)
        }
