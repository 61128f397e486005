"""The first error in the output of a process: of a traceback its last line, without one the line that names a crash."""

from pathlib import Path

import pytest
import ray

from megatron_fipo.driver.actor_logs import MAX_LENGTH, first_error, why_it_died
from megatron_fipo.errors import LOG_DIR_VARIABLE, RAY_LOGS_VARIABLE
from megatron_fipo.network import LOOPBACK

TRACEBACK = """\
:actor_name:LocalEngine
WARNING 11-29 [config.py:12] an error is possible
Traceback (most recent call last):
  File "/a/engine.py", line 3, in ready
    raise ValueError("no space for the KV cache")
ValueError: no space for the KV cache
RuntimeError: engine core failed, see above
"""


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (TRACEBACK, "ValueError: no space for the KV cache"),
        (
            "(EngineCore pid=12) ERROR 11-29 [core.py:7] torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB.",
            "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB",
        ),
        (
            "loading\nterminate called after throwing an instance of 'std::bad_alloc'\n",
            "terminate called after throwing an instance of 'std::bad_alloc'",
        ),
        (
            "Fatal Python error: Segmentation fault\n\nThread 0x1:\n",
            "Fatal Python error: Segmentation fault",
        ),
        (
            "megatron_fipo.errors.UserError: x has no config.json",
            "megatron_fipo.errors.UserError: x has no config.json",
        ),
        ("loading\ndone\n", None),
        ("", None),
        ("OSError: " + "x" * 1000, ("OSError: " + "x" * 1000)[:MAX_LENGTH]),
    ],
)
def test_the_first_error_is_found(output, expected):
    assert first_error(output) == expected


def died(address: str) -> ray.exceptions.RayError:
    """With the message that Ray has for an actor on the node with this address."""
    message = f"The actor died unexpectedly before finishing this task.\n\tpid: 77\n\tip: {address}\n"
    return ray.exceptions.RayError(message)


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Ray's logs on this node, and those of the job."""
    here, job = tmp_path / "here", tmp_path / "job"
    for path, reason in (
        (here / "worker-a-77.err", "ValueError: of this node\n"),
        (job / "ray/node2/worker-b-77.err", "ValueError: of node2\n"),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(reason)
    monkeypatch.setenv(RAY_LOGS_VARIABLE, str(here))
    return here, job


def test_the_reason_on_another_node_is_not_that_of_a_process_here(folders, monkeypatch):
    here, job = folders
    assert why_it_died(died(LOOPBACK)) == f"ValueError: of this node; see {here}/worker-a-77.err"
    reason = "The actor died unexpectedly before finishing this task"
    assert why_it_died(died("10.0.0.2")) == f"{reason}; see {here} on 10.0.0.2"
    monkeypatch.setenv(LOG_DIR_VARIABLE, str(job))
    assert why_it_died(died(LOOPBACK)) == f"ValueError: of this node; see worker-a-77.err in {job}"
    assert why_it_died(died("10.0.0.2")) == f"ValueError: of node2; see {job}/ray/node2/worker-b-77.err"
    (job / "ray/node3").mkdir()
    (job / "ray/node3/worker-c-77.err").write_text("ValueError: of node3")
    assert why_it_died(died("10.0.0.2")) == f"{reason}; see {job}"
