"""The rollout engines that `rollout.engine` can name.

Importing this module in the driver loads neither torch nor vLLM: `EngineType.load` imports an engine's
module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config


@dataclass(frozen=True)
class EngineType:
    """One choice of `rollout.engine`."""

    name: str
    load: Callable[[], type]
    """Imports the class, which has the methods of `protocol.RolloutEngine`.

    Raises `UserError` if its library is missing or its version is not supported.
    """
    extra_arguments: Callable[[Config], dict[str, Any]] = lambda config: {}
    """Keyword arguments of the class, in addition to the ones common to all engines."""

    def arguments(self, config: Config, model_path: str, *, load_weights: bool) -> dict[str, Any]:
        """Keyword arguments of the class.

        Without `load_weights` an engine serves after its first weight update.
        """
        return {
            "model_path": str(Path(model_path).resolve()),
            "dtype": config.model.dtype,
            "trust_remote_code": config.model.trust_remote_code,
            "load_weights": load_weights,
            **self.extra_arguments(config),
        }


_ENGINE_TYPES: dict[str, EngineType] = {}


def register(engine_type: EngineType) -> None:
    """Make an engine available under its name, replacing an earlier one of that name."""
    _ENGINE_TYPES[engine_type.name] = engine_type


def engine_type(name: str) -> EngineType:
    """The engine that `rollout.engine` names."""
    return _ENGINE_TYPES[name]


def _load_local() -> type:
    from megatron_fipo.engine.local import LocalEngine

    return LocalEngine


def _load_vllm() -> type:
    from megatron_fipo.engine.vllm_start import check_vllm

    check_vllm()
    from megatron_fipo.engine.vllm_engine import VLLMEngine

    return VLLMEngine


def _vllm_arguments(config: Config) -> dict[str, Any]:
    rollout = config.rollout
    return {
        "max_model_len": rollout.max_prompt_length + rollout.max_response_length,
        "tensor_parallel_size": rollout.engine_tensor_parallel_size,
        "gpu_memory_share": rollout.gpu_memory_share,
        "deterministic": config.deterministic,
    }


register(EngineType("local", _load_local))
register(EngineType("vllm", _load_vllm, _vllm_arguments))
