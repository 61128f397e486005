"""Time of one layer for one micro-batch on one rank, forward and backward, by part.

Counted:
- products: 2 · tokens · k · n operations each at the rate of `Products`, three times as many with backward; at least the
  time of their bytes (a weight gradient is read and written in float32),
- attention: 4 · heads · head size operations per visible pair forward, 8 backward,
- elementwise: bytes of norms, residuals, rotations and activation function,
- FP8: the casts of every product's input and of its output's gradient,
- tensor-parallel collectives, all visible: with sequence parallelism two all-gathers and two reduce-scatters in each
  direction (the further gather for weight gradients runs beside a product), else two all-reduces,
- context parallelism: keys and values in a ring beside attention; visible is what a step takes longer than its attention,
- experts: an all-to-all before and after, and the copies that order tokens by expert,
- host: what starting the kernels takes longer than running them.

Ignored: tails of products with few tokens, sequences that differ within a pack, imbalance between experts, the router.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_fipo.errors import UserError
from megatron_fipo.families.family import Layout
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import NOTHING, Estimate, latest, total
from megatron_fipo.plan.layout import is_expert
from megatron_fipo.plan.machine import Products
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT
from megatron_fipo.plan.time.collectives import context_group, expert_group, tensor_group
from megatron_fipo.plan.time.overlap import exposed
from megatron_fipo.plan.time.packs import Packs
from megatron_fipo.plan.time.weights import layer_matrices

FUSED_RATE = 0.67
"""Share of a copy's rate that kernels between the products reach: SwiGLU of the 1.5B model on an H200 takes 29 ms, the bytes
of its 8 passes 19 ms at the rate of a copy (docs/benchmarks.md, "One H200"). Adam with gradient scaling: the same."""
HIDDEN_PASSES = (18, 27)
"""Times that a layer reads or writes a tensor of hidden width between products, forward and backward: norms, residuals and
their gradients. With `ATTENTION_PASSES` what remains in that profile; about twice what perfect fusion needs."""
ATTENTION_PASSES = (8, 10)
"""The same over query, key and value: bias, reordering, rotation."""
ACTIVATION_PASSES = (3, 5)
"""SwiGLU over the feed-forward width: reads gate and up, writes one; backward reads three, writes two."""
EXPERT_PASSES = (8, 8)
"""Copies of the tokens of experts, to and from the order of experts, before and after each all-to-all."""
CAST_BYTES = 4
"""Of an FP8 cast per element: read in bfloat16, written plain and transposed."""
FP8_HOST = 3.4
"""Host time of a layer in FP8 over that in bfloat16: quantizers and casts are further launches. From one step of the 0.5B
model on 4 sequences of 5,120 tokens, which the host bounds (the same page)."""
EXPERT_HOST = 7.0
"""Host time of a layer with experts over that of a dense one: router, permutations, a wait for the counts of tokens, two
exchanges, products expert by expert. From the training time of Qwen3-30B-A3B in NeMo-RL v0.3 (50 s on 64 H100, which nothing
but the host explains: 19 ms per layer and micro-batch)."""
GRADIENT_ACCESS = 8
"""Bytes per weight and micro-batch: its float32 gradient is read and written."""

Parts = Mapping[str, Estimate]


@dataclass(frozen=True)
class Product:
    """A weight of a layer on one rank: [tokens, k] × [k, n]."""

    k: int
    n: int
    expert: bool = False


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a layer and micro-batch by part."""

    forward: Parts
    backward: Parts


def layer_time(case: Case, pack: Packs) -> LayerTime:
    """Of any layer; all are equal. UserError for a precision that the machine has no figures for."""
    return LayerTime(_direction(case, pack, 0), _direction(case, pack, 1))


def core_attention(case: Case, pack: Packs) -> Estimate:
    """Forward, as selective recomputation repeats it."""
    return _attention(case, pack, 0)


def products_of(case: Case, precision: str) -> Products:
    try:
        return case.machine.products[precision]
    except KeyError:
        raise UserError(
            f"machine {case.machine.name} has no figures for products in {precision}, only for "
            f"{', '.join(case.machine.products)}: choose model.dtype and model.fp8 accordingly, or another machine"
        ) from None


def layer_precision(case: Case) -> str:
    """The name in `Machine.products`; delayed scaling multiplies as tensorwise scaling does."""
    model = case.config.model
    if model.fp8 == "none":
        return model.dtype
    return "fp8_blockwise" if model.fp8_recipe == "blockwise" else "fp8_tensorwise"


def layer_products(case: Case) -> list[Product]:
    """The matrices of a layer on one rank; of one expert if there are several, which no tensor ranks share."""
    tp, found = case.config.parallel.tensor_model_parallel_size, []
    for weight in layer_matrices(case.family, case.architecture):
        n, k = sum(shape[0] for shape in weight.shapes), weight.shapes[0][1]
        expert = is_expert(weight, case.experts)
        ways, by_row = 1 if expert else tp, weight.layout is Layout.ROW
        found.append(Product(k // ways if by_row else k, n if by_row else n // ways, expert))
    return found


def product_seconds(
    case: Case, precision: str, tokens: float, k: float, n: float, stored: float = 0.0
) -> Estimate:
    """Seconds of [tokens, k] × [k, n]. `stored`: bytes of the weight's side that are read or written."""
    figures, element = products_of(case, precision), BYTES_PER_ELEMENT[case.config.model.dtype]
    side = min(k, n)
    compute = figures.rate.seconds(
        2 * tokens * k * n * (side + figures.half) / side, f"products in {precision}"
    )
    return latest(compute, case.machine.memory.seconds(stored + element * tokens * (k + n), "memory"))


def _direction(case: Case, pack: Packs, way: int) -> dict[str, Estimate]:
    """Forward (0) or backward (1)."""
    attention = _attention(case, pack, way)
    parts = {
        "products": _products(case, pack, way),
        "attention": attention,
        "elementwise": _elementwise(case, pack, way),
        "tensor parallel": _tensor(case, pack),
        "context parallel": _context(case, pack, attention, way),
        "experts": _experts(case, pack),
    }
    launches = 0.5 if case.config.model.fp8 == "none" else 0.5 * FP8_HOST
    if case.experts.count > 1:
        launches *= EXPERT_HOST
    host = case.machine.layer_host.times(launches, "layer_host")
    return {**parts, "host": exposed(host, total(parts.values()))}


def _products(case: Case, pack: Packs, way: int) -> Estimate:
    precision, element = layer_precision(case), BYTES_PER_ELEMENT[case.config.model.dtype]
    experts, tp = case.experts, case.config.parallel.tensor_model_parallel_size
    times = []
    for product in layer_products(case):
        copies = experts.count / (tp * experts.parallel_size) if product.expert else 1
        tokens = pack.tokens * experts.per_token / tp if product.expert else pack.tokens
        weights = copies * product.k * product.n
        seconds = product_seconds(case, precision, tokens, product.k, product.n, element * weights)
        gradient = product_seconds(case, precision, tokens, product.k, product.n, GRADIENT_ACCESS * weights)
        times += [seconds, gradient] if way else [seconds]
    return total(times)


def _attention(case: Case, pack: Packs, way: int) -> Estimate:
    machine, tp = case.machine, case.config.parallel.tensor_model_parallel_size
    operations = 4 * case.architecture.size("query") / tp * pack.pairs
    if way:
        return machine.attention_backward.seconds(2 * operations, "attention_backward")
    return machine.attention_forward.seconds(operations, "attention_forward")


def _elementwise(case: Case, pack: Packs, way: int) -> Estimate:
    parallel, architecture, element = (
        case.config.parallel,
        case.architecture,
        BYTES_PER_ELEMENT[case.config.model.dtype],
    )
    tp = parallel.tensor_model_parallel_size
    hidden, width = architecture.hidden_size, architecture.size("query") + 2 * architecture.size("key")
    elements = (
        HIDDEN_PASSES[way] * hidden / (tp if parallel.sequence_parallel else 1)
        + ATTENTION_PASSES[way] * width / tp
        + ACTIVATION_PASSES[way] * architecture.ffn_hidden_size * case.experts.per_token / tp
    )
    if case.experts.count > 1:
        elements += EXPERT_PASSES[way] * hidden * case.experts.per_token / tp
    size = pack.tokens * (elements * element + _cast_bytes(case, way))
    return case.machine.memory.seconds(size / FUSED_RATE, "memory")


def _cast_bytes(case: Case, way: int) -> float:
    """Per token: inputs of the products forward, gradients of their outputs backward."""
    if case.config.model.fp8 == "none":
        return 0.0
    experts, tp = case.experts.per_token, case.config.parallel.tensor_model_parallel_size
    return CAST_BYTES * sum(
        (product.n if way else product.k) * (experts / tp if product.expert else 1)
        for product in layer_products(case)
    )


def _tensor(case: Case, pack: Packs) -> Estimate:
    size = pack.tokens * case.architecture.hidden_size * BYTES_PER_ELEMENT[case.config.model.dtype]
    group = tensor_group(case)
    blocks = 2 if case.experts.count == 1 else 1
    return group.gather(size).scaled(2.0 * blocks)


def _context(case: Case, pack: Packs, attention: Estimate, way: int) -> Estimate:
    """Each of cp - 1 steps passes on a rank's keys and values, and backward their gradients too."""
    parallel, group = case.config.parallel, context_group(case)
    if group.size == 1:
        return NOTHING
    width = 2 * case.architecture.size("key") / parallel.tensor_model_parallel_size
    size = pack.tokens * width * BYTES_PER_ELEMENT[case.config.model.dtype] * (2 if way else 1)
    return exposed(group.send(size), attention.scaled(1 / group.size)).scaled(group.size - 1)


def _experts(case: Case, pack: Packs) -> Estimate:
    experts, tp = case.experts, case.config.parallel.tensor_model_parallel_size
    if experts.count == 1:
        return NOTHING
    tokens = pack.tokens / tp * experts.per_token
    size = tokens * case.architecture.hidden_size * BYTES_PER_ELEMENT[case.config.model.dtype]
    return expert_group(case).exchange(size).scaled(2.0)
