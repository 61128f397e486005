"""Slices of stored tensors are exact, and reading many of them parses no header again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_fipo.checkpoint import safetensors_folder
from megatron_fipo.checkpoint.safetensors_folder import SafetensorsFolder
from megatron_fipo.errors import UserError

TENSORS = {
    "matrix": torch.randn(300, 41),
    "half": torch.randn(7, 5).half(),
    "bfloat": torch.randn(5000).bfloat16(),
    "double": torch.randn(3, 4).double(),
    "bytes": torch.arange(13, dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "no rows": torch.empty(0, 4),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", TENSORS)
def test_a_slice_is_the_stored_tensor(folder, name):
    part = SafetensorsFolder(folder).slice(name)
    assert part.get_shape() == list(TENSORS[name].shape)
    assert part[...].dtype is TENSORS[name].dtype
    assert torch.equal(part[...], TENSORS[name])


def test_rows_and_columns_are_copies_in_one_piece(folder):
    part = SafetensorsFolder(folder).slice("matrix")
    for index in (slice(3, 200), slice(290, 400), (slice(None), slice(7, 9)), (slice(5, 9), slice(1, 2))):
        assert torch.equal(part[index], TENSORS["matrix"][index])
        assert part[index].is_contiguous()
        assert part[index].untyped_storage().nbytes() == part[index].nbytes
    part[:].zero_()
    assert torch.equal(part[:], TENSORS["matrix"])


def test_headers_are_parsed_once(folder, monkeypatch):
    opened = []
    parse = safetensors_folder.safe_open
    monkeypatch.setattr(
        safetensors_folder,
        "safe_open",
        lambda path, **keywords: opened.append(path) or parse(path, **keywords),
    )
    source = SafetensorsFolder(folder)
    for name in TENSORS:
        source.slice(name)[...]
    assert opened == [folder / "model.safetensors"]


def test_a_file_that_has_become_shorter_or_is_gone_is_named(folder):
    source, path = SafetensorsFolder(folder), folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"cannot read {path}: .*; copy it again"):
        source.slice("matrix")[:]
    path.unlink()
    with pytest.raises(UserError, match=f"cannot read {path}: .*No such file.*; copy it again"):
        source.slice("matrix")[:]
