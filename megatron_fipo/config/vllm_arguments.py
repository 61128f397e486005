"""The arguments of vLLM's engine that a user may set by `rollout.vllm`, and those that this package sets.

Imports neither torch nor vLLM: the driver checks the settings before anything starts.
"""

import ast
import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.config.schema import Config
from megatron_fipo.errors import UserError

OWNED = {
    "model": "set model.path",
    "model_weights": "set model.path",
    "tokenizer": "the tokenizer is that of model.path",
    "skip_tokenizer_init": "vLLM loads a tokenizer if rollout.stop needs one",
    "hf_config_path": "the sizes are those of model.path, which the trainer reads too",
    "hf_overrides": "change config.json in model.path, which the trainer reads too",
    "trust_remote_code": "set model.trust_remote_code",
    "dtype": "set model.dtype; it must be the trainer's",
    "max_model_len": "set rollout.max_prompt_length and rollout.max_response_length",
    "tensor_parallel_size": "set rollout.engine_tensor_parallel_size",
    "pipeline_parallel_size": "weight updates address the ranks of one stage; set rollout.engine_tensor_parallel_size",
    "data_parallel_size": "set rollout.num_engines, the number of replicas",
    "distributed_executor_backend": "it follows from the placement of the engine's ranks",
    "gpu_memory_utilization": "set rollout.gpu_memory_share",
    "enable_sleep_mode": "colocated engines need it; set rollout.placement",
    "seed": "set seed and deterministic",
    "load_format": "engines receive their weights from the trainer",
    "generation_config": "sampling is that of rollout and evaluation, not of model.path",
    "override_generation_config": "sampling is that of rollout and evaluation",
    "logprobs_mode": "log-probs must be those after temperature and before truncation, which the loss compares",
    "logits_processors": "they would change log-probs after the policy that the trainer knows",
    "worker_cls": "weight updates are methods of the worker",
    "worker_extension_cls": "weight updates are methods of the worker",
    "weight_transfer_config": "weight updates use the backend of this package",
    "disable_log_stats": "the driver reads vLLM's statistics by its own logger",
    "enable_return_routed_experts": "set model.router.replay=rollout",
    "aux_output_config": "set model.router.replay=rollout",
    "enable_lora": "the trainer updates complete weights",
}
"""Arguments that this package sets, each with the reason or the setting to use instead."""
SPEED_ONLY = frozenset(
    {
        "max_num_seqs",
        "max_num_batched_tokens",
        "long_prefill_token_threshold",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "compilation_config",
        "cudagraph_capture_sizes",
        "max_cudagraph_capture_size",
        "optimization_level",
        "async_scheduling",
        "block_size",
        "kv_cache_memory_bytes",
    }
)
"""Arguments that change how fast tokens are sampled and not from which distribution; a resumed run may change them."""
FP8_KV_CACHE = "fp8"
"""Prefix of the values of `kv_cache_dtype` with one byte for each number."""


def known_arguments() -> list[str]:
    """The fields of `vllm.AsyncEngineArgs`, read from the source of the installed vLLM, which `check_vllm` found, without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf-8"))
    classes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
    ]
    return [
        field.target.id
        for node in classes
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    ]


def check_arguments(config: Config) -> None:
    """Raises `UserError` for an entry of `rollout.vllm` that vLLM does not know, that this package sets, or that contradicts
    another setting. vLLM checks the values when an engine starts."""
    given = config.rollout.vllm
    names = known_arguments() if given else []
    for name in given:
        if name in OWNED:
            raise UserError(f"rollout.vllm.{name} is not free: {OWNED[name]}")
        if name not in names or name.startswith("_"):
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise UserError(f"rollout.vllm.{name}: vLLM has no such argument (did you mean {nearest}?)")
    most = given.get("max_num_seqs", 1)
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise UserError(f"rollout.vllm.max_num_seqs must be an integer of at least 1, not {most!r}")
    if config.deterministic and given.get("enable_prefix_caching"):
        raise UserError(
            "deterministic=true needs rollout.vllm.enable_prefix_caching=false: which blocks are computed depends on the requests "
            "before"
        )
    if given.get("speculative_config"):
        _check_speculation(config)


def _check_speculation(config: Config) -> None:
    rollout = config.rollout
    if rollout.temperature != 1:
        raise UserError(
            f"rollout.vllm.speculative_config needs rollout.temperature=1, not {rollout.temperature:g}: other temperatures need a "
            "logits processor for their log-probs, which vLLM refuses with speculative decoding"
        )
    values = {"rollout": rollout.min_p, "evaluation": config.evaluation.min_p}
    values |= {f"evaluation.sets.{name}": own.min_p or 0.0 for name, own in config.evaluation.sets.items()}
    for key, min_p in values.items():
        if min_p:
            raise UserError(
                f"rollout.vllm.speculative_config needs {key}.min_p=0, not {min_p:g}: vLLM ignores it with speculative decoding"
            )


def sampling_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that may change what is sampled."""
    return {name: value for name, value in given.items() if name not in SPEED_ONLY}


def kv_element_bytes(given: Mapping[str, Any], model_bytes: int) -> int:
    """Bytes of one number in the KV cache; `model_bytes` are those of a weight."""
    return 1 if str(given.get("kv_cache_dtype", "auto")).startswith(FP8_KV_CACHE) else model_bytes
