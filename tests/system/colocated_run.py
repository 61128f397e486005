"""A trainer rank and a local engine that write down their calls, with the process and the GPU that Ray has given it."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.driver import trainer_group
from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.registry import engine_type, register

KILLED = "killed"


@dataclass(frozen=True)
class Event:
    """A call."""

    name: str
    pid: int
    gpu: str
    """CUDA_VISIBLE_DEVICES there."""


def events(file: Path) -> list[Event]:
    """What was written down, in the order of time."""
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    return [Event(name, int(pid), gpu) for name, pid, gpu in lines]


def recorder(file: Path) -> Callable[[str], None]:
    def record(name: str) -> None:
        line = f"{name}\t{os.getpid()}\t{os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}\n"
        with open(file, "a") as events:
            events.write(line)

    return record


def recording_engine(file: Path, dies_in: int | None) -> type:
    """A local class reaches the actor without importing this module there. Its first process dies in its call `dies_in` of generate."""
    record = recorder(file)

    class RecordingEngine(LocalEngine):
        calls = 0

        def generate(self, *arguments: Any) -> Any:
            record("generate")
            self.calls += 1
            marker = file.with_name(KILLED)
            if self.calls == dies_in and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().generate(*arguments)

        def finish_weight_update(self, version: int) -> dict[str, str]:
            record("weights")
            return super().finish_weight_update(version)

        def sleep(self) -> None:
            record("sleep")
            super().sleep()

        def wake(self) -> None:
            record("wake")
            super().wake()

    return RecordingEngine


def recording_rank(file: Path) -> Callable[[], type]:
    record = recorder(file)

    def load() -> type:
        from megatron_fipo.trainer.rl_worker import RLWorker

        class RecordingRank(RLWorker):
            def train_iteration(self, *arguments: object) -> object:
                record("update")
                return super().train_iteration(*arguments)

        return RecordingRank

    return load


@contextmanager
def recording(file: Path, dies_in: int | None = None) -> Iterator[None]:
    """Runs of this process record their calls in `file` while the context is open."""
    local = engine_type("local")
    register(replace(local, load=lambda: recording_engine(file, dies_in)))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_group, "rl_worker", recording_rank(file))
            yield
    finally:
        register(local)
