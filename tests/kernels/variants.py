"""Prints how often each Triton kernel would be compiled over 50 packs, as JSON: python -m tests.kernels.variants

Needs real kernels, so a process without TRITON_INTERPRET. Launches are recorded and not carried out.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from megatron_fipo.config import HeadConfig
from megatron_fipo.objective.loss import policy_loss
from tests.gpu.head_inputs import random_head_inputs, run_head
from tests.gpu.loss_inputs import FIPO
from tools.bench.gpu_scan import recipe_inputs
from tools.bench.harness import Bench
from tools.compile_kernels import recorded_launches

PACKS = 50


def packs() -> Iterator[tuple[str, Callable[[], object]]]:
    """A training step's head and loss on packs of 1 to 40 sequences: all lengths differ, and so does what they divide by."""
    generator = random.Random(0)
    for pack in range(PACKS):
        lengths = [generator.randint(1, 300) for _ in range(1 + pack * 40 // PACKS)]
        yield "loss", lambda lengths=lengths: run_loss(lengths)
        yield "head", lambda pack=pack: head(pack)


def run_loss(lengths: list[int]) -> None:
    """As the trainer calls it: log-probs and entropies are halves of one tensor [2, R]."""
    inputs = recipe_inputs(lengths)
    output = torch.stack((inputs.log_probs, inputs.entropy)).requires_grad_()
    log_probs, entropy = output.unbind()
    policy_loss(log_probs, entropy, inputs.rows, FIPO, None, "triton").loss_sum.backward()


def head(pack: int) -> None:
    inputs = random_head_inputs(
        Bench(torch.device("cpu")), HeadConfig(kernels="triton"), torch.bfloat16, False, pack
    )
    request = inputs.request
    rows = 1 + pack * (len(request.labels) - 1) // PACKS
    request = replace(
        request, row_index=request.row_index[:rows].clone(), labels=request.labels[:rows].clone()
    )
    run_head(
        replace(
            inputs,
            request=request,
            grad_log_probs=inputs.grad_log_probs[:rows],
            grad_entropy=inputs.grad_entropy[:rows],
        )
    )


if __name__ == "__main__":
    print(json.dumps(Counter(launch.kernel.__name__ for launch in recorded_launches(packs()))))
