"""Checksums of tensors, computed where the tensors are: the same value on CPU and GPU, in the trainer and in an engine.

The tensor's bytes, in row-major order and padded with zeros, form rows of `ROW` 64-bit little-endian words w_0, w_1, ...
Each row has two sums modulo 2^64, with the fixed random odd multipliers m_j and n_j of `MULTIPLIERS`:

    s = sum of m_j * w_j                t = sum of n_j * r(w_j),    r(w): w with its eight bytes in reverse order

The checksum is the sha256 of name, dtype, shape and all sums, which are 1/512 of the tensor's bytes. Integer sums modulo
2^64 depend neither on the device nor on the order of the reduction.

These changes are always found (collisions of sha256 apart):

- Another name, dtype or shape, so also truncation and padding.
- Any change within one word of a row: a flipped bit, the sign of an element. It changes w_j by d, 0 < |d| < 2^64, and s
  by m_j * d, which is not 0 modulo 2^64 because an odd m_j has an inverse.
- Any swap of two unequal elements of up to 8 bytes. Only one is left to show: that in two words i and j of one row. Let e be
  the difference of the elements, 2^a and 2^b their units in the words, and v(x) the exponent of 2 in x. If a < b, s
  changes by e * (2^a * m_i - 2^b * m_j), where v is v(e) + a < 64. If a = b, s changes by 2^a * e * (m_i - m_j), and t
  likewise. If the elements differ in one of the low four bytes of their words, v(2^a * e) <= 31, else the same holds for
  r(w). All m_j, and all n_j, differ modulo 2^33: v of the change of s, or of t, is at most 31 + 32 < 64.

Any other change (a rotation, an insertion, permuted rows, an older version) escapes only if both sums of every row that
it touches stay the same. Weights do not depend on the random multipliers, so for one row the probability is at most
2^(v - 63) for s and 2^(v' - 63) for t, with the least v in the changes of its words, and v' in those of the reversed ones.
Both together: 2^-56 or less, because bit 8q + k of a word (k < 8) is bit 56 - 8q + k of the reversed one.

Example: w = (0, 2^63), m = (3, 5), n = (7, 9). r(2^63) = 2^7, so s = 5 * 2^63 = 2^63 and t = 9 * 2^7 = 1152. Swapped, s is
3 * 2^63 = 2^63 again, as a word's highest bit has this value at every position; t is 7 * 2^7 = 896. Hence the two sums.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

ROW = 1024
"""Words; the multipliers then fit into a CPU's first cache."""
ROW_BYTES = 8 * ROW
MULTIPLIERS = 1 | np.frombuffer(
    hashlib.shake_256(b"megatron_fipo weights").digest(2 * ROW_BYTES), "<i8"
).reshape(2, ROW)
"""m and n, int64 [2, ROW]; the tests check that they are odd and distinct modulo 2^33."""
CPU_ROWS = 128
DEVICE_ROWS = 4096
"""Rows that are summed together: they fit into a cache. On a GPU there is a workspace of this size."""
COPIED_BYTES = DEVICE_ROWS * ROW_BYTES
"""Of a tensor that is not contiguous or not aligned to 8 bytes, so much is copied at once."""


def tensor_checksum(name: str, tensor: Tensor) -> str:
    """The checksum, in hex, of one tensor of any dtype, shape and layout in memory. Waits for the tensor's device."""
    checksums = Checksums()
    checksums.add(name, tensor)
    return checksums.finish()[name]


class Checksums:
    """Checksums of named tensors, on any device. Only `finish` makes the host wait for a GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[str, Tensor]] = {}
        self._multipliers: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, tensor: Tensor) -> None:
        """Compute a tensor's sums, on a GPU in the current stream. Of two tensors with one name the last counts.

        Memory: two blocks of `DEVICE_ROWS` on a GPU; one of `COPIED_BYTES` if the tensor has to be copied; 1/512 of the
        tensor until `finish`.
        """
        if tensor.device.type == "cpu":
            sums = [cpu_sums(words) for words in _rows(tensor.detach())]
        else:
            multipliers = self._multipliers.get(tensor.device)
            if multipliers is None:
                multipliers = self._multipliers[tensor.device] = torch.from_numpy(MULTIPLIERS).to(
                    tensor.device
                )
            sums = [device_sums(words, multipliers) for words in _rows(tensor.detach())]
        header = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|"
        self._sums[name] = header, torch.cat([tensor.new_empty(0, 2, dtype=torch.int64), *sums])

    def finish(self) -> dict[str, str]:
        """Checksums, in hex, by name, in the order added; then forget them. One copy from each device to the host."""
        found = dict.fromkeys(self._sums, "")
        for device in {sums.device for _, sums in self._sums.values()}:
            added = {name: entry for name, entry in self._sums.items() if entry[1].device == device}
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # `add` may have run in other streams
            on_host = torch.cat([sums for _, sums in added.values()]).cpu()
            parts = on_host.split([len(sums) for _, sums in added.values()])
            for (name, (header, _)), part in zip(added.items(), parts, strict=True):
                found[name] = hashlib.sha256(header.encode() + part.numpy().tobytes()).hexdigest()
        self._sums = {}
        return found


def cpu_sums(words: Tensor) -> Tensor:
    """s and t of each row: int64 [R, ROW] to int64 [R, 2].

    numpy's `einsum` multiplies and adds in one pass, without the products in memory, and reads bytes in reverse order
    through a small buffer.
    """
    native = words.numpy()
    reverse = native.view(native.dtype.newbyteorder())
    sums = np.empty((2, len(native)), np.int64)
    for first in range(0, len(native), CPU_ROWS):
        rows = slice(first, first + CPU_ROWS)
        np.einsum("rw,w->r", native[rows], MULTIPLIERS[0], out=sums[0, rows])
        np.einsum("rw,w->r", reverse[rows], MULTIPLIERS[1], out=sums[1, rows])
    return torch.from_numpy(sums.T.copy())


def device_sums(words: Tensor, multipliers: Tensor) -> Tensor:
    """The same by torch, on any device, with `MULTIPLIERS` there: six launches for `DEVICE_ROWS` rows, no transfer."""
    m, n = multipliers
    sums = []
    for native in words.split(DEVICE_ROWS):
        s = (native * m).sum(1)
        reverse = native.view(torch.uint8).unflatten(1, (ROW, 8)).flip(2).flatten(1).view(torch.int64)
        sums.append(torch.stack((s, reverse.mul_(n).sum(1)), 1))
    return torch.cat(sums)


def _rows(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's bytes as rows, in one or several tensors int64 [R > 0, ROW]; zeros complete the last row.

    Views of the tensor, except for the incomplete row and for what has to be copied.
    """
    rest = tensor.new_empty(0, dtype=torch.uint8)
    for piece in _pieces(tensor):
        data = torch.cat([rest, piece]) if len(rest) else piece
        complete = len(data) - len(data) % ROW_BYTES
        if complete:
            yield data[:complete].view(torch.int64).view(-1, ROW)
        rest = data[complete:]
    if len(rest):
        row = rest.new_zeros(ROW_BYTES)
        row[: len(rest)] = rest
        yield row.view(torch.int64).view(1, ROW)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's bytes in row-major order, uint8 [n]: one view if it can be read as it is, else copies."""
    if tensor.is_contiguous():
        data = as_bytes(tensor)
        if (data.storage_offset() | data.data_ptr()) % 8 == 0:
            yield data
        else:
            yield from (part.clone() for part in data.split(COPIED_BYTES))
    elif tensor.nbytes <= COPIED_BYTES:
        yield as_bytes(tensor.contiguous())
    else:
        for part in tensor.split(max(1, COPIED_BYTES // tensor[0].nbytes)):
            yield from _pieces(part[0] if len(part) == 1 else part)


def as_bytes(tensor: Tensor) -> Tensor:
    """A view of a contiguous tensor's bytes, uint8 [n]. (`view(-1)` keeps the stride of a single element.)"""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
