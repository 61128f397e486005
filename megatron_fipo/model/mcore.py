"""Differences between Megatron-Core 0.16 to 0.19, and workarounds for its bugs. All of them are in this file.

All other modules work with every supported release.
"""

import inspect
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import __version__ as MCORE_VERSION
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import Adam, DistributedOptimizer, MegatronOptimizer
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

SUPPORTED = ((0, 16), (0, 20))
"""First supported release, and the first release that is not known to work."""

VERSION = tuple(int(part) for part in MCORE_VERSION.split(".")[:2])

if not SUPPORTED[0] <= VERSION < SUPPORTED[1]:
    raise RuntimeError(f"megatron-core {MCORE_VERSION} is not supported; install 0.16 to 0.19")

HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters
"""Whether `GPTModel.forward` takes a function for the hidden states after the final norm (0.18 and later)."""

USES_HYBRID_MODEL = False
"""Whether models are HybridModels instead of GPTModels (0.19 and later only). Both give the same numbers and
checkpoints; docs/megatron-core-versions.md states what is missing before the change."""

HALVES = 2
"""Layers of HybridModel for a layer of GPTModel: its attention, and its feed-forward part."""

ASYNC_SAVE = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)
"""Keywords that make `dist_checkpointing.save` use its own background writer (newer releases prefer another
package's)."""

NO_CUDA_GRAPHS: dict[str, Any] = {
    "cuda_graph_modules" if hasattr(TransformerConfig, "cuda_graph_modules") else "cuda_graph_scope": []
}
"""Keywords of `TransformerConfig` without parts to capture. Its own default is a deprecated text."""

HAS_PARAMETER_LAYOUT = "full_param_layout" in inspect.signature(DistributedDataParallel.__init__).parameters
"""Whether `DistributedDataParallel` wants the layout of its buffers from its caller (0.18 and later)."""

COMMON_STATE_FILE = "common.pt" if VERSION < (0, 19) else None
"""The file from which this release reads a checkpoint's common state. Later ones read it too, but write it
with the data."""

ADAM = Adam.__module__.partition(".")[0]
"""The package of the optimizer's Adam: `transformer_engine`, `apex` or `torch` (`megatron_fipo` on the CPU
platform)."""

HAS_APEX_WEIGHT_GRADIENT = find_spec("fused_weight_gradient_mlp_cuda") is not None
"""Whether apex has the extension with which Megatron-Core's linear layers add to the gradient buffer."""


def has_transformer_engine() -> bool:
    """Whether NVIDIA's Transformer Engine is installed (searched, not imported)."""
    return find_spec("transformer_engine") is not None


def feed_forward_spec(linear_fc1: type, linear_fc2: type) -> Any:
    """The `mlp` of a layer's submodules: a spec in 0.16 and 0.17, then a function that builds it."""
    submodules = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)
    if not hasattr(MLP, "as_mlp_submodule"):
        return ModuleSpec(module=MLP, submodules=submodules)
    return partial(MLP.as_mlp_submodule, submodules=submodules)


def parameter_layout(
    module: torch.nn.Module, settings: DistributedDataParallelConfig, disable_bucketing: bool
) -> dict[str, Any]:
    """Keywords of `DistributedDataParallel` for the layout of its buffers, which is the one that it would compute itself."""
    if not (HAS_PARAMETER_LAYOUT and settings.use_distributed_optimizer):
        return {}
    bucket_size = settings.bucket_size
    if (
        not settings.overlap_grad_reduce
        or disable_bucketing
        or parallel_state.get_pipeline_model_parallel_rank()
    ):
        bucket_size = None
    elif bucket_size is None:
        bucket_size = max(40_000_000, 1_000_000 * parallel_state.get_data_parallel_world_size())
    layout = DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        bucket_size,
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        settings,
        parallel_state.get_expert_data_parallel_world_size(),
    )
    return {"full_param_layout": layout}


def layer_of(module: MegatronModule) -> int:
    """The layer of a `TransformerLayer` or `MoELayer`, counted from 0 over all pipeline stages as in a family's table."""
    return (module.layer_number - 1) // (HALVES if module.config.is_hybrid_model else 1)


def fuse_gradient_accumulation(chunk: MegatronModule) -> bool:
    """Make a wrapped chunk's linear layers add weight gradients to the buffer within their product.

    Returns whether they do.

    Megatron-Core's switch (`gradient_accumulation_fusion`) covers Transformer Engine's layers too, but with
    it GPTModel's output layer cannot be built without apex, although the head never runs that layer. So this
    sets the attribute that the layers read.
    """
    layers = [module for module in chunk.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True
    return bool(layers) or chunk.config.gradient_accumulation_fusion


def mark_experts(chunk: MegatronModule) -> None:
    """Mark the weights of experts, whose gradients are reduced over the expert-data-parallel group.

    Releases before 0.19 mark them only with several expert-parallel ranks. So with tensor parallelism outside experts alone,
    each tensor-parallel rank would keep its own gradient of the same experts.
    """
    config = chunk.config
    if config.expert_tensor_parallel_size == config.tensor_model_parallel_size:
        return
    for layer in (module for module in chunk.modules() if isinstance(module, MoELayer)):
        for parameter in layer.experts.parameters():
            parameter.allreduce = False


def full_precision(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's values without gradient.

    Transformer Engine's FP8 parameters in their nominal dtype, others unchanged.
    """
    return dequantize_fp8_tensor(parameter.detach()) if is_float8tensor(parameter) else parameter.detach()


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether the parameter is one of Transformer Engine's FP8 tensors."""
    return is_float8tensor(parameter)


def report_loaded_tensors(report: Callable[[], None]) -> None:
    """Call `report` after each tensor that this process loads from a distributed checkpoint, from now on.

    torch's planner has an empty method for this, and Megatron's strategy offers no way to give it another planner.
    """
    DefaultLoadPlanner.commit_tensor = lambda *_: report()  # type: ignore[method-assign]


def uses_decoupled_gradients(optimizer: MegatronOptimizer) -> bool:
    """Whether gradients are read from `decoupled_grad`, whose dtype may differ from the parameter's."""
    return bool(optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)


def make_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Initialize Adam's state with zeros for every parameter that has no state yet.

    Megatron-Core's own `init_state_fn` does not exist for a host-offloaded optimizer, and it calls the
    precision-aware optimizer of Transformer Engine 2.1 and later with too few arguments.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.config.optimizer_cpu_offload:
            _step_without_change(part)
        elif part.config.use_precision_aware_optimizer:
            _initialize_missing_states(part)
        else:
            part.init_state_fn(part.optimizer, part.config)


def _initialize_missing_states(part: DistributedOptimizer) -> None:
    """The state of the precision-aware optimizer, with complete float32 master weights (no remainders)."""
    optimizer = part.optimizer
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if not optimizer.state[parameter]:
            optimizer.initialize_state(parameter, False)  # positional: store_param_remainders


def drop_classes(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Remove the classes of a host-offloaded optimizer's parts from its state for a checkpoint, in place.

    They are in the parameter groups, and torch refuses to unpickle them.
    """
    if not optimizer.config.optimizer_cpu_offload:
        return
    for group in state["optimizer"]["param_groups"]:
        for key in [key for key, value in group.items() if isinstance(value, type)]:
            del group[key]


def count_steps_once(optimizer: MegatronOptimizer) -> None:
    """Make a host-offloaded optimizer that was just loaded continue its step count.

    It loads the count into its outer parameter groups. From there every step would reset the count of its GPU
    part, which has its own.
    """
    if optimizer.config.optimizer_cpu_offload:
        for group in optimizer.param_groups:
            group.pop("step", None)


def _step_without_change(part: DistributedOptimizer) -> None:
    """A step at rate 0 with zero gradients that creates the state of a host-offloaded optimizer.

    The step is not counted.
    """
    hybrid = part.optimizer
    if any(hybrid.state.values()):
        return
    rates = [group["lr"] for group in hybrid.param_groups]
    for group in hybrid.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.decoupled_grad = torch.zeros_like(parameter, dtype=torch.float32)
    hybrid.step()
    hybrid.zero_grad()
    for group, rate in zip(hybrid.param_groups, rates, strict=True):
        group["lr"] = rate
    for sub in hybrid.sub_optimizers:  # torch's Adam counts per parameter, Transformer Engine's per group
        for state in sub.state.values():
            if "step" in state:
                state["step"].zero_()
        for group in sub.param_groups:
            if "step" in group:
                group["step"] = 0
