"""The dtype of a converted tensor: its stored dtype, unless a cast was requested.

Dtypes that cannot be kept are refused with the loss of each possible cast, and never rounded silently. These
are float16, which no supported model has, and different dtypes in the layers or experts of one parameter, which
Megatron stacks.
"""

from collections.abc import Sequence

import torch

from megatron_fipo.checkpoint.convert.stacking import place_of
from megatron_fipo.checkpoint.safetensors_folder import SafetensorsFolder
from megatron_fipo.errors import UserError
from megatron_fipo.families.family import Architecture, Weight

KEEP = "keep"
MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
"""Dtypes that can be cast. Quantized formats are not supported."""
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By name in the safetensors format."""


def dtypes_in_megatron(
    weights: Sequence[Weight], architecture: Architecture, folder: SafetensorsFolder, wanted: str
) -> dict[str, torch.dtype]:
    """The dtype by key of the checkpoint. Megatron has one dtype for all layers and experts of a parameter.

    UserError if one cannot be kept.
    """
    dtypes: dict[str, torch.dtype] = {}
    first: dict[str, str] = {}
    for weight in weights:
        key = place_of(weight, architecture).key
        for name in weight.names:
            dtype = target_dtype(STORED[folder.tensors[name].dtype], wanted, name)
            if dtypes.setdefault(key, dtype) is not dtype:
                raise UserError(
                    f"{name} in {folder.folder} is stored as {name_of(dtype)} and {first[key]} as "
                    f"{name_of(dtypes[key])}, but in Megatron they are one tensor; --dtype float32 keeps "
                    "every bit, --dtype bfloat16 rounds"
                )
            first.setdefault(key, name)
    return dtypes


def target_dtype(stored: torch.dtype, wanted: str, name: str) -> torch.dtype:
    """A tensor's dtype with `--dtype wanted`. UserError if it cannot be kept and no cast was requested."""
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
    raise UserError(f"{name} is stored as {name_of(stored)}, which is not supported; {', '.join(losses)}")


def cast(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    """The values in `dtype`, and whether the cast changed any of them."""
    result = values.to(dtype)
    narrower = MANTISSA_BITS[values.dtype] > MANTISSA_BITS[dtype]
    return result, narrower and not torch.equal(result.to(values.dtype), values)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
