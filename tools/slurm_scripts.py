"""Write slurm/*.sbatch: the scripts of `megatron-fipo launch` with default settings.

python -m tools.slurm_scripts
"""

from pathlib import Path
from typing import get_args

from megatron_fipo.launch.script import Command, Job, render
from megatron_fipo.launch.settings import LaunchSettings

FOLDER = Path(__file__).parents[1] / "slurm"


def scripts() -> dict[str, str]:
    """Content by file name."""
    return {f"{command}.sbatch": render(Job(command), LaunchSettings()) for command in get_args(Command)}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in scripts().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
