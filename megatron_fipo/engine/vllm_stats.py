"""What vLLM's engine core reports after each of its steps. Import after `vllm_start.prepare_environment`."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase


class CoreStats(StatLoggerBase):
    """Counts that show that the engine core works, and how full it is.

    vLLM calls `record` in the actor's process with what its engine process measured.
    """

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.tokens = 0
        """Prompt and response tokens computed since the start."""
        self.waiting = 0
        """Requests that wait for space in the KV cache."""

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        if iteration_stats is not None:
            self.tokens += iteration_stats.num_generation_tokens + iteration_stats.num_prompt_tokens

    def log_engine_initialized(self) -> None: ...
