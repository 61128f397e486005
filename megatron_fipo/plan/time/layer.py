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
- experts, in the place of the feed-forward part: an all-to-all before and after, and with tensor parallelism of experts a gather
  and a reduce-scatter; the copies that order tokens by expert; the router's product and choice. All ranks wait for the one
  that gets most tokens (`plan/experts.py`). A product of many experts at once counts as one product of all their tokens,
- host: what starting the kernels takes longer than running them.

Ignored: tails of products with few tokens, sequences that differ within a pack, the top-k that a replay of routes repeats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_fipo.errors import UserError
from megatron_fipo.families.family import Layers, Layout, Weight
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import NOTHING, Estimate, latest, total
from megatron_fipo.plan.experts import copies_per_token, expert_width, experts_of, load, usual_kind
from megatron_fipo.plan.machine import Products
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT
from megatron_fipo.plan.time.collectives import (
    context_group,
    expert_group,
    expert_tensor_group,
    tensor_group,
)
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
ROUTER_BYTES = (74, 30)
"""Read or written per token and expert for the choice: float32 logits and scores, masks, and the sort that finds the tokens of
each expert, counted in Megatron-Core's router and permutation, which are not fused."""
EXPERT_HOST = 7.0
"""Host time of a layer with experts over that of a dense one: router, permutations, a wait for the counts of tokens, two
exchanges, products expert by expert. From the training time of Qwen3-30B-A3B in NeMo-RL v0.3 (50 s on 64 H100, which nothing
but the host explains: 19 ms per layer and micro-batch)."""
GRADIENT_ACCESS = 8
"""Bytes per weight and micro-batch: its float32 gradient is read and written."""

Parts = Mapping[str, Estimate]


@dataclass(frozen=True)
class Product:
    """A weight of a layer on one rank: [tokens, k] × [k, n]. Of experts, that of one."""

    k: int
    n: int
    tokens: float = 1.0
    """Rows for each token of the micro-batch: of all experts together."""
    count: float = 1.0
    """Such weights on the rank."""
    is_router: bool = False


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a layer and micro-batch by part."""

    forward: Parts
    backward: Parts


def layer_time(case: Case, pack: Packs, kind: Layers | None = None) -> LayerTime:
    """Of any layer of this kind, by default with experts if the model has some; all such layers are equal.

    UserError for a precision that the machine has no figures for.
    """
    kind = kind or usual_kind(case.architecture)
    return LayerTime(_direction(case, pack, kind, 0), _direction(case, pack, kind, 1))


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


def layer_products(case: Case, kind: Layers | None = None) -> list[Product]:
    """The matrices of a layer on one rank; the kind as in `layer_time`."""
    parallel, kind = case.config.parallel, kind or usual_kind(case.architecture)
    return [
        _product(case, weight, parallel.tensor_model_parallel_size)
        if weight.expert is None
        else _expert_product(case, weight)
        for weight in layer_matrices(case.family, case.architecture, kind)
    ]


def _product(case: Case, weight: Weight, tp: int) -> Product:
    n, k = sum(shape[0] for shape in weight.shapes), weight.shapes[0][1]
    if weight.layout is Layout.REPLICATED:
        return Product(k, n, tokens=1 / _residual_shards(case), is_router=True)
    by_row = weight.layout is Layout.ROW
    return Product(k // tp if by_row else k, n if by_row else n // tp)


def _expert_product(case: Case, weight: Weight) -> Product:
    parallel = case.config.parallel
    one = _product(case, weight, parallel.expert_tensor_parallel_size)
    held = experts_of(case).count / parallel.expert_model_parallel_size
    return replace(one, tokens=copies_per_token(case) * load(case), count=held)


def _residual_shards(case: Case) -> int:
    parallel = case.config.parallel
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1


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


def _direction(case: Case, pack: Packs, kind: Layers, way: int) -> dict[str, Estimate]:
    """Forward (0) or backward (1)."""
    attention = _attention(case, pack, way)
    parts = {
        "products": _products(case, pack, kind, way),
        "attention": attention,
        "elementwise": _elementwise(case, pack, kind, way),
        "tensor parallel": _tensor(case, pack, kind),
        "context parallel": _context(case, pack, attention, way),
        "experts": _experts(case, pack, kind),
    }
    launches = 0.5 if case.config.model.fp8 == "none" else 0.5 * FP8_HOST
    if kind is Layers.EXPERTS:
        launches *= EXPERT_HOST
    host = case.machine.layer_host.times(launches, "layer_host")
    return {**parts, "host": exposed(host, total(parts.values()))}


def _products(case: Case, pack: Packs, kind: Layers, way: int) -> Estimate:
    model, times = case.config.model, []
    for product in layer_products(case, kind):
        # Routers are never multiplied in FP8.
        precision = model.dtype if product.is_router else layer_precision(case)
        tokens, weights = pack.tokens * product.tokens, product.count * product.k * product.n
        read = BYTES_PER_ELEMENT[model.dtype] * weights
        seconds = product_seconds(case, precision, tokens, product.k, product.n, read)
        gradient = product_seconds(case, precision, tokens, product.k, product.n, GRADIENT_ACCESS * weights)
        times += [seconds, gradient] if way else [seconds]
    found = total(times)
    if kind is Layers.EXPERTS:
        found = replace(found, not_calibrated=found.not_calibrated | {"products of experts"})
    return found


def _attention(case: Case, pack: Packs, way: int) -> Estimate:
    machine, tp = case.machine, case.config.parallel.tensor_model_parallel_size
    operations = 4 * case.architecture.size("query") / tp * pack.pairs
    if way:
        return machine.attention_backward.seconds(2 * operations, "attention_backward")
    return machine.attention_forward.seconds(operations, "attention_forward")


def _elementwise(case: Case, pack: Packs, kind: Layers, way: int) -> Estimate:
    architecture, element = case.architecture, BYTES_PER_ELEMENT[case.config.model.dtype]
    tp = case.config.parallel.tensor_model_parallel_size
    hidden, width = architecture.hidden_size, architecture.size("query") + 2 * architecture.size("key")
    elements = HIDDEN_PASSES[way] * hidden / _residual_shards(case) + ATTENTION_PASSES[way] * width / tp
    other = _cast_bytes(case, kind, way)
    if kind is Layers.EXPERTS:
        of_copy = ACTIVATION_PASSES[way] * expert_width(case) + EXPERT_PASSES[way] * hidden
        elements += of_copy * copies_per_token(case) * load(case)
        other += ROUTER_BYTES[way] * experts_of(case).count / _residual_shards(case)
    else:
        elements += ACTIVATION_PASSES[way] * architecture.ffn_hidden_size / tp
    size = pack.tokens * (elements * element + other)
    return case.machine.memory.seconds(size / FUSED_RATE, "memory")


def _cast_bytes(case: Case, kind: Layers, way: int) -> float:
    """Per token: inputs of the products forward, gradients of their outputs backward."""
    if case.config.model.fp8 == "none":
        return 0.0
    return CAST_BYTES * sum(
        (product.n if way else product.k) * product.tokens
        for product in layer_products(case, kind)
        if not product.is_router
    )


def _tensor(case: Case, pack: Packs, kind: Layers) -> Estimate:
    """Around attention, and around the feed-forward part."""
    size = pack.tokens * case.architecture.hidden_size * BYTES_PER_ELEMENT[case.config.model.dtype]
    blocks = 1 if kind is Layers.EXPERTS else 2
    return tensor_group(case).gather(size).scaled(2.0 * blocks)


def _context(case: Case, pack: Packs, attention: Estimate, way: int) -> Estimate:
    """Each of cp - 1 steps passes on a rank's keys and values, and backward their gradients too."""
    parallel, group = case.config.parallel, context_group(case)
    if group.size == 1:
        return NOTHING
    width = 2 * case.architecture.size("key") / parallel.tensor_model_parallel_size
    size = pack.tokens * width * BYTES_PER_ELEMENT[case.config.model.dtype] * (2 if way else 1)
    return exposed(group.send(size), attention.scaled(1 / group.size)).scaled(group.size - 1)


def _experts(case: Case, pack: Packs, kind: Layers) -> Estimate:
    """Copies are sent to the ranks of their experts and back; the ranks that share an expert gather them in between."""
    if kind is not Layers.EXPERTS:
        return NOTHING
    of_copy = case.architecture.hidden_size * BYTES_PER_ELEMENT[case.config.model.dtype]
    gathered = pack.tokens * copies_per_token(case) * load(case) * of_copy
    shared = expert_tensor_group(case)
    found = expert_group(case).exchange(gathered / shared.size).scaled(2.0)
    if shared.size > 1:
        found += shared.gather(gathered).scaled(2.0)
        found = replace(found, not_calibrated=found.not_calibrated | {"experts on several tensor ranks"})
    return found
