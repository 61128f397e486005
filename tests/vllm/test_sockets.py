"""A run whose engine is vLLM is reachable from this machine alone."""

import pytest

from tests.sockets import LOOPBACK, listeners_of
from tests.system.runs import train_arguments


@pytest.mark.slow
def test_a_run_with_vllm_listens_on_loopback_alone(tmp_path):
    arguments = train_arguments(tmp_path / "run", "iterations=1", "rollout.engine=vllm")
    found, _ = listeners_of(*arguments)
    assert any(listener.process.startswith("VLLM::EngineCor") for listener in found)
    assert [listener for listener in found if listener.address not in LOOPBACK] == []
