"""Settings: the schema, loading YAML and overrides into it, and checks before anything starts.

Heavy packages are imported inside functions, so that the command line starts fast.
"""

from megatron_fipo.config.load import differences, load_config, save_config
from megatron_fipo.config.rules import validate, validate_evaluation, validate_sft
from megatron_fipo.config.schema import (
    BatchConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    HeadConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    SftConfig,
    SftDataConfig,
    SftOptimizerSettings,
    TrackingConfig,
)

__all__ = [
    "BatchConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "HeadConfig",
    "ModelConfig",
    "OptimizerSettings",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "SftConfig",
    "SftDataConfig",
    "SftOptimizerSettings",
    "TrackingConfig",
    "differences",
    "load_config",
    "save_config",
    "validate",
    "validate_evaluation",
    "validate_sft",
]
