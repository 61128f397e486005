"""A program `nvidia-smi` that prints what a test wants, for machines without a GPU."""

from pathlib import Path

HEALTHY = "0, NVIDIA H100 80GB HBM3, 0, No, No\n"


def install_smi(folder: Path, output: str, code: int = 0) -> str:
    """Write `nvidia-smi` into a folder and return the folder, for PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\nexit {code}\n")
    program.chmod(0o755)
    return str(folder)
