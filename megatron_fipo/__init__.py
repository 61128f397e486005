"""Megatron-FIPO: Future-KL Influenced Policy Optimization on Megatron-Core.

The names exported here are the loss by itself, for any trainer that holds whole sequences; they need torch and nothing else.
They are looked up when first used, so that `megatron-fipo --help` does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_fipo.objective.config import FIPOConfig
    from megatron_fipo.objective.padded import LossResult, fipo_loss, future_kl

__all__ = ["FIPOConfig", "LossResult", "fipo_loss", "future_kl"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_fipo.objective import config, padded

    return getattr(config if name == "FIPOConfig" else padded, name)
