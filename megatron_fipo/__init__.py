"""Megatron-FIPO: Future-KL Influenced Policy Optimization on Megatron-Core.

The names exported here are the loss by itself, for any trainer that holds whole sequences; they need torch and nothing else.
"""

from megatron_fipo.objective.config import FIPOConfig
from megatron_fipo.objective.dense import LossResult, fipo_loss, future_kl

__all__ = ["FIPOConfig", "LossResult", "fipo_loss", "future_kl"]
