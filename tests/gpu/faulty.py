"""Tests that fail in every way, for `tests/kernels/test_gpu_check.py`. The name keeps them out of all other runs."""

import os
from collections.abc import Callable

import pytest

from tests.gpu import conftest

pytestmark = pytest.mark.gpu


def test_fine(record_errors: Callable) -> None:
    record_errors({"error": 0.5}, {"error": 1.0})


@pytest.mark.parametrize("error", [1.5, float("nan")], ids=["a little", "a lot"])
def test_wrong(record_errors: Callable, error: float) -> None:
    record_errors({"error": error}, {"error": 1.0})


def test_left_out() -> None:
    pytest.skip("it needs more")


def test_breaks_the_device() -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("illegal memory access")

    conftest.synchronize = lost  # stays so in this process


def test_after_the_break() -> None:
    pass


def test_dies() -> None:
    os.abort()


def test_last() -> None:
    pass
