"""The first error in the output of a process: of a traceback its last line, without one the line that names a crash."""

import pytest

from megatron_fipo.driver.actor_logs import MAX_LENGTH, first_error

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
