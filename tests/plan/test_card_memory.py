"""Memory of the GPUs at hand: what certainly does not fit is refused, what may not fit is reported."""

from dataclasses import replace

import pytest

from megatron_fipo.config.card_rules import Finding
from megatron_fipo.environment import Card
from megatron_fipo.plan.card_memory import STATIC, machine_of, memory_findings
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.fit import fullest_stage
from megatron_fipo.plan.machine_file import load_machine
from megatron_fipo.plan.memory.engine import engine_memory
from tests.plan.cases import recipe_case

GIB = 2**30
COLOCATED = ("rollout.placement=colocated", "rollout.engine_tensor_parallel_size=1", "rollout.num_engines=1")


def on_card(gib: float, *overrides: str) -> tuple[Case, tuple[Card, ...]]:
    cards = (Card("a card", (9, 0), round(gib * GIB)),)
    return recipe_case("qwen2.5-7b-math", *overrides, machine=machine_of(cards)), cards


def findings(gib: float, *overrides: str) -> list[Finding]:
    return memory_findings(*on_card(gib, *overrides))


def needs(*overrides: str) -> tuple[float, float]:
    """Static part and peak of the fullest stage, in GiB."""
    case, _ = on_card(80, *overrides)
    _, memory = fullest_stage(case)
    static = sum(part.value for name, part in memory.parts.items() if name in STATIC)
    return static / GIB, memory.total.value / GIB


def test_a_machine_of_known_and_of_unknown_cards():
    known = Card("NVIDIA H200", (9, 0), 140 * GIB)
    assert machine_of([known, known]) == load_machine("h200")
    small, large = Card("A", (8, 9), 24 * GIB), Card("B", (8, 9), 48 * GIB)
    machine = machine_of([large, small])
    assert (machine.device, machine.device_bytes) == ("A", 24 * GIB)
    assert "h100-80gb with the memory of A" in machine.name


def test_what_fits_has_no_findings():
    _, peak = needs()
    assert findings(peak + 1) == []


def test_a_static_part_that_does_not_fit_is_refused_with_its_parts():
    static, _ = needs()
    (finding,) = findings(static - 0.2)
    assert finding.fatal
    assert finding.sentence.startswith(
        f"a trainer rank needs {static:,.1f} GiB before it computes anything ("
    )
    assert all(part in finding.sentence for part in ("weights", "gradients", "optimizer"))
    assert f"a card has {static - 0.2:,.1f} GiB; use a larger GPU" in finding.sentence
    assert all(not finding.fatal for finding in findings(static + 0.2))


def test_a_peak_that_may_not_fit_is_reported():
    static, peak = needs()
    (finding,) = findings((static + peak) / 2)
    assert not finding.fatal
    assert "may run out of memory" in finding.sentence
    assert f"it needs about {peak:,.1f} GiB at its peak" in finding.sentence


@pytest.mark.parametrize("engine", ["local", "vllm"])
def test_the_weights_of_an_engine_on_the_same_gpu_count(engine):
    settings = (*COLOCATED, f"rollout.engine={engine}", "rollout.gpu_memory_share=0.05")
    case, _ = on_card(80, *settings)
    static, engines = needs(*settings)[0], engine_memory(case).weights / GIB
    assert engines > 1
    (finding,) = findings(static + engines - 0.2, *settings)
    assert finding.fatal
    assert "engine's weights" in finding.sentence
    assert not any(finding.fatal for finding in findings(static + engines + 0.2, *settings))
    assert not any(finding.fatal for finding in findings(static + engines - 0.2))


def test_a_share_of_vllm_that_is_not_free_is_reported():
    settings = (*COLOCATED, "rollout.engine=vllm", "rollout.gpu_memory_share=0.85")
    sentences = [finding.sentence for finding in findings(80, *settings) if not finding.fatal]
    assert any(sentence.startswith("rollout.gpu_memory_share=0.85 is not free") for sentence in sentences)
    local = (*COLOCATED, "rollout.engine=local", "rollout.gpu_memory_share=0.85")
    assert not any("gpu_memory_share" in finding.sentence for finding in findings(80, *local))


def test_the_smallest_card_decides():
    case, (card,) = on_card(80)
    static, _ = needs()
    small = replace(card, name="small", memory_bytes=round((static - 1) * GIB))
    (finding,) = memory_findings(case, (card, small))
    assert finding.fatal
    assert "small has" in finding.sentence
