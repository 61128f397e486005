"""The policy loss on plain tensors: advantages, the FutureKL scan, FIPO, DAPO and GRPO, and what they report.

Needs torch and numpy only. Nothing here knows about Megatron, Ray, files or settings files.
"""

from megatron_fipo.objective.advantages import group_advantages, is_informative, overlong_penalty
from megatron_fipo.objective.config import FIPOConfig, PolicyObjective
from megatron_fipo.objective.future_kl import scan_future_kl
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.objective.loss_inputs import PolicyLoss, PolicyRows
from megatron_fipo.objective.metrics import Statistics
from megatron_fipo.objective.scan_layout import ChunkTable, ScanPlan, build_scan_plan

__all__ = [
    "ChunkTable",
    "FIPOConfig",
    "PolicyLoss",
    "PolicyObjective",
    "PolicyRows",
    "ScanPlan",
    "Statistics",
    "build_scan_plan",
    "group_advantages",
    "is_informative",
    "overlong_penalty",
    "policy_loss",
    "scan_future_kl",
]
