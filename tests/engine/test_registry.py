"""Each choice of `rollout.engine` has an engine; naming it imports neither torch nor vLLM."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from megatron_fipo.config import Config, ModelConfig, RolloutConfig
from megatron_fipo.engine import registry, vllm_start
from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.registry import engine_type, register
from megatron_fipo.errors import UserError
from megatron_fipo.fields import rule_of

CONFIG = Config(
    model=ModelConfig(path="m", dtype="bfloat16"),
    rollout=RolloutConfig(max_prompt_length=10, max_response_length=20, engine_tensor_parallel_size=2),
    deterministic=True,
)


def test_every_choice_of_the_config_is_registered():
    (choices,) = (rule_of(f).names for f in fields(RolloutConfig) if f.name == "engine")
    assert [engine_type(name).name for name in choices] == list(choices)


def test_arguments_come_from_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = {
        "model_path": str(tmp_path / "m"),
        "dtype": "bfloat16",
        "trust_remote_code": False,
        "load_weights": False,
    }
    assert engine_type("local").arguments(CONFIG, "m", load_weights=False) == common
    assert engine_type("vllm").arguments(CONFIG, "m", load_weights=False) == common | {
        "max_model_len": 30,
        "tensor_parallel_size": 2,
        "gpu_memory_share": CONFIG.rollout.gpu_memory_share,
        "deterministic": True,
    }


def test_loading_checks_the_library(monkeypatch):
    assert engine_type("local").load() is LocalEngine
    monkeypatch.setattr(vllm_start, "installed_vllm", lambda: None)
    with pytest.raises(UserError, match="not installed"):
        engine_type("vllm").load()


def test_an_engine_can_be_replaced(monkeypatch):
    monkeypatch.setattr(registry, "_ENGINE_TYPES", dict(registry._ENGINE_TYPES))

    class Replacement(LocalEngine):
        pass

    register(replace(engine_type("local"), load=lambda: Replacement))
    assert engine_type("local").load() is Replacement


def test_the_registry_imports_neither_torch_nor_vllm():
    code = (
        "import sys, megatron_fipo.engine.registry, megatron_fipo.engine.protocol, "
        "megatron_fipo.engine.vllm_start;print([name for name in ('torch', 'vllm', 'transformers', 'ray') "
        "if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
