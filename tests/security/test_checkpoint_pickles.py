"""A checkpoint that someone else wrote runs no code when a run resumes from it."""

import os
import pickle
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_fipo.checkpoint.plain_pickles import INDEX_FILE, plain_pickles, read_index
from tests.distributed.test_distributed_checkpoint import (
    LAYOUTS,
    check_refused,
    forked_managers,  # noqa: F401 (a fixture)
    save_weights,
    try_loading,
)
from tests.distributed.tiny import write_model
from tests.ranks import run_ranks


class Touch:
    """Creates a file when it is unpickled without limits."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[Path, Path]:
    """A model, and a checkpoint of its weights."""
    folder = tmp_path_factory.mktemp("weights")
    model = write_model(folder / "model")
    (folder / "saved").mkdir()
    run_ranks(1, save_weights, model, LAYOUTS["1"], folder / "saved")
    return model, folder / "saved"


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def name_outside(index: Path) -> None:
    with plain_pickles():
        content = read_index(index.parent)
    stored = next(iter(content.storage_data.values()))
    stored.relative_path = "../saved/" + stored.relative_path
    index.write_bytes(pickle.dumps(content))


def test_resuming_from_a_foreign_checkpoint_runs_no_code(weights, tmp_path):
    model, saved = weights
    index, common, outside = (copy(saved, tmp_path / name) for name in ("index", "common", "outside"))
    owned = [tmp_path / name for name in ("owned_by_index", "owned_by_common")]
    (index / INDEX_FILE).write_bytes(pickle.dumps(Touch(owned[0])))
    torch.save(Touch(owned[1]), common / "common.pt")
    name_outside(outside / INDEX_FILE)
    answers = run_ranks(1, try_loading, model, LAYOUTS["1"], [index, common, outside])
    check_refused(
        answers, "it contains posix.mknod", f"checkpoint {common} cannot be read", "names '../saved/"
    )
    assert not any(path.exists() for path in owned)
    pickle.loads((index / INDEX_FILE).read_bytes())  # it is an attack
    assert owned[0].exists()


def test_no_call_of_torch_load_asks_for_more(tmp_path):
    """Objects in data files: torch's planner loads them with weights_only=False."""
    torch.save(Touch(tmp_path / "owned"), tmp_path / "object")
    with (
        mock.patch.dict(os.environ, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}),
        plain_pickles(),
        pytest.raises(pickle.UnpicklingError),
    ):
        torch.load(tmp_path / "object", weights_only=False)
    assert not (tmp_path / "owned").exists()


def test_the_limits_end_with_their_context():
    original = FileSystemReader.read_metadata
    with mock.patch.dict(os.environ, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}):
        with plain_pickles():
            assert FileSystemReader.read_metadata is not original
        assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert FileSystemReader.read_metadata is original
