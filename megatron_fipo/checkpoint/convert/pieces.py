"""A model cut into pieces small enough to hold: which rows of which Hugging Face tensor are which rows of which stored tensor.

Seen over all tensor-parallel ranks, a Megatron parameter is its Hugging Face parts on end, a vocabulary with padding behind it.
So any rows can move by themselves. Only query, key and value lie among each other and move together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_fipo.checkpoint.convert.name_map import megatron_shape
from megatron_fipo.checkpoint.convert.torch_dist import Piece, stacked_key
from megatron_fipo.families.family import Architecture, Layout, Weight

PIECE_BYTES = 8_000_000
"""Small enough that the allocator uses memory again; larger blocks are mapped anew each time, which costs more than copying."""


@dataclass(frozen=True)
class Move:
    """One step of a conversion."""

    weight: Weight
    piece: Piece
    """The rows on Megatron's side."""
    name: str | None
    """The Hugging Face tensor that they are rows of; None for all parts of the weight, whole."""
    first_row: int = 0
    """Of `name`."""

    @property
    def rows(self) -> int:
        """On Megatron's side, padding included."""
        return self.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the piece without the dimension of layers."""
        return self.piece.size[-len(self.weight.shapes[0]) :]


def moves_to_megatron(weight: Weight, architecture: Architecture, itemsize: int) -> Iterator[Move]:
    """Pieces of at most `PIECE_BYTES`; a vocabulary's last one holds its padding too."""
    whole = megatron_shape(weight)
    if weight.layout is Layout.QKV:
        yield Move(weight, _piece(weight, architecture, whole, 0, whole[0]), None)
        return
    step, start = max(1, PIECE_BYTES // (prod(whole[1:]) * itemsize)), 0
    for name, (rows, *_) in zip(weight.names, weight.shapes, strict=True):
        for first in range(0, rows, step):
            at_end = name == weight.names[-1] and first + step >= rows
            last = whole[0] if at_end else start + min(first + step, rows)
            yield Move(weight, _piece(weight, architecture, whole, start + first, last), name, first)
        start += rows


def moves_to_hf(
    weight: Weight,
    architecture: Architecture,
    stored_shape: tuple[int, ...],
    chunks: Sequence[ChunkStorageMetadata],
) -> Iterator[Move]:
    """Rows that were stored together move together, so no stored chunk is read twice. Padding is left behind.

    `stored_shape` is that of the parameter without the dimension of layers; `chunks` are those of all layers.
    """
    if weight.layout is Layout.QKV:
        yield Move(weight, _piece(weight, architecture, stored_shape, 0, stored_shape[0]), None)
        return
    axis = 0 if weight.layer is None else 1
    own = (chunk for chunk in chunks if weight.layer is None or chunk.offsets[0] == weight.layer)
    for begin, count in sorted({(chunk.offsets[axis], chunk.sizes[axis]) for chunk in own}):
        start = 0
        for name, (rows, *_) in zip(weight.names, weight.shapes, strict=True):
            first, last = max(begin, start), min(begin + count, start + rows)
            if first < last:
                yield Move(
                    weight, _piece(weight, architecture, stored_shape, first, last), name, first - start
                )
            start += rows


def _piece(
    weight: Weight, architecture: Architecture, whole: tuple[int, ...], first: int, last: int
) -> Piece:
    """Rows `first` to `last` of a parameter of shape `whole`, among the stacked layers."""
    rest = (0,) * (len(whole) - 1)
    if weight.layer is None:
        return Piece(weight.megatron, whole, (first, *rest), (last - first, *whole[1:]))
    stacked = (architecture.num_layers, *whole)
    return Piece(stacked_key(weight), stacked, (weight.layer, first, *rest), (1, last - first, *whole[1:]))
