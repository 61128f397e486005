"""A local engine that takes a tenth of a second for each token, so that a rollout or an evaluation lasts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.registry import engine_type, register

TOKEN_S = 0.1


def slow_engine() -> type:
    class SlowEngine(LocalEngine):
        """A local class reaches the actor without importing this module there."""

        def _append(self, *args: Any) -> list[int]:
            time.sleep(TOKEN_S)
            return super()._append(*args)

    return SlowEngine


@contextmanager
def slow_engines() -> Iterator[None]:
    """Runs of this process use slow engines while the context is open. The tokens are the same."""
    local = engine_type("local")
    register(replace(local, load=slow_engine))
    try:
        yield
    finally:
        register(local)
