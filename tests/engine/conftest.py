from pathlib import Path

import pytest

from megatron_fipo.engine.local import LocalEngine
from tests.engine.tiny import save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared_engine(model_folder: Path) -> LocalEngine:
    """For tests that do not change the weights."""
    return loaded(model_folder)


def loaded(folder: Path) -> LocalEngine:
    engine = LocalEngine(str(folder), "float32")
    engine.ready()
    return engine
