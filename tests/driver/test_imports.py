"""The driver holds no tensors: it imports neither torch, with which torch.distributed comes, nor Megatron-Core."""

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
import megatron_fipo.driver as driver

names = [module.name for module in pkgutil.walk_packages(driver.__path__, driver.__name__ + ".")]
for name in names:
    importlib.import_module(name)
{extra}
print(len(names), sorted({{"torch", "torch.distributed", "megatron", "megatron.core", "vllm"}} & set(sys.modules)))
"""


def imported(extra: str = "") -> tuple[int, str]:
    """The number of driver modules, and what a fresh interpreter has loaded after importing all of them."""
    program = [sys.executable, "-c", PROGRAM.format(extra=extra)]
    count, _, names = subprocess.run(program, capture_output=True, text=True, check=True).stdout.partition(
        " "
    )
    return int(count), names.strip()


def test_importing_every_driver_module_loads_neither_torch_nor_megatron() -> None:
    count, names = imported()
    assert count > 20
    assert names == "[]"


def test_a_rank_class_would_be_noticed() -> None:
    _, names = imported("from megatron_fipo.trainer.rl_worker import RLWorker")
    assert names == "['megatron', 'megatron.core', 'torch', 'torch.distributed']"
