"""Correctness on a GPU: `pytest -m gpu tests/gpu`, or, at toy size on the CPU, with TRITON_INTERPRET=1.

`tools/gpu_check.py` runs these files in processes of their own, so that a test that breaks the device costs only itself.
Each test gives its errors to `record_errors`, which the check's table shows.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # deterministic mode wants it before the first product

import pytest
import torch

from tests.gpu.compare import Errors, within
from tools.bench.harness import REHEARSAL, Bench, open_bench, release, send, synchronize
from tools.bench.report import FAILED, OK, SKIPPED, Row, errors_text, reason, title_of_test


@pytest.fixture(scope="session")
def bench() -> Bench:
    if os.environ.get(REHEARSAL) != "1" and not torch.cuda.is_available():
        pytest.skip("no GPU here; with TRITON_INTERPRET=1 these tests run at toy size on the CPU")
    return open_bench()


@pytest.fixture(autouse=True)
def usable_device(bench: Bench, request: pytest.FixtureRequest) -> Iterator[None]:
    """Free the test's memory and wait for the device; if that fails, no other test runs in this process."""
    yield
    try:
        release(bench)
        synchronize(bench)
    except RuntimeError as error:
        request.session.shouldfail = "the device is unusable"
        raise AssertionError(f"the device was unusable afterwards: {error}") from None


@pytest.fixture
def record_errors(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Note errors for the table, then compare them with their tolerances; without tolerances only note them."""

    def record(errors: Errors, tolerances: Mapping[str, float] | None = None) -> None:
        for kind, error in errors.items():
            record_property(kind, float(error))
        if tolerances is not None:
            within(errors, tolerances)

    return record


def pytest_collection_finish(session: pytest.Session) -> None:
    send(cases=[item.nodeid for item in session.items])


def pytest_runtest_logstart(nodeid: str) -> None:
    send(begin=nodeid)


_failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One row per test: of its call, or of what went wrong before or after it."""
    if report.failed and report.nodeid not in _failed:
        _failed.add(report.nodeid)
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else report.longreprtext
        row = reason(FAILED, "", title_of_test(report.nodeid), why.removeprefix("AssertionError: "), True)
        send(row=asdict(row))
    elif report.skipped and isinstance(report.longrepr, tuple):
        why = report.longrepr[2].removeprefix("Skipped: ")
        send(row=asdict(reason(SKIPPED, "", title_of_test(report.nodeid), why, False)))
    elif report.when == "call" and report.passed:
        figures = dict(report.user_properties)
        row = Row("", title_of_test(report.nodeid), OK, errors_text(figures) or "passed", figures, True)
        send(row=asdict(row))


def pytest_runtest_logfinish(nodeid: str) -> None:
    send(end=nodeid)
