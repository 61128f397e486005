"""What vLLM's engine core reports after each of its steps. Import after `vllm_start.prepare_environment`."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from megatron_fipo.engine.protocol import EngineStatus


class CoreStats(StatLoggerBase):
    """Counts that show that the engine core works, and how full it is.

    vLLM calls `record` in the actor's process with what its engine process measured.
    """

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.tokens = 0
        """Prompt and response tokens computed since the start."""
        self.generated_tokens = 0
        """Response tokens among them."""
        self.running = 0
        """Requests in the batch of the last step."""
        self.waiting = 0
        """Requests that wait for space in the KV cache."""
        self.kv_use = 0.0
        """Share of the KV cache in use."""
        self.preemptions = 0
        """Requests that lost their space in the KV cache since the start."""
        self.prefix_queries = 0
        """Prompt tokens looked up in the prefix cache since the start."""
        self.prefix_hits = 0
        """Prompt tokens found there."""

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.kv_use = scheduler_stats.kv_cache_usage
            self.prefix_queries += scheduler_stats.prefix_cache_stats.queries
            self.prefix_hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self.tokens += iteration_stats.num_generation_tokens + iteration_stats.num_prompt_tokens
            self.generated_tokens += iteration_stats.num_generation_tokens
            self.preemptions += iteration_stats.num_preempted_reqs

    def status(self, weight_version: int, kv_tokens: int) -> EngineStatus:
        """The counts so far. The KV cache holds `kv_tokens` tokens."""
        return EngineStatus(
            weight_version,
            self.tokens,
            self.waiting,
            kv_tokens,
            self.running,
            self.kv_use,
            self.generated_tokens,
            self.preemptions,
            self.prefix_queries,
            self.prefix_hits,
        )

    def log_engine_initialized(self) -> None: ...
