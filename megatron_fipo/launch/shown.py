"""Which environment variables are logged."""

from collections.abc import Mapping

from megatron_fipo.secrecy import hide_passwords, is_secret

SHOWN = (
    "SLURM_", "SBATCH_", "NCCL_", "GLOO_", "UCX_", "FI_", "CUDA_", "NVIDIA_", "NVTE_", "TORCH_", "PYTORCH_", "RAY_", "VLLM_",
    "OMP_", "MKL_", "HF_", "TOKENIZERS_", "WANDB_", "MEGATRON_FIPO_", "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
    "CONDA_PREFIX", "TMPDIR", "CONTAINER", "MOUNTS", "VENV", "INTERFACE",
)  # fmt: skip
"""Beginnings of the names of variables that decide how a run works. Others are not logged."""


def shown(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to log, sorted, without secrets and without passwords in URLs."""
    return {
        name: "(hidden)" if is_secret(name) else hide_passwords(value)
        for name, value in sorted(environment.items())
        if name.startswith(SHOWN)
    }
