"""Time of the output layer for one micro-batch on one rank of the last pipeline stage (model/logprob_head).

Products over response rows and this rank's slice of the vocabulary: one forward, two backward, and a third for logits that
were not kept. Between them a logit costs `LOGIT_BYTES`, and backward reads and writes the float32 sum of the hidden states'
gradients once per slab. The products are never in FP8.

Ignored: the loss (0.02 % of a step, docs/benchmarks.md), prompts' rows, which are not computed.
"""

import math

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Estimate, total
from megatron_fipo.plan.layout import vocabulary_columns
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT
from megatron_fipo.plan.time.collectives import tensor_group
from megatron_fipo.plan.time.layer import FUSED_RATE, product_seconds
from megatron_fipo.plan.time.packs import Packs

MIB = 2**20
LOGIT_BYTES = (4, 6)
"""Read or written per logit, forward and backward: the float32 logit; the logit and its gradient in the model's dtype."""


def head_time(case: Case, pack: Packs) -> tuple[Estimate, Estimate]:
    """Seconds forward and backward."""
    dtype = case.config.model.dtype
    hidden, columns = case.architecture.hidden_size, vocabulary_columns(case)
    product = product_seconds(case, dtype, pack.rows, hidden, columns)
    logits, element = pack.rows * columns, BYTES_PER_ELEMENT[dtype]
    kept = min(1.0, (case.config.head.logits_memory_mb or 0) * MIB / (logits * element)) if logits else 1.0
    group, memory = tensor_group(case), case.machine.memory
    size = hidden * element * (pack.tokens if case.config.parallel.sequence_parallel else pack.rows)
    forward = total(
        (
            product,
            memory.seconds(logits * LOGIT_BYTES[0] / FUSED_RATE, "memory"),
            group.gather(size) if case.config.parallel.sequence_parallel else group.reduce(16 * pack.rows),
        )
    )
    sums = slabs(case, pack.rows) * pack.rows * hidden * 8
    backward = total(
        (
            product.scaled(3.0 - kept),
            memory.seconds((logits * LOGIT_BYTES[1] + sums) / FUSED_RATE, "memory"),
            group.gather(size) if case.config.parallel.sequence_parallel else group.reduce(size),
        )
    )
    return forward, backward


def slabs(case: Case, rows: float) -> int:
    """Pieces of the vocabulary that are processed one by one: 6 bytes per logit have to fit `head.workspace_mb`."""
    width = case.config.head.workspace_mb * MIB / (max(rows, 1.0) * 6)
    return max(1, math.ceil(vocabulary_columns(case) / max(128.0, width)))
