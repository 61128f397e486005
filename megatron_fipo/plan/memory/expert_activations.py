"""Activations of the experts of one layer for one micro-batch on one rank: what takes the place of the feed-forward part.

Notation: h hidden size, f width of an expert on this rank, E experts of the layer, k experts per token; t the rank's tokens of
the residual stream, c the copies of tokens that its experts process (`plan/experts.py`). Autograd keeps:

    per copy    h   input, in the order of the experts
                3f  gate and up, product; 4f on a CPU: the product before the router's weight besides
                12  bytes: its place in the pack (int64) and the router's weight (float32)
    per token   8 · E bytes: the place of each copy is a view of a sorted [t, E] (int64)
                20 · k bytes: chosen experts (int64, twice) and their softmax (float32)

Between micro-batches each layer keeps what its dispatcher was called with: 5 · E + 8 · k bytes per token (scores float32 [t, E],
which are chosen, places). With full recomputation these scores lead to the graph of the layer's backward pass, and so to the
layer's input and its gradient: both stay until the next forward pass of the layer.

The largest moment is at the end of the experts' forward pass, with all of that kept: the copies before and after they were
sent, and the experts' outputs in the order of experts and of ranks.

Counted in Megatron-Core 0.19 with the all-to-all dispatcher and without fused permutation. Compared with all allocations of a
step of the portable layers on 1 to 4 ranks (tests/plan/memory). Not measured: Transformer Engine's experts, and those shared by
tensor ranks.
"""

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.experts import copies_per_token, expert_width, experts_of, load
from megatron_fipo.plan.memory.sizes import Sizes, fp8_scale

PER_COPY, PER_EXPERT, PER_CHOICE = 12, 8, 20
DISPATCHER_PER_EXPERT, DISPATCHER_PER_CHOICE = 5, 8
"""Bytes, as above."""


def expert_bytes(case: Case, sizes: Sizes) -> float:
    """From forward to backward. In FP8 the inputs of products are kept in a byte."""
    experts, width, product = experts_of(case), expert_width(case), fp8_scale(case) or sizes.element
    between = width * sizes.element * (3 if case.machine.on_cpu else 2)
    of_copy = sizes.hidden * product + between + width * product + PER_COPY
    of_token = PER_EXPERT * experts.count + PER_CHOICE * experts.per_token
    return _copies(case, sizes) * of_copy + sizes.residual_tokens * of_token


def expert_workspace(case: Case, sizes: Sizes) -> float:
    """At the largest moment, in addition to what is kept."""
    parallel = case.config.parallel
    gathered = _copies(case, sizes)
    sent = gathered / parallel.expert_tensor_parallel_size
    orders = 2 if parallel.expert_model_parallel_size > 1 else 1  # before and after they are sent
    return (2 * gathered + orders * sent) * sizes.hidden * sizes.element


def dispatcher_bytes(case: Case, sizes: Sizes) -> float:
    """What a layer keeps of its last micro-batch."""
    experts = experts_of(case)
    of_token = DISPATCHER_PER_EXPERT * experts.count + DISPATCHER_PER_CHOICE * experts.per_token
    kept = sizes.residual_tokens * of_token
    return kept + (sizes.hidden_bytes if case.config.model.recompute == "full" else 0.0)


def _copies(case: Case, sizes: Sizes) -> float:
    return sizes.tokens * copies_per_token(case) * load(case)
