"""What the host does for the loss of a micro-batch: few launches, and kernels that packs of new lengths do not compile again."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from megatron_fipo.objective.loss import policy_loss
from tests.gpu.loss_inputs import FIPO
from tools.bench.gpu_scan import recipe_inputs

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = 20
"""Of torch, with views and new tensors, which launch nothing: each costs the host 1 to 8 µs."""


class Operations(TorchDispatchMode):
    """Counts torch's operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_the_loss_of_a_micro_batch_takes_few_launches(monkeypatch):
    kernels: Counter[str] = Counter()
    run = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        kernels[self.fn.__name__] += 1
        with _disable_current_modes():  # the interpreter computes a kernel with torch
            return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    inputs = recipe_inputs([300, 200, 20])
    log_probs = inputs.log_probs.requires_grad_()
    with Operations() as operations:
        loss = policy_loss(log_probs, inputs.entropy, inputs.rows, FIPO, None, "triton").loss_sum
        (gradient,) = torch.autograd.grad(loss, log_probs)
    assert gradient.abs().sum() > 0
    assert kernels == {"loss_blocks_kernel": 1, "chunk_sums_kernel": 1, "loss_rows_kernel": 1}
    assert operations.counts.total() <= OPERATIONS, operations.counts


def test_packs_of_new_lengths_compile_no_kernel_again():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.variants"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    variants = json.loads(done.stdout)
    assert set(variants) > {"loss_blocks_kernel", "loss_rows_kernel", "statistics_kernel", "gradient_kernel"}
    assert max(variants.values()) == 1, variants
