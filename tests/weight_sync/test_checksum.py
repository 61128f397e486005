"""Checksums of tensors against the formula in Python's integers, and which changes they find."""

import hashlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_fipo.weight_sync import checksum
from megatron_fipo.weight_sync.checksum import (
    MULTIPLIERS,
    ROW,
    ROW_BYTES,
    Checksums,
    cpu_sums,
    device_sums,
    tensor_checksum,
)

timing_varies = settings(deadline=None)
WIDTHS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
    torch.int8: torch.int8,
    torch.uint8: torch.int8,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
    torch.bool: torch.int8,
}
"""Integers of the same width, through which the tests write bits."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
SHAPES = {
    "0-dim": (),
    "empty": (0,),
    "empty matrix": (3, 0),
    "one": (1,),
    "odd number of bytes": (7, 3, 11),
    "one row": (ROW_BYTES,),
    "rows and a rest": (3, 2 * ROW + 1),
}


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bit patterns, also NaN."""
    data = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    bits = np.frombuffer(data, f"i{dtype.itemsize}") & (1 if dtype is torch.bool else -1)
    return torch.from_numpy(bits.reshape(shape)).view(dtype)


def by_hand(name: str, tensor: Tensor) -> str:
    """The formula, one word after the other."""
    data = tensor.detach().contiguous().view(WIDTHS[tensor.dtype]).numpy().tobytes()
    digest = hashlib.sha256(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    m, n = ([int(value) for value in row] for row in MULTIPLIERS)
    for first in range(0, len(data), ROW_BYTES):
        row = data[first : first + ROW_BYTES].ljust(ROW_BYTES, b"\0")
        words = [row[at : at + 8] for at in range(0, ROW_BYTES, 8)]
        for multipliers, order in ((m, "little"), (n, "big")):
            total = sum(
                multiplier * int.from_bytes(word, order)  # type: ignore[arg-type]
                for multiplier, word in zip(multipliers, words, strict=True)
            )
            digest.update((total % 2**64).to_bytes(8, "little"))
    return digest.hexdigest()


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values, laid out in memory in several ways."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=WIDTHS[tensor.dtype])
    wide[..., 1::2] = tensor.view(wide.dtype)
    unaligned = torch.zeros(tensor.nbytes + 1, dtype=torch.uint8)
    unaligned[1:] = tensor.reshape(-1).view(torch.uint8)
    found = {
        "gaps": wide.view(tensor.dtype)[..., 1::2],
        "transposed": tensor.t().contiguous().t(),
        "in a larger matrix": torch.cat([tensor.view(wide.dtype)] * 3).view(tensor.dtype)[len(tensor) :][
            : len(tensor)
        ],
        "a parameter": torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
    }
    if tensor.element_size() == 1:
        found["at an odd address"] = unaligned[1:].view(tensor.dtype).view(tensor.shape)
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_the_checksum_is_that_of_the_formula(dtype, shape):
    tensor = random_bits(dtype, shape)
    assert tensor_checksum("a", tensor) == by_hand("a", tensor)


@pytest.mark.parametrize("copied", [8, 100, ROW_BYTES, 10**6])
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_the_layout_in_memory_does_not_matter(monkeypatch, dtype, copied):
    """Copies of any size, also smaller than one row of the tensor."""
    monkeypatch.setattr(checksum, "COPIED_BYTES", copied)
    tensor = random_bits(dtype, (37, 131))
    expected = by_hand("a", tensor)
    assert {name: tensor_checksum("a", same) for name, same in layouts(tensor).items()} == dict.fromkeys(
        layouts(tensor), expected
    )


def test_bfloat16_after_an_odd_number_of_elements():
    """As in a packed receive buffer: aligned to the dtype, not to a word."""
    buffer = random_bits(torch.bfloat16, (5 * ROW + 1,))
    assert tensor_checksum("a", buffer[1:]) == by_hand("a", buffer[1:].clone())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 3)[2:3, 1],
        torch.randn(10).as_strided((1, 1, 1), (5, 0, 7)),
        torch.randn(10)[3:4:5].bfloat16(),
        torch.zeros(1).expand(1, 1),
        torch.zeros(1).expand(7, 5),
        torch.from_numpy(np.empty((0, 2), np.int64)),
        torch.empty(4, 0).t(),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}, strides {tensor.stride()}",
)
def test_unusual_strides(tensor):
    assert tensor_checksum("a", tensor) == by_hand("a", tensor.clone(memory_format=torch.contiguous_format))


def test_a_contiguous_tensor_is_not_copied_and_other_copies_are_bounded(monkeypatch):
    monkeypatch.setattr(checksum, "COPIED_BYTES", 4 * ROW_BYTES)
    tensor = torch.randn(300, 1000)
    (complete, rest) = checksum._rows(tensor)
    assert complete.data_ptr() == tensor.data_ptr()
    assert (complete.shape, rest.shape) == ((tensor.nbytes // ROW_BYTES, ROW), (1, ROW))
    assert max(part.nbytes for part in checksum._pieces(tensor.t())) <= 4 * ROW_BYTES
    assert max(part.nbytes for part in checksum._rows(tensor.t())) <= 5 * ROW_BYTES


WORDS = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**31, 2**32, -(2**31)]) | st.integers(
    -(2**63), 2**63 - 1
)


@timing_varies
@given(st.lists(WORDS, min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 3))
def test_numpy_and_torch_compute_the_same_sums(words, rows, rows_at_once):
    tensor = torch.tensor(words).repeat(rows * ROW)[: rows * ROW].view(rows, ROW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksum, "CPU_ROWS", rows_at_once)
        patch.setattr(checksum, "DEVICE_ROWS", rows_at_once)
        assert torch.equal(cpu_sums(tensor), device_sums(tensor, torch.from_numpy(MULTIPLIERS)))


def test_multipliers_are_odd_and_distinct_modulo_2_to_33():
    assert (MULTIPLIERS % 2 == 1).all()
    assert [len(np.unique(row % 2**33)) for row in MULTIPLIERS] == [ROW, ROW]


def test_the_worked_example(monkeypatch):
    monkeypatch.setattr(checksum, "ROW", 2)
    monkeypatch.setattr(checksum, "MULTIPLIERS", np.array([[3, 5], [7, 9]]))
    high = -(2**63)
    assert cpu_sums(torch.tensor([[0, high], [high, 0]])).tolist() == [[high, 1152], [high, 896]]


# -- changes -------------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn, least: int = 1) -> Tensor:
    """Few distinct elements, chosen where sums modulo a power of two are weak, or any bits; one row or several."""
    dtype = draw(st.sampled_from([dtype for dtype in WIDTHS if dtype is not torch.bool]))
    size = draw(st.integers(least, 40) | st.sampled_from([ROW, 2 * ROW + 1, 9 * ROW]))
    seed = draw(st.integers(0, 2**32))
    if draw(st.booleans()):
        return random_bits(dtype, (size,), seed)
    bits = 8 * dtype.itemsize
    sign = -(2 ** (bits - 1))
    choices = draw(st.sampled_from([(0, sign), (1, sign + 1), (0, -1), (0, 1), (sign, -1), (5, sign + 5, 7)]))
    picked = np.random.default_rng(seed).choice(np.array(choices, np.int64), size)
    return torch.from_numpy(picked).to(WIDTHS[dtype]).view(dtype)


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(WIDTHS[tensor.dtype])


def found(before: Tensor, after: Tensor) -> bool:
    return tensor_checksum("a", before) != tensor_checksum("a", after)


@timing_varies
@given(tensors(), st.data())
def test_a_flipped_bit_is_found(tensor, data):
    changed = tensor.clone()
    byte = data.draw(st.integers(0, tensor.nbytes - 1))
    changed.view(torch.uint8)[byte] ^= 1 << data.draw(st.integers(0, 7))
    assert found(tensor, changed)


@timing_varies
@given(tensors(), st.data())
def test_another_element_is_found(tensor, data):
    changed = tensor.clone()
    at, other = (data.draw(st.integers(0, len(tensor) - 1)) for _ in range(2))
    bits_of(changed)[at] = ~bits_of(tensor)[other]
    assert found(tensor, changed) == (not torch.equal(bits_of(changed), bits_of(tensor)))


@settings(timing_varies, max_examples=300)
@given(tensors(least=2), st.data())
def test_two_swapped_elements_are_found(tensor, data):
    one, other = (data.draw(st.integers(0, len(tensor) - 1)) for _ in range(2))
    order = torch.arange(len(tensor))
    order[[one, other]] = order[[other, one]]
    changed = bits_of(tensor)[order].view(tensor.dtype)
    assert found(tensor, changed) == (not torch.equal(bits_of(changed), bits_of(tensor)))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.int64], ids=str)
def test_elements_that_differ_in_one_bit_are_found_if_swapped(dtype):
    """Each bit, in words whose multipliers differ by any power of two that occurs, at each place of a word."""
    per_word, bits = 8 // dtype.itemsize, 8 * dtype.itemsize
    exponents = {}
    for one, other in itertools.combinations(range(0, ROW, 37), 2):
        difference = int(MULTIPLIERS[0, one]) - int(MULTIPLIERS[0, other])
        exponents[difference & -difference] = one, other
    assert len(exponents) > 5
    for (one, other), place, bit in itertools.product(exponents.values(), range(per_word), range(bits)):
        tensor = torch.zeros(ROW * per_word, dtype=WIDTHS[dtype])
        swapped = tensor.clone()
        value = 2**bit - 2**bits * (bit == bits - 1)
        tensor[one * per_word + place] = swapped[other * per_word + place] = value
        assert found(tensor.view(dtype), swapped.view(dtype))


PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda values: -values,
    "every second": lambda values: values * torch.tensor([1, -1]).repeat(values.numel() // 2).view_as(values),
    "every eighth, last": lambda values: (
        values * torch.tensor([1] * 7 + [-1]).repeat(values.numel() // 8).view_as(values)
    ),
    "two columns": lambda values: torch.cat(
        [values[:, :7], -values[:, 7:8], values[:, 8:15], -values[:, 15:16], values[:, 16:]], 1
    ),
    "a rectangle": lambda values: torch.where(
        torch.outer(torch.arange(len(values)) % 64 == 3, torch.arange(values.shape[1]) % 32 == 31),
        -values,
        values,
    ),
    "upper half": lambda values: torch.cat([-values[: len(values) // 2], values[len(values) // 2 :]]),
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_other_signs_are_found(dtype, pattern):
    values = torch.randn(128, 512).to(dtype).float()
    assert found(values.to(dtype), pattern(values).to(dtype))


@timing_varies
@given(tensors(least=2), st.integers(1, 40))
def test_a_rotation_is_found(tensor, by):
    changed = bits_of(tensor).roll(by).view(tensor.dtype)
    assert found(tensor, changed) == (not torch.equal(bits_of(changed), bits_of(tensor)))


@timing_varies
@given(tensors(least=2), st.data())
def test_an_inserted_element_is_found(tensor, data):
    """The elements after it move by one and the last one is lost."""
    at, which = (data.draw(st.integers(0, len(tensor) - 1)) for _ in range(2))
    bits = bits_of(tensor)
    changed = torch.cat([bits[:at], bits[which : which + 1], bits[at:-1]]).view(tensor.dtype)
    assert found(tensor, changed) == (not torch.equal(bits_of(changed), bits_of(tensor)))


@timing_varies
@given(tensors(least=6), st.permutations(range(6)))
def test_permuted_rows_are_found(tensor, order):
    rows = bits_of(tensor)[: len(tensor) // 6 * 6].view(6, -1)
    changed = rows[list(order)]
    assert found(rows, changed) == (not torch.equal(rows, changed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 3, ROW, 4 * ROW, 5000])
def test_permuted_rows_and_columns_of_simple_matrices_are_found(dtype, width):
    """Patterns whose sums over rows and columns do not depend on the order."""
    height = 64
    for values in (torch.eye(height, width), torch.arange(height * width).view(height, width) % 2 * 2.0 - 1):
        for changed in (values.flip(0), values.roll(1, 0), values.flip(1), values.roll(1, 1)):
            assert found(values.to(dtype), changed.to(dtype)) == (not torch.equal(values, changed))


@timing_varies
@given(tensors(), st.integers(1, 20))
def test_padding_and_truncation_are_found(tensor, by):
    padded = torch.cat([bits_of(tensor), torch.zeros(by, dtype=WIDTHS[tensor.dtype])]).view(tensor.dtype)
    assert found(tensor, padded)
    assert found(tensor, tensor[: max(0, len(tensor) - by)])
    assert found(padded.new_zeros(len(tensor)), padded.new_zeros(len(padded)))


@timing_varies
@given(tensors())
def test_another_name_dtype_or_shape_is_found(tensor):
    same_bits = [
        tensor.view(dtype)
        for dtype in WIDTHS
        if dtype.itemsize == tensor.itemsize and dtype is not torch.bool
    ]
    others = [*same_bits, tensor[None], tensor[:, None], tensor.view(torch.uint8)[None]]
    sums = {tensor_checksum("a", other) for other in others} | {tensor_checksum("A", tensor)}
    assert len(sums) == len({(other.dtype, other.shape) for other in others}) + 1


# -- several tensors -----------------------------------------------------------------------------------------


def test_tensors_are_independent_and_finish_forgets_them():
    tensors = {str(dtype): random_bits(dtype, (1, 2 * ROW + 3)) for dtype in WIDTHS}
    tied = {"embedding": tensors["torch.float32"], "head": tensors["torch.float32"]}
    checksums = Checksums()
    for name, tensor in (tensors | tied | {"empty": torch.empty(0)}).items():
        checksums.add(name, tensor)
    first = checksums.finish()
    assert list(first) == [*tensors, "embedding", "head", "empty"]
    assert first == {n: by_hand(n, t) for n, t in (tensors | tied | {"empty": torch.empty(0)}).items()}
    assert checksums.finish() == {}


def test_a_tensor_may_be_overwritten_after_it_was_added():
    tensor = torch.randn(5000)
    checksums, before = Checksums(), tensor_checksum("a", tensor)
    checksums.add("a", tensor)
    tensor.zero_()
    assert checksums.finish() == {"a": before}
