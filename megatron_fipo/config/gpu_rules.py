"""Requirements of FP8, low-precision optimizer state and host offload. Pure: facts about packages and GPUs are arguments."""

from packaging.version import InvalidVersion, Version

from megatron_fipo.config.schema import ModelConfig, OptimizerSettings, ParallelConfig
from megatron_fipo.environment import Accelerators, dotted
from megatron_fipo.errors import UserError

INSTALL = "pip install 'megatron-fipo[gpu]'"
FP8_CAPABILITY = (8, 9)
BLOCKWISE_CAPABILITY = (9, 0)
BLOCKWISE_CUDA = "12.9"
AFTER_HOPPER = (10, 0)
BLOCKWISE_AFTER_HOPPER = "2.10"
"""First Transformer Engine release known to run blockwise on later GPUs; releases up to 2.8 refuse it there."""
OLDEST_TRANSFORMER_ENGINE = "2.4"
"""The first release in which every recipe can keep weights in FP8."""
TORCH_ADAM = (
    "training on GPUs needs Adam of Transformer Engine or of NVIDIA's apex, and neither is installed: with torch's, "
    f"Megatron-Core's optimizer has no checkpoints that a run can resume from; {INSTALL}, or build apex"
)
"""Why a run on GPUs without either is refused."""


def fp8_obstacle(recipe: str, machine: Accelerators) -> str | None:
    """Why FP8 with this recipe cannot run on that machine, with the fix; None if it can."""
    if machine.capability is None:
        return "it needs a GPU"
    if machine.transformer_engine is None:
        return f"it needs Transformer Engine ({INSTALL})"
    if _below(machine.transformer_engine, OLDEST_TRANSFORMER_ENGINE):
        return f"Transformer Engine {machine.transformer_engine} is installed and it needs {OLDEST_TRANSFORMER_ENGINE} ({INSTALL})"
    if machine.capability < FP8_CAPABILITY:
        return f"the GPU has compute capability {dotted(machine.capability)} and FP8 needs {dotted(FP8_CAPABILITY)} (Ada, Hopper)"
    if recipe != "blockwise":
        return None
    if machine.capability < BLOCKWISE_CAPABILITY:
        needed = dotted(BLOCKWISE_CAPABILITY)
        return f"the GPU has compute capability {dotted(machine.capability)} and blockwise needs {needed} (Hopper); choose tensorwise"
    if machine.capability >= AFTER_HOPPER and _below(machine.transformer_engine, BLOCKWISE_AFTER_HOPPER):
        return (
            f"Transformer Engine {machine.transformer_engine} is installed and blockwise on a GPU of compute capability "
            f"{dotted(machine.capability)} needs {BLOCKWISE_AFTER_HOPPER} ({INSTALL})"
        )
    if machine.cuda is None or _below(machine.cuda, BLOCKWISE_CUDA):
        return (
            f"torch was built for CUDA {machine.cuda} and blockwise needs {BLOCKWISE_CUDA}; choose tensorwise"
        )
    return None


def check_layers(layer_spec: str, dtype: str) -> None:
    """Refuse Transformer Engine's layers in float32: its attention over packed sequences has no float32 kernel. UserError."""
    if layer_spec == "transformer_engine" and dtype != "bfloat16":
        raise UserError(
            f"layer_spec=transformer_engine needs dtype=bfloat16, not {dtype}; use auto or portable"
        )


def check_precision(model: ModelConfig, optimizer: OptimizerSettings) -> None:
    """Refuse combinations that Megatron-Core does not support correctly on any machine. UserError."""
    if model.fp8 == "none":
        if model.fp8_param_gather:
            raise UserError("model.fp8_param_gather=true needs model.fp8=hybrid or e4m3")
    elif model.layer_spec == "portable":
        raise UserError(
            f"model.fp8={model.fp8} needs Transformer Engine's layers; set model.layer_spec to auto"
        )
    elif model.dtype != "bfloat16":
        raise UserError(f"model.fp8={model.fp8} needs model.dtype=bfloat16, not {model.dtype}")
    elif model.fp8_recipe == "delayed" and model.recompute == "full":
        raise UserError(
            "model.fp8_recipe=delayed with model.recompute=full would recompute layers with the scales of the pass that computes "
            "old log-probs; choose blockwise or tensorwise, or another model.recompute"
        )
    if model.fp8_param_gather and not optimizer.distributed:
        raise UserError(
            "model.fp8_param_gather=true needs optimizer.distributed=true, which keeps the exact master weights"
        )
    if model.fp8_param_gather and model.fp8_recipe == "delayed":
        raise UserError(
            "model.fp8_param_gather=true needs model.fp8_recipe=blockwise or tensorwise: delayed has no scale "
            "yet when the weights are loaded, and would round them to zero"
        )
    if model.fp8_param_gather and optimizer.cpu_offload:
        raise UserError(
            "optimizer.cpu_offload cannot update weights kept in FP8; set it to 0 or model.fp8_param_gather to false"
        )
    for key, wanted, default in _state_settings(optimizer):
        if wanted != default and not (optimizer.distributed and model.dtype == "bfloat16"):
            raise UserError(
                f"optimizer.{key}={wanted} needs optimizer.distributed=true and model.dtype=bfloat16"
            )
    if optimizer.cpu_offload and optimizer.state_dtype != "float32":
        raise UserError(
            f"optimizer.cpu_offload={optimizer.cpu_offload} updates float32 state only; set optimizer.state_dtype=float32 or "
            "optimizer.cpu_offload=0"
        )


def check_accelerators(model: ModelConfig, optimizer: OptimizerSettings, machine: Accelerators) -> None:
    """Refuse settings that this machine's GPUs or packages do not support. UserError."""
    reason = None if model.fp8 == "none" else fp8_obstacle(model.fp8_recipe, machine)
    if reason:
        raise UserError(
            f"model.fp8={model.fp8} with model.fp8_recipe={model.fp8_recipe} cannot run here: {reason}"
        )
    engine = machine.transformer_engine
    if (
        machine.capability is not None
        and engine is not None
        and not _below(engine, OLDEST_TRANSFORMER_ENGINE)
    ):
        return
    for key, wanted, default in _state_settings(optimizer):
        if wanted != default:
            raise UserError(
                f"optimizer.{key}={wanted} needs a GPU and Transformer Engine {OLDEST_TRANSFORMER_ENGINE} or later ({INSTALL}); "
                f"set it to {default}"
            )


def check_adam(machine: Accelerators) -> None:
    """Refuse to train on GPUs if Megatron-Core would fall back to torch's Adam. UserError."""
    if machine.capability is not None and machine.transformer_engine is None and not machine.apex:
        raise UserError(TORCH_ADAM)


def check_fp8_shards(hidden: int, sharded: dict[str, int], parallel: ParallelConfig) -> None:
    """Refuse a model whose matrices FP8 cannot multiply. UserError.

    The hidden size and, on each tensor-parallel rank, the sizes in `sharded` must be multiples of 16.
    """
    tp = parallel.tensor_model_parallel_size
    if hidden % 16:
        raise UserError(
            f"model.fp8 needs multiples of 16, but the model's hidden size is {hidden}; set model.fp8=none"
        )
    for what, size in sharded.items():
        if size % (16 * tp):
            raise UserError(
                f"model.fp8 needs multiples of 16 on each rank, but the model's {what} of {size} is sharded over "
                f"parallel.tensor_model_parallel_size={tp}; lower that or set model.fp8=none"
            )


def check_fp8_experts(width: int, parallel: ParallelConfig) -> None:
    """Refuse experts whose matrices FP8 cannot multiply. UserError."""
    size = parallel.expert_tensor_parallel_size
    if width % (16 * size):
        raise UserError(
            f"model.fp8 needs multiples of 16 on each rank, but the experts' width of {width} is sharded over "
            f"parallel.expert_tensor_parallel_size={size}; lower that or set model.fp8=none"
        )


def _state_settings(optimizer: OptimizerSettings) -> tuple[tuple[str, object, object], ...]:
    """The settings that leave plain float32 state on the GPU: key, value and the value that does not."""
    return ("state_dtype", optimizer.state_dtype, "float32"), ("cpu_offload", optimizer.cpu_offload, 0)


def _below(version: str, least: str) -> bool:
    try:
        return Version(version) < Version(least)
    except InvalidVersion:  # a custom build of unknown age
        return False
