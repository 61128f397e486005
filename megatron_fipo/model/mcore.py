"""The one place that knows how Megatron-Core 0.16 to 0.19 differ, and where its own switches fall short.

Everything else is written for all of them.
"""

import inspect
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import Adam, DistributedOptimizer, MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

SUPPORTED = ((0, 16), (0, 20))
"""First supported release, and the first that is not known to work."""

VERSION = tuple(int(part) for part in version("megatron-core").split(".")[:2])

if not SUPPORTED[0] <= VERSION < SUPPORTED[1]:
    raise RuntimeError(f"megatron-core {version('megatron-core')} is not supported; install 0.16 to 0.19")

HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters
"""Whether `GPTModel.forward` takes a function for the hidden states behind the final norm (0.18 and later)."""

ASYNC_SAVE = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)
"""Keywords by which `dist_checkpointing.save` uses its own background writer (newer releases prefer another package's)."""

COMMON_STATE_FILE = "common.pt" if VERSION < (0, 19) else None
"""The file in which this release looks for a checkpoint's common state. Later ones read it too, but write it among the data."""

ADAM = Adam.__module__.partition(".")[0]
"""Whose Adam the optimizer is: `transformer_engine`, `apex` or `torch` (`megatron_fipo` on the CPU platform)."""

HAS_APEX_WEIGHT_GRADIENT = find_spec("fused_weight_gradient_mlp_cuda") is not None
"""Whether apex is built with the extension by which Megatron-Core's own linear layers add to the gradient buffer."""


def has_transformer_engine() -> bool:
    """Whether NVIDIA's Transformer Engine is installed (looked up, not imported)."""
    return find_spec("transformer_engine") is not None


def fuse_gradient_accumulation(chunk: MegatronModule) -> bool:
    """Let a wrapped chunk's linear layers add weight gradients to the buffer within their product; whether they do.

    Megatron-Core's switch for it (`gradient_accumulation_fusion`) covers Transformer Engine's layers too, but refuses to build
    GPTModel's output layer without apex, although the head never runs that layer. So this sets it where the layers read it.
    """
    layers = [module for module in chunk.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True
    return bool(layers) or chunk.config.gradient_accumulation_fusion


def full_precision(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's values without gradient; an FP8 one (Transformer Engine's) in its nominal dtype, others as they are."""
    return dequantize_fp8_tensor(parameter.detach()) if is_float8tensor(parameter) else parameter.detach()


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether the parameter is one of Transformer Engine's FP8 tensors."""
    return is_float8tensor(parameter)


def uses_decoupled_gradients(optimizer: MegatronOptimizer) -> bool:
    """Whether the optimizer reads gradients from `decoupled_grad`, where their dtype may differ from the parameter's."""
    return bool(optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)


def make_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter the zeros that Adam's first step would start from, if it has no state yet.

    Megatron-Core's own `init_state_fn` is absent for a host-offloaded optimizer, and calls the precision-aware one of Transformer
    Engine 2.1 and later with too few arguments.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.config.optimizer_cpu_offload:
            _step_without_change(part)
        elif part.config.use_precision_aware_optimizer:
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    if not part.optimizer.state[parameter]:
                        part.optimizer.initialize_state(
                            parameter, False
                        )  # the master weights whole, no remainders
        else:
            part.init_state_fn(part.optimizer, part.config)


def drop_classes(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Take out of what a checkpoint is to store of a host-offloaded optimizer the classes of its parts, in place.

    They are in its parameter groups, and torch refuses to unpickle them.
    """
    if not optimizer.config.optimizer_cpu_offload:
        return
    for group in state["optimizer"]["param_groups"]:
        for key in [key for key, value in group.items() if isinstance(value, type)]:
            del group[key]


def count_steps_once(optimizer: MegatronOptimizer) -> None:
    """Let a host-offloaded optimizer that has just been loaded count on.

    It loads the count into groups from which each step sets back the count of its part on the GPU; that part has its own.
    """
    if optimizer.config.optimizer_cpu_offload:
        for group in optimizer.param_groups:
            group.pop("step", None)


def _step_without_change(part: DistributedOptimizer) -> None:
    """A step at rate 0 with zero gradients, which is not counted: the state of a host-offloaded optimizer exists afterwards."""
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
    for sub in hybrid.sub_optimizers:  # torch's Adam counts by parameter, Transformer Engine's by group
        for state in sub.state.values():
            if "step" in state:
                state["step"].zero_()
        for group in sub.param_groups:
            if "step" in group:
                group["step"] = 0
