from tests.engine.conftest import model_folder, shared_engine

__all__ = ["model_folder", "shared_engine"]
