"""Megatron-FIPO: Future-KL Influenced Policy Optimization on Megatron-Core.

The names exported here are the loss alone, for any trainer that holds complete sequences; they need torch and nothing
else. They are imported on first use, so that `megatron-fipo --help` does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_fipo.objective.config import ObjectiveConfig as FIPOConfig
    from megatron_fipo.objective.padded import LossResult, fipo_loss, future_kl

__all__ = ["FIPOConfig", "LossResult", "fipo_loss", "future_kl"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_fipo.objective import config, padded

    return config.ObjectiveConfig if name == "FIPOConfig" else getattr(padded, name)
