"""The rollout engines that `rollout.engine` can name: two built-in ones, and a class of the user by its import path.

Importing this module in the driver loads neither torch nor vLLM: `EngineType.load` imports an engine's
module.
"""

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, RolloutConfig
from megatron_fipo.engine.protocol import RolloutEngine
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import is_import_path
from megatron_fipo.hooks import load_hook


@dataclass(frozen=True)
class EngineType:
    """One choice of `rollout.engine`."""

    name: str
    load: Callable[[], type]
    """Imports the class, which has the methods of `protocol.RolloutEngine`.

    Raises `UserError` if its library is missing or its version is not supported.
    """
    extra_arguments: Callable[[Config], dict[str, Any]] = lambda config: {}
    """Keyword arguments of the class, in addition to the ones common to all engines. Raises `UserError` for settings that the
    engine cannot have."""
    select: Callable[[type, dict[str, Any]], dict[str, Any]] = lambda engine, arguments: arguments
    """Those of the keyword arguments that the class takes."""

    def arguments(self, config: Config, model_path: str, *, load_weights: bool) -> dict[str, Any]:
        """Keyword arguments of the class.

        Without `load_weights` an engine serves after its first weight update.
        """
        arguments = {
            "model_path": str(Path(model_path).resolve()),
            "dtype": config.model.dtype,
            "trust_remote_code": config.model.trust_remote_code,
            "load_weights": load_weights,
            **self.extra_arguments(config),
        }
        return self.select(self.load(), arguments)

    def check(self, config: Config) -> None:
        """Raises `UserError` if the engine can't be loaded, or not with these settings."""
        self.arguments(config, config.model.path, load_weights=False)


_ENGINE_TYPES: dict[str, EngineType] = {}


def register(engine_type: EngineType) -> None:
    """Make an engine available under its name, replacing an earlier one of that name."""
    _ENGINE_TYPES[engine_type.name] = engine_type


def engine_type(name: str) -> EngineType:
    """The engine that `rollout.engine` names."""
    if is_import_path(name):
        return EngineType(name, lambda: _load_own(name), _offered_arguments, _accepted)
    return _ENGINE_TYPES[name]


def calls_at_once(engine: Any, rollout: RolloutConfig) -> int:
    """Calls of `generate` that keep an engine of this class busy: on vLLM as many as fill its largest batch."""
    most = rollout.vllm.get("max_num_seqs")
    return engine.calls_at_once if most is None else math.ceil(most / engine.requests_per_call)


def _load_local() -> type:
    from megatron_fipo.engine.local import LocalEngine

    return LocalEngine


def _load_vllm() -> type:
    from megatron_fipo.engine.vllm_start import check_vllm

    check_vllm()
    from megatron_fipo.engine.vllm_engine import VLLMEngine

    return VLLMEngine


def _load_own(path: str) -> type:
    """The user's class. Raises `UserError` if it lacks methods or attributes of `RolloutEngine`."""
    engine = load_hook(path, "rollout.engine", os.getcwd())
    if not isinstance(engine, type):
        raise UserError(
            f"rollout.engine={path} is not a class; name a class with the methods of RolloutEngine"
        )
    missing = [name for name in ENGINE_PARTS if not hasattr(engine, name)]
    if missing:
        raise UserError(
            f"rollout.engine={path} lacks {', '.join(missing)}; docs/rollout-engines.md describes each part of an engine"
        )
    return engine


ENGINE_PARTS = (
    *RolloutEngine.__annotations__,
    *(name for name, part in vars(RolloutEngine).items() if inspect.isfunction(part) and name[0] != "_"),
)
"""Attributes and methods of an engine class."""


def _accepted(engine: type, offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered keyword arguments that the constructor names."""
    parameters = inspect.signature(engine).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if unknown := [name for name in required if name not in offered]:
        raise UserError(
            f"rollout.engine={engine.__module__}:{engine.__qualname__} requires {', '.join(unknown)}, but an engine is made with "
            f"keyword arguments among {', '.join(offered)}; give the others a default"
        )
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return offered
    return {name: value for name, value in offered.items() if name in parameters}


def _vllm_arguments(config: Config) -> dict[str, Any]:
    from megatron_fipo.config.vllm_arguments import check_arguments

    check_arguments(config)
    return _offered_arguments(config)


def _offered_arguments(config: Config) -> dict[str, Any]:
    rollout = config.rollout
    return {
        "max_model_len": rollout.longest_sequence,
        "tensor_parallel_size": rollout.engine_tensor_parallel_size,
        "gpu_memory_share": rollout.gpu_memory_share,
        "deterministic": config.deterministic,
        "temperature": rollout.temperature,
        "stop_strings": bool(rollout.stop or config.environment.stop),
        "routes": config.model.router.replay == "rollout",
        "arguments": rollout.vllm,
    }


register(EngineType("local", _load_local))
register(EngineType("vllm", _load_vllm, _vllm_arguments))
