"""What the sections of the GPU check measure, on a CPU where it exists there: memory by part, one model at a time, and errors."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import gc
import math
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_fipo.config import ModelConfig
from megatron_fipo.plan.memory.trainer import trainer_memory
from megatron_fipo.run_dir.metrics_log import Record
from megatron_fipo.trainer.rank_model import StepResult
from tests.gpu.policies import Shape
from tools.bench import gpu_models
from tools.bench.gpu_checkpoint import equal_row
from tools.bench.gpu_fp8 import PRECISIONS, SHAPES
from tools.bench.gpu_lengths import compilations, loss_row, pack_lengths, sequences, time_row
from tools.bench.gpu_memory import OUTSIDE, PARTS, measure_mode, rows_of
from tools.bench.gpu_models import LONGEST, TOY, memory_obstacle, planned, settings, with_policy
from tools.bench.gpu_offload import difference
from tools.bench.gpu_train import ITERATIONS, ON_A_GPU, arguments
from tools.bench.gpu_train import rows_of as train_rows
from tools.bench.harness import Bench
from tools.bench.memory_meter import CpuMeter, new_meter
from tools.bench.report import FAILED, MET, OK, Row

BENCH = Bench(torch.device("cpu"))
SHAPE = Shape(layers=4, hidden=128, ffn=640, heads=8, groups=4, vocabulary=512, tied=True)
LENGTHS = ([64] * 4, [192] * 4)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_measured_parts_are_those_that_the_planner_predicts(recompute, monkeypatch):
    """In float32 on a CPU, where the planner's activations are checked by all allocations of a step."""
    monkeypatch.setitem(gpu_models.TOY_PACKS, LONGEST, LENGTHS)
    model = ModelConfig(dtype="float32", recompute=recompute)
    case = planned(BENCH, SHAPE, model, LENGTHS)
    parts, seconds = measure_mode(BENCH, SHAPE, model)
    assert tuple(parts.by_name) == PARTS
    assert sum(parts.by_name.values()) == parts.peak
    expected = {name: part.value for name, part in trainer_memory(case, 0).parts.items()}
    for name in ("weights", "gradients", "optimizer"):
        assert parts.by_name[name] == pytest.approx(expected[name], rel=0.001)
    assert parts.by_name["packs"] == pytest.approx(expected["packs"], rel=0.3)
    step = ("activations", "layer workspace", "head")
    measured = sum(parts.by_name[name] for name in step)
    assert measured == pytest.approx(sum(expected[name] for name in step), rel=0.02)
    large = max(("activations", "layer workspace"), key=lambda name: expected[name])
    assert parts.by_name[large] == pytest.approx(expected[large], rel=0.1)
    peak, by_part, time = rows_of("a model", case, parts, seconds)
    assert peak.verdict == MET
    ratio = sum(value for name, value in expected.items() if name not in OUTSIDE) / parts.peak
    assert f"predicted / measured {ratio:.3f}" in peak.result
    assert all(name in by_part.result for name in PARTS)
    assert time.figures["predicted_step_seconds"] > 0


def test_recomputation_keeps_fewer_activations(monkeypatch):
    monkeypatch.setitem(gpu_models.TOY_PACKS, LONGEST, LENGTHS)
    kept = [
        measure_mode(BENCH, SHAPE, ModelConfig(dtype="float32", recompute=mode))[0].by_name["activations"]
        for mode in ("none", "selective", "full")
    ]
    assert kept[0] > kept[1] > 2 * kept[2]


def test_the_meter_counts_what_exists_and_the_most():
    with new_meter(BENCH) as meter:
        assert isinstance(meter, CpuMeter)
        before = meter.now()
        kept = torch.zeros(1000)
        meter.restart()
        _ = (kept + 1).sum()
        assert meter.now() - before == pytest.approx(4000, abs=64)
        assert meter.peak() - before >= 8000
        view = kept[10:]
        del kept
        assert meter.now() - before >= 4000
        del view
        assert meter.now() - before <= 64


def test_one_model_is_alive_at_a_time():
    """Also if a reader of the rows stops early, or the rows raise."""
    gone: list[weakref.ref] = []

    def body(policy):
        assert all(each() is None for each in gone)
        gone.append(weakref.ref(policy.modules[0].decoder.layers[0].mlp.linear_fc1.weight))
        yield Row("s", "one", OK, "")
        if len(gone) == 2:
            raise RuntimeError("out of memory")

    for _ in range(3):
        try:
            assert len(list(with_policy(BENCH, TOY, settings(None), body))) == 1
        except RuntimeError:
            assert len(gone) == 2
    gc.collect()
    assert len(gone) == 3
    assert all(each() is None for each in gone)


def test_a_model_that_does_not_fit_is_left_out_with_a_sentence():
    assert memory_obstacle(100e9, None) is None
    assert memory_obstacle(10 * 2**30, 10 * 2**30) is None
    why = memory_obstacle(60.5 * 2**30, 20 * 2**30)
    assert why == "it needs 60.5 GiB by the planner's estimate and 20.0 GiB are free"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_fp8_case_can_be_planned_and_fits_80_gb(name, precision):
    chosen = PRECISIONS[precision]
    model = settings(chosen.recipe, fp8_parameters=chosen.parameters)
    case = planned(BENCH, SHAPES[name], model, gpu_models.PACKS[LONGEST])
    assert 5e9 < trainer_memory(case, 0).total.value < 80e9


def test_twenty_different_lengths_are_packed_exactly():
    for lengths in (pack_lengths(BENCH), [513, 2_049, 8_191]):
        assert len(set(lengths)) == len(lengths)
        for tokens in lengths:
            prompts, responses = sequences(tokens)
            assert sum(prompts) + sum(responses) == tokens
            assert min(prompts + responses) >= 1


def test_compilations_are_counted_by_function():
    from torch._dynamo.utils import get_compilation_metrics

    before = len(get_compilation_metrics())

    @torch.compile(backend="eager", dynamic=False)
    def fused(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    for size in (3, 4, 3, 5):
        fused(torch.zeros(size))
    with torch.compiler.set_stance("force_eager"):
        fused(torch.zeros(6))
    counts, seconds = compilations(before)
    assert counts == Counter({"fused": 3})
    assert seconds > 0


def test_losses_that_differ_fail():
    assert loss_row([1.0, -1.0], [1.01, -1.0]).verdict == OK
    assert loss_row([1.0, -1.0], [1.1, -1.0]).verdict == FAILED
    assert loss_row([1.0, math.nan], [1.0, -1.0]).verdict == FAILED


def test_the_stall_is_what_exceeds_the_median():
    row = time_row("step", [10, 20, 30], [4.0, 1.0, 1.5])
    assert row.figures["stall_seconds"] == 2.5
    assert "longest 4000 ms (10 tokens, number 1), 2500 ms beyond" in row.result


def test_the_difference_of_updates():
    start = [torch.zeros(3), torch.zeros(1)]
    moved = [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([4.0])]
    assert difference(start, moved, moved) == 0
    other = [moved[0] + torch.tensor([0.0, 0.5, 0.0]), moved[1]]
    assert difference(start, moved, other) == pytest.approx(0.1)
    assert math.isnan(difference(start, start, start))


def test_a_resume_with_other_bits_fails():
    step = StepResult(1.0, False, [], lambda: {"policy/loss": 0.5})
    weights = [torch.ones(2), torch.ones(1)]
    assert equal_row((step, weights), (step, [each.clone() for each in weights])).verdict == OK
    moved = equal_row((step, weights), (step, [weights[0], weights[1] + 1e-7]))
    assert moved.verdict == FAILED
    assert "1 of 2 weights differ" in moved.result
    assert equal_row((step, weights), (replace(step, grad_norm=1.1), weights)).verdict == FAILED
    skipped = replace(step, skipped=True)
    assert equal_row((skipped, weights), (skipped, weights)).verdict == FAILED


def records(sigma: float) -> list[Record]:
    times = {"time/total": 3.0, "time/rollout": 2.0, "rollout/prompts": 24.0, "policy/sigma_log_ratio": sigma}
    return [
        Record("evaluation", 0, 0.0, {"evaluation/avg_at_k": 0.25}),
        Record("iteration", 1, 1.0, {**times, "time/total": 9.0, "policy/sigma_log_ratio": 0.0}),
        Record("iteration", 2, 2.0, times),
        Record("iteration", 3, 2.0, times),
        Record("evaluation", 3, 3.0, {"evaluation/avg_at_k": 0.5}),
    ]


def test_rows_of_a_complete_run():
    first, seconds, accuracy = train_rows(records(0.0), per_prompt=16)
    assert (first.verdict, first.correctness) == (OK, True)
    assert "3.0 s per iteration (first 9.0 s), of it 2.0 s of rollout for 384 responses" in seconds.result
    assert "0.250 before, 0.500 after 3 iterations" in accuracy.result
    assert next(iter(train_rows(records(1e-9), per_prompt=16))).verdict == FAILED


def test_the_run_on_one_gpu_shares_it(tmp_path):
    command = arguments(tmp_path, on_gpu=True)
    assert "rollout.placement=colocated" in command
    assert f"iterations={ITERATIONS}" in ON_A_GPU
    assert not set(ON_A_GPU) & set(arguments(tmp_path, on_gpu=False))
