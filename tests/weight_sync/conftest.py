"""The model folder of the engine's tests."""

from tests.engine.conftest import model_folder  # noqa: F401
