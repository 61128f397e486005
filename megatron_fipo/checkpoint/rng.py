"""Saves a rank's random number generators, so that a resumed run continues with the same random numbers.

The states belong to a rank of a parallel layout and are invalid under another layout. Stored as byte tensors
in safetensors, without pickles.
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from megatron_fipo.errors import UserError, writing

TRACKER = "tracker/"
"""Prefix of the names of the states that Megatron keeps for tensor-parallel regions."""


def save_rng(folder: Path, rank: int) -> None:
    """Write `rng/rank_00000.safetensors` below the checkpoint `folder`. No collectives; a few KiB.

    uint8 tensors `cpu`, `cuda` (of the current device, if there is one) and `tracker/<name>`, with the layout
    in the metadata. Requires `parallel.initialize`. UserError if the disk refuses.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {TRACKER + name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}
    path = folder / rng_file(rank)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(save(states, metadata=_layout(torch.distributed.get_world_size())))


def load_rng(folder: Path, rank: int, world_size: int) -> bool:
    """Restore this rank's generators.

    Returns False, with nothing restored, if another layout or device wrote the files.

    No collectives: all ranks of a run get the same result. UserError if a file is missing or damaged.
    """
    # Rank 0 exists in every layout; this rank may not.
    if _read(folder / rng_file(0))[0] != _layout(world_size):
        return False
    _, states = _read(folder / rng_file(rank))
    torch.set_rng_state(states.pop("cpu"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    get_cuda_rng_tracker().set_states({name.removeprefix(TRACKER): state for name, state in states.items()})
    return True


def rng_file(rank: int) -> str:
    """The path of a rank's file, relative to the checkpoint."""
    return f"rng/rank_{rank:05d}.safetensors"


def _layout(world_size: int) -> dict[str, str]:
    return {
        "world_size": str(world_size),
        "tensor_model_parallel_size": str(parallel_state.get_tensor_model_parallel_world_size()),
        "pipeline_model_parallel_size": str(parallel_state.get_pipeline_model_parallel_world_size()),
        "virtual_pipeline_model_parallel_size": str(
            parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
        ),
        "context_parallel_size": str(parallel_state.get_context_parallel_world_size()),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return file.metadata() or {}, states
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the generator states in {path} cannot be read ({error}); use an earlier checkpoint"
        ) from None
