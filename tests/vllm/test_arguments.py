"""The names that `rollout.vllm` may have, compared with those of the installed vLLM."""

from dataclasses import fields

from vllm import AsyncEngineArgs

from megatron_fipo.config.vllm_arguments import OWNED, SPEED_ONLY, known_arguments


def test_the_names_are_those_of_vllm():
    names = [field.name for field in fields(AsyncEngineArgs)]
    assert known_arguments() == names
    assert OWNED.keys() | SPEED_ONLY <= set(names)
    assert not OWNED.keys() & SPEED_ONLY
