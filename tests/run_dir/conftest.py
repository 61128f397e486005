"""A saved run for the tests that damage one. Made once, with its heavy imports only if it is used."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
    from tests.run_dir.saved_run import make_run

    return make_run(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def run_dir(saved_run, tmp_path) -> Path:
    from tests.run_dir.saved_run import copy_run

    return copy_run(saved_run, tmp_path / "run")
