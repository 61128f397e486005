"""Each choice of `rollout.engine` has an engine; naming it imports neither torch nor vLLM."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from megatron_fipo.config import Config, ModelConfig, RolloutConfig
from megatron_fipo.engine import registry, vllm_start
from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.registry import calls_at_once, engine_type, register
from megatron_fipo.engine.vllm_engine import VLLMEngine
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
        "temperature": 1.0,
        "stop_strings": False,
        "routes": False,
        "arguments": {},
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


OWN = """
from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.vllm_engine import VLLMEngine

class Own(LocalEngine):
    pass

class OnVLLM(VLLMEngine):
    pass

class Half:
    calls_at_once = 1

    def generate(self, requests, sampling): ...

class Demanding(LocalEngine):
    def __init__(self, model_path, url, port, **others): ...

class Narrow(LocalEngine):
    def __init__(self, model_path, max_model_len, gpu=1): ...

def function(): ...
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_engines.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield lambda name: engine_type(f"own_engines:{name}")
    sys.modules.pop("own_engines", None)
    sys.path.remove(str(tmp_path))


def test_an_engine_by_its_import_path_gets_the_arguments_that_it_names(own, tmp_path):
    def arguments(name: str) -> set[str]:
        return set(own(name).arguments(CONFIG, "m", load_weights=True))

    common = {"model_path", "dtype", "trust_remote_code", "load_weights"}
    assert issubclass(own("Own").load(), LocalEngine)
    assert arguments("Own") == common
    assert arguments("OnVLLM") == set(engine_type("vllm").arguments(CONFIG, "m", load_weights=True))
    assert own("Narrow").arguments(CONFIG, "m", load_weights=True) == {
        "model_path": str(tmp_path / "m"),
        "max_model_len": 30,
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Half",
            "rollout.engine=own_engines:Half lacks requests_per_call, ready, status, abort, begin_weight",
        ),
        (
            "Demanding",
            "own_engines:Demanding requires url, port, but an engine is made with keyword arguments",
        ),
        ("function", "own_engines:function is not a class"),
        ("Absent", "has no Absent"),
    ],
)
def test_an_engine_that_lacks_something_is_refused_at_the_start(own, name, message):
    with pytest.raises(UserError, match=message):
        own(name).check(CONFIG)


def test_the_calls_that_fill_a_batch_follow_its_size():
    def calls(vllm: dict) -> int:
        return calls_at_once(VLLMEngine, RolloutConfig(vllm=vllm))

    assert VLLMEngine.requests_per_call * VLLMEngine.calls_at_once == 1024
    assert [calls({}), calls({"max_num_seqs": 256}), calls({"max_num_seqs": 2049})] == [64, 16, 129]


def test_the_registry_imports_neither_torch_nor_vllm():
    code = (
        "import sys, megatron_fipo.engine.registry, megatron_fipo.engine.protocol, "
        "megatron_fipo.engine.vllm_start;print([name for name in ('torch', 'vllm', 'transformers', 'ray') "
        "if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
