"""Which dtype a converted tensor has: the one it is stored in, unless another is asked for.

What cannot be kept (float16, which no model here has; layers of one parameter in different dtypes, which Megatron stacks) is
refused with what a cast would lose, and never rounded in silence.
"""

from collections.abc import Sequence

import torch

from megatron_fipo.checkpoint.convert.torch_dist import stacked_key
from megatron_fipo.checkpoint.safetensors_folder import SafetensorsFolder
from megatron_fipo.errors import UserError
from megatron_fipo.families.family import Weight

KEEP = "keep"
MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
"""What a cast can start from. Quantised formats are not among them."""
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By safetensors' names."""


def dtypes_in_megatron(
    weights: Sequence[Weight], folder: SafetensorsFolder, wanted: str
) -> dict[str, torch.dtype]:
    """By stacked key. Megatron keeps one dtype for all layers of a parameter."""
    dtypes: dict[str, torch.dtype] = {}
    first: dict[str, str] = {}
    for weight in weights:
        key = stacked_key(weight)
        for name in weight.names:
            stored = folder.tensors[name].dtype
            if stored not in STORED:
                raise UserError(
                    f"{name} in {folder.folder} is stored as {stored}; convert it to bfloat16 or float32 first"
                )
            dtype = target_dtype(STORED[stored], wanted, name)
            if dtypes.setdefault(key, dtype) is not dtype:
                raise UserError(
                    f"{name} in {folder.folder} is stored as {name_of(dtype)} and {first[key]} as {name_of(dtypes[key])}, but in Megatron "
                    "they are one tensor; --dtype float32 keeps every bit, --dtype bfloat16 rounds"
                )
            first.setdefault(key, name)
    return dtypes


def target_dtype(stored: torch.dtype, wanted: str, name: str) -> torch.dtype:
    """What a tensor becomes under `--dtype wanted`. UserError where it could not be kept and no cast was asked for."""
    if stored not in MANTISSA_BITS:
        raise UserError(f"{name} is stored as {name_of(stored)}; convert it to bfloat16 or float32 first")
    if wanted != KEEP:
        return getattr(torch, wanted)
    if stored in (torch.bfloat16, torch.float32):
        return stored
    losses = []
    for choice in (torch.float32, torch.bfloat16):
        lost = max(0, MANTISSA_BITS[stored] - MANTISSA_BITS[choice])
        losses.append(
            f"--dtype {name_of(choice)} "
            + (f"drops {lost} of {MANTISSA_BITS[stored]} mantissa bits" if lost else "is exact")
        )
    raise UserError(
        f"{name} is stored as {name_of(stored)}, which models here do not have; {', '.join(losses)}"
    )


def cast(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    """The values in `dtype`, and whether that changed any of them."""
    result = values.to(dtype)
    narrower = MANTISSA_BITS[values.dtype] > MANTISSA_BITS[dtype]
    return result, narrower and not torch.equal(result.to(values.dtype), values)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
