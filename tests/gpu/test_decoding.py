"""The local engine's decoding on the device: CUDA graphs against launched steps, and both against a growing cache."""

from collections.abc import Callable

import pytest
import torch

from megatron_fipo.engine.decoding.dynamic import DynamicDecoder
from megatron_fipo.engine.decoding.graphs import Graphs, Launches, Runner
from megatron_fipo.engine.decoding.rows import Counts, Decoder, Row
from megatron_fipo.engine.decoding.static import StaticDecoder
from megatron_fipo.engine.protocol import SamplingParams
from tests.gpu.compare import require
from tests.gpu.policies import Shape
from tools.bench.harness import Bench
from tools.bench.local_engine import append, new_model, new_rows

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Of a log-prob between kernels with other orders of summation."""
MOST_DIFFERENT = 0.1
"""Share of responses in which rounding may move a uniform number over a boundary; after that they differ."""
SAMPLINGS = {
    "plain": SamplingParams(1.0, 1.0, 0),
    "truncated": SamplingParams(0.7, 0.9, 0, top_k=50),
    "greedy": SamplingParams(0.0, 1.0, 0),
}


def _shape(bench: Bench) -> Shape:
    return bench.pick(Shape(6, 512, 1_024, 8, 2, 8_003, tied=True), Shape(2, 32, 48, 4, 2, 301, tied=True))


def _decode(bench: Bench, decoder: Decoder, sampling: SamplingParams) -> list[Row]:
    rows = new_rows(_shape(bench), *bench.pick((12, 8, 100, 200), (3, 4, 12, 20)))
    decoder.decode(rows, sampling, append)
    return rows


def _runner(bench: Bench) -> Runner:
    return Graphs() if bench.on_gpu else Launches()


def _compare(found: list[Row], expected: list[Row]) -> dict[str, float]:
    """Log-probs up to the first different token, and the share of responses that have one."""
    largest, different = 0.0, 0
    for got, wanted in zip(found, expected, strict=True):
        pairs = list(zip(got.tokens, wanted.tokens, strict=True))
        same = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
        different += same < len(pairs)
        for a, b in zip(got.log_probs[:same], wanted.log_probs[:same], strict=True):
            largest = max(largest, abs(a - b))
    return {"log-prob": largest, "different": different / len(found)}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_graphs_decode_as_launched_steps(
    bench: Bench, record_errors: Callable, sampling: str, dtype: torch.dtype
) -> None:
    """Also in a second call, and after weights were changed in place."""
    model = new_model(_shape(bench), bench.device, dtype)
    graphs = StaticDecoder(model, Counts(), lambda: False, _runner(bench))
    launches = StaticDecoder(model, Counts(), lambda: False, Launches())
    graphs.rehearse()
    first = _decode(bench, graphs, SAMPLINGS[sampling])
    errors = _compare(first, _decode(bench, launches, SAMPLINGS[sampling]))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    again = _decode(bench, graphs, SAMPLINGS[sampling])
    require(
        any(a.log_probs != b.log_probs for a, b in zip(first, again, strict=True)), "graphs use old weights"
    )
    later = _compare(again, _decode(bench, launches, SAMPLINGS[sampling]))
    worst = {kind: max(error, later[kind]) for kind, error in errors.items()}
    record_errors(worst, {"log-prob": TOLERANCES[dtype], "different": MOST_DIFFERENT})


def test_graphs_decode_as_a_growing_cache(bench: Bench, record_errors: Callable) -> None:
    model = new_model(_shape(bench), bench.device, torch.float32)
    expected = _decode(bench, DynamicDecoder(model, Counts(), lambda: False), SAMPLINGS["plain"])
    graphs = StaticDecoder(model, Counts(), lambda: False, _runner(bench))
    errors = _compare(_decode(bench, graphs, SAMPLINGS["plain"]), expected)
    record_errors(errors, {"log-prob": TOLERANCES[torch.float32], "different": MOST_DIFFERENT})


def test_sleep_frees_the_device_memory(bench: Bench) -> None:
    model = new_model(_shape(bench), bench.device)
    graphs = StaticDecoder(model, Counts(), lambda: False, _runner(bench))
    expected = _decode(bench, graphs, SAMPLINGS["plain"])
    held = torch.cuda.memory_reserved() if bench.on_gpu else 1
    graphs.release()
    require(not bench.on_gpu or torch.cuda.memory_reserved() < held, "nothing was freed")
    again = _decode(bench, graphs, SAMPLINGS["plain"])
    require([row.tokens for row in again] == [row.tokens for row in expected], "other tokens after a release")
