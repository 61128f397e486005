"""The division of a model into pieces that fit in memory, for conversion in both directions.

A piece is a range of rows of a stored tensor, and a step copies it from or to rows of a Hugging Face tensor.
Over all tensor-parallel ranks, a Megatron parameter is the concatenation of its Hugging Face tensors, with a
vocabulary's padding at the end. So any range of rows can be copied separately. Only query, key and value are
interleaved and are copied together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_fipo.checkpoint.convert.name_map import megatron_shape
from megatron_fipo.checkpoint.convert.stacking import place_of
from megatron_fipo.checkpoint.convert.torch_dist import TensorPiece
from megatron_fipo.families.family import Architecture, Layout, Weight

PIECE_BYTES = 8_000_000
"""Small enough for the allocator to reuse memory; larger blocks are mapped again each time, which costs more
than the copy."""


@dataclass(frozen=True)
class CopyStep:
    """One step of a conversion."""

    weight: Weight
    piece: TensorPiece
    """The rows of the stored Megatron tensor."""
    name: str | None
    """The Hugging Face tensor that these rows belong to. None: all tensors of the weight, completely."""
    first_row: int = 0
    """First row in `name`."""

    @property
    def rows(self) -> int:
        """Number of rows in Megatron's tensor, padding included."""
        return self.piece.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the piece without stacked dimensions."""
        return (self.piece.rows, *self.piece.shape[1:])


def steps_to_megatron(weight: Weight, architecture: Architecture, itemsize: int) -> Iterator[CopyStep]:
    """Steps with pieces of at most `PIECE_BYTES`. A vocabulary's last piece includes its padding."""
    full, place = megatron_shape(weight), place_of(weight, architecture)
    if weight.layout is Layout.QKV:
        yield CopyStep(weight, TensorPiece(place, full, 0, full[0]), None)
        return
    height, start = max(1, PIECE_BYTES // (prod(full[1:]) * itemsize)), 0
    for name, (rows, *_) in zip(weight.names, weight.shapes, strict=True):
        for first in range(0, rows, height):
            at_end = name == weight.names[-1] and first + height >= rows
            last = full[0] if at_end else start + min(first + height, rows)
            piece = TensorPiece(place, full, start + first, last - start - first)
            yield CopyStep(weight, piece, name, first)
        start += rows


def steps_to_hf(
    weight: Weight,
    architecture: Architecture,
    stored_shape: tuple[int, ...],
    chunks: Sequence[ChunkStorageMetadata],
) -> Iterator[CopyStep]:
    """Steps that follow the stored chunks, so that no chunk is read twice. Padding is not copied.

    `stored_shape` is the parameter's shape without stacked dimensions; `chunks` are those of this weight.
    """
    place = place_of(weight, architecture)
    if weight.layout is Layout.QKV:
        yield CopyStep(weight, TensorPiece(place, stored_shape, 0, stored_shape[0]), None)
        return
    axis = len(place.index)
    for begin, count in sorted({(chunk.offsets[axis], chunk.sizes[axis]) for chunk in chunks}):
        start = 0
        for name, (rows, *_) in zip(weight.names, weight.shapes, strict=True):
            first, last = max(begin, start), min(begin + count, start + rows)
            if first < last:
                piece = TensorPiece(place, stored_shape, first, last - first)
                yield CopyStep(weight, piece, name, first - start)
            start += rows
