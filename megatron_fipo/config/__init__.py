"""Settings: the schema, loading YAML and overrides into it, and checks before anything starts.

Heavy packages are imported inside functions, so that the command line starts fast.
"""

from megatron_fipo.config.load import differences, load_config, load_stored_config, save_config
from megatron_fipo.config.placement import placement_note, with_placement
from megatron_fipo.config.rules import validate, validate_evaluation, validate_sft
from megatron_fipo.config.schema import (
    BatchConfig,
    Config,
    HeadConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    RecoveryConfig,
    RolloutConfig,
    RouterConfig,
    TrackingConfig,
)
from megatron_fipo.config.sft_schema import SftConfig, SftDataConfig, SftOptimizerSettings
from megatron_fipo.config.task_schema import (
    FILE_SOURCES,
    CodeReward,
    DataConfig,
    EnvironmentConfig,
    EvaluationConfig,
    EvaluationSet,
    HttpReward,
    RewardConfig,
    TrainingSet,
)

__all__ = [
    "FILE_SOURCES",
    "BatchConfig",
    "CodeReward",
    "Config",
    "DataConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "EvaluationSet",
    "HeadConfig",
    "HttpReward",
    "ModelConfig",
    "OptimizerSettings",
    "ParallelConfig",
    "RecoveryConfig",
    "RewardConfig",
    "RolloutConfig",
    "RouterConfig",
    "SftConfig",
    "SftDataConfig",
    "SftOptimizerSettings",
    "TrackingConfig",
    "TrainingSet",
    "differences",
    "load_config",
    "load_stored_config",
    "placement_note",
    "save_config",
    "validate",
    "validate_evaluation",
    "validate_sft",
    "with_placement",
]
