"""Memory of a training step by part and its time, by recomputation mode, beside the planner's prediction for the same case.

python -m tools.bench.gpu_memory
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_fipo.config import ModelConfig, OptimizerSettings
from megatron_fipo.plan.case import Case as PlannedCase
from megatron_fipo.plan.memory.trainer import trainer_memory
from megatron_fipo.plan.time.trainer import update_time
from megatron_fipo.trainer.rank_model import RankModel
from tests.gpu.policies import Shape, new_policy, one_rank
from tools.bench.gpu_models import (
    LONGEST,
    LR,
    MODELS,
    OBJECTIVE,
    PACKS,
    RECOMPUTED,
    TOY,
    TOY_PACKS,
    obstacle,
    packs,
    planned,
)
from tools.bench.gpu_step import time_steps
from tools.bench.harness import Bench, Case, Cases, Timing, release, run_cases
from tools.bench.memory_meter import Meter, new_meter
from tools.bench.report import FIGURE, SKIPPED, Row, aimed, duration, reason

SECTION = "memory"
NAME = "1.5B"
AIM = 0.1
"""Largest difference of predicted and measured memory, as a share of the measured."""
OUTSIDE = ("CUDA and libraries", "fragmentation")
"""Parts of a prediction that are not tensors."""
PARTS = ("weights", "gradients", "optimizer", "packs", "activations", "layer workspace", "head")
"""Parts that are measured, under the planner's names."""


@dataclass(frozen=True)
class Parts:
    """Bytes of one step."""

    by_name: dict[str, int]
    """Of `PARTS`; they add up to the peak."""
    peak: int


def measure_parts(meter: Meter, new: Callable[[], RankModel], shards_of: Callable) -> tuple[Parts, RankModel]:
    """Parts of the second step of a new policy, and the policy. `shards_of(policy)` gives a mini-batch of one micro-batch.

    Weights and gradients are counted, packs and what is left of the state (master weights, moments) are differences between
    phases. In the step the end of the layers' forward pass and the gradient that reaches them separate the rest: what exists at
    the first is activations; the peaks between the two and after them are the head's and the layers'.
    """
    start = meter.now()
    policy = new()
    parameters = [parameter for chunk in policy.modules for parameter in chunk.parameters()]
    weights = storage_bytes(parameters)
    gradients = storage_bytes(parameter.main_grad for parameter in parameters)
    before = meter.now()
    shards = shards_of(policy)
    pack_bytes = meter.now() - before  # the scoring pass for old log-probs has freed its own
    policy.policy_step(shards, OBJECTIVE, LR)  # makes the moments
    state = meter.now() - start
    at: dict[str, int] = {}
    decoder = policy.modules[0].decoder

    def reached(gradient: torch.Tensor) -> None:
        at["head"] = meter.peak()
        meter.restart()

    def ended(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            at["activations"] = meter.now()
            output.register_hook(reached)
            meter.restart()

    handle = decoder.register_forward_hook(ended)
    try:
        policy.policy_step(shards, OBJECTIVE, LR)
    finally:
        handle.remove()
    if set(at) != {"activations", "head"}:
        raise AssertionError("the step did not pass through the layers")
    layers = meter.peak()
    workspace = max(0, layers - at["activations"])
    head = max(0, at["head"] - at["activations"] - workspace)
    by_name = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": state - weights - gradients - pack_bytes,
        "packs": pack_bytes,
        "activations": at["activations"] - start - state,
        "layer workspace": workspace,
        "head": head,
    }
    return Parts(by_name, max(layers, at["head"]) - start), policy


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of their storages, each counted once: parameters and gradients are views of flat buffers."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure_mode(bench: Bench, shape: Shape, model: ModelConfig) -> tuple[Parts, Timing]:
    """Parts and time of a step of a new policy that is gone afterwards."""
    with one_rank(bench, seed=3):
        optimizer = OptimizerSettings(lr=LR)
        with new_meter(bench) as meter:
            parts, policy = measure_parts(
                meter,
                lambda: new_policy(bench, shape, model, RECOMPUTED, optimizer),
                lambda policy: next(packs(bench, policy, shape, model, only=LONGEST))[1],
            )
        _, shards = next(packs(bench, policy, shape, model, only=LONGEST))
        seconds, _ = time_steps(bench, policy, shards)
        del policy, shards
    release(bench)
    return parts, seconds


def mode(recompute: str) -> Case:
    """One recomputation mode."""

    def run(bench: Bench) -> Iterator[Row]:
        # On a CPU in float32, in which the planner's prediction of the portable layers was checked.
        model = ModelConfig(recompute=recompute, dtype=bench.pick("bfloat16", "float32"))
        shape, lengths = bench.pick((MODELS[NAME], PACKS[LONGEST]), (TOY, TOY_PACKS[LONGEST]))
        name = f"{NAME}, {LONGEST}, recompute {recompute}"
        if why := obstacle(bench, shape, model, lengths):
            yield reason(SKIPPED, SECTION, name, why, False)
            return
        case = planned(bench, shape, model, lengths)
        parts, seconds = measure_mode(bench, shape, model)
        yield from rows_of(name, case, parts, seconds)

    return run


def rows_of(name: str, case: PlannedCase, parts: Parts, seconds: Timing) -> Iterator[Row]:
    """The peak, each part and the time, each beside its prediction."""
    expected = {key: part.value for key, part in trainer_memory(case, 0).parts.items() if key not in OUTSIDE}
    total = sum(expected.values())
    ratio = total / parts.peak
    figures: dict[str, float | str] = {"measured_bytes": parts.peak, "predicted_bytes": total, "ratio": ratio}
    result = f"{_size(parts.peak)} measured, {_size(total)} predicted, predicted / measured {ratio:.3f}"
    title = f"peak of {name} (aim: predicted within {100 * AIM:.0f} %)"
    yield Row(SECTION, title, aimed(abs(ratio - 1) <= AIM), result, figures)
    yield Row(
        SECTION,
        f"parts of {name}",
        FIGURE,
        parts_text(parts.by_name, expected),
        part_figures(parts, expected),
    )
    predicted = update_time(case).total
    ratio = predicted.value / seconds.median
    result = f"{duration(seconds.median)} measured, {duration(predicted.value)} predicted, ratio {ratio:.3f}"
    yield Row(
        SECTION,
        f"step of {name} (prediction: rates of {case.machine.name})",
        FIGURE,
        result,
        seconds.figures("step") | {"predicted_step_seconds": predicted.value, "ratio": ratio},
    )


def parts_text(measured: Mapping[str, float], expected: Mapping[str, float]) -> str:
    """Measured / predicted of each part."""
    return "measured / predicted: " + ", ".join(
        f"{name} {_size(measured[name])} / {_size(expected.get(name, 0.0))}" for name in PARTS
    )


def part_figures(parts: Parts, expected: Mapping[str, float]) -> dict[str, float | str]:
    figures: dict[str, float | str] = {
        f"measured_{name.replace(' ', '_')}_bytes": value for name, value in parts.by_name.items()
    }
    return figures | {f"predicted_{name.replace(' ', '_')}_bytes": value for name, value in expected.items()}


def _size(count: float) -> str:
    """GiB, or KiB of a toy."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**24 else f"{count / 2**10:.1f} KiB"


CASES: Cases = {f"recompute {recompute}": mode(recompute) for recompute in ("none", "selective", "full")}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
