"""A small model of each family with its companion files, also as checkpoint folders; once per test module."""

import shutil
from functools import cache
from pathlib import Path

import pytest

from megatron_fipo.checkpoint.convert import pieces
from megatron_fipo.checkpoint.convert.convert import to_megatron
from tests.checkpoint.editing import save_model
from tests.model.reference import make_reference


def write_source(folder: Path, family: str, tied: str) -> Path:
    make_reference(folder, tied == "tied", family)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "optimizer.pt").write_text("not wanted")
    return folder


def no_progress(what: str, done: int, total: int) -> None:
    """For tests that check only the result."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By family and tied embeddings: a float32 model folder with companions, one file not to copy."""
    return cache(lambda family, tied: write_source(tmp_path_factory.mktemp(f"{family}-{tied}"), family, tied))


@pytest.fixture(scope="module")
def checkpoints(sources, tmp_path_factory):
    """The same, converted, with most weights in several pieces."""

    @cache
    def make(family: str, tied: str) -> Path:
        target = tmp_path_factory.mktemp(f"{family}-{tied}") / "converted"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PIECE_BYTES", 7000)
            to_megatron(sources(family, tied), target, "keep", no_progress)
        return target

    return make


@pytest.fixture
def source(sources, tmp_path) -> Path:
    """A copy that the test may modify."""
    return Path(shutil.copytree(sources("qwen2", "untied"), tmp_path / "source"))


@pytest.fixture
def checkpoint(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints("qwen2", "untied"), tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[bool, Path]:
    """By sharded: a float32 model with a separate head."""
    return {
        sharded: save_model(tmp_path_factory.mktemp("model") / "folder", sharded=sharded)
        for sharded in (False, True)
    }


@pytest.fixture
def make(models, tmp_path):
    """A copy of one of `models`, edited."""

    def make(sharded: bool, edit, name: str = "folder") -> Path:
        folder = Path(shutil.copytree(models[sharded], tmp_path / name / "model"))
        edit(folder)
        return folder

    return make
