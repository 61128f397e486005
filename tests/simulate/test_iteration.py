"""Iterations against what can be computed on paper, in each mode."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from megatron_fipo.engine.protocol import GenerationRequest
from megatron_fipo.errors import UserError
from megatron_fipo.simulate.iteration import SCORE, SYNC, UPDATE, Iteration, Simulation
from megatron_fipo.simulate.responses import Responses
from tests.simulate.scenarios import affine, responses, scenario, times

MODES: dict[str, dict[str, Any]] = {
    "synchronous drop": {},
    "synchronous continue": {"unfinished": "continue", "max_staleness": 3},
    "one step off, drop": {"mode": "one_step_off"},
    "one step off, continue": {"mode": "one_step_off", "unfinished": "continue", "max_staleness": 2},
    "fully asynchronous": {"mode": "fully_asynchronous", "unfinished": "continue", "max_staleness": 2},
}
SLOW = times(
    decode_step=affine(0.02, 0.001, 1e-6),
    prefill=lambda tokens: 1e-4 * tokens,
    score=lambda length: 0.5,
    update=lambda length: 0.02 * length,
    sync=0.3,
    cache_tokens=3000,
)


def simulated(count: int, *arguments: Any, **settings: Any) -> list[Iteration]:
    simulation = Simulation(scenario(*arguments, **settings))
    return [simulation.iterate() for _ in range(count)]


class Watched(Responses):
    """Remembers the lengths that were asked for."""

    seen: ClassVar[list[int]] = []

    def length(self, request: GenerationRequest) -> int:
        self.seen.append(super().length(request))
        return self.seen[-1]


def test_without_contention_an_iteration_is_its_longest_response_and_the_update():
    of = times(decode_step=affine(0.5, 0, 0), score=lambda n: 3.0, update=lambda n: n, sync=2.0)
    lengths = Watched(**vars(responses(informative=1.0)))
    iteration = simulated(1, of, lengths, num_engines=64, prompts_in_flight=8)[0]
    assert [phase.name for phase in iteration.phases] == [SCORE, UPDATE, SYNC]
    longest = 0.5 * max(lengths.seen)
    assert iteration.phases[0].start - iteration.start == longest
    assert iteration.seconds == pytest.approx(longest + 3.0 + iteration.mean_length + 2.0)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_gives_the_same_run(mode):
    first, second = (simulated(4, SLOW, **MODES[mode]) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("mode", MODES)
def test_every_sampled_token_is_received_and_then_used_or_dropped_or_kept(mode):
    carried = received = sampled = 0.0
    for iteration in simulated(6, **MODES[mode]):
        received += iteration.received_tokens
        sampled += iteration.usage.sequence_s  # a step takes a second
        counts = iteration.counts
        assert counts.generated_tokens + carried == (
            counts.used_tokens + counts.filtered_tokens + counts.dropped_tokens + counts.carried_tokens
        )
        carried = counts.carried_tokens
        assert counts.used_tokens == iteration.response_tokens
    assert received == pytest.approx(sampled)


@pytest.mark.parametrize("mode", MODES)
def test_no_response_is_older_than_allowed(mode):
    settings = {"max_staleness": 1} | MODES[mode]
    oldest = [iteration.staleness["staleness/max"] for iteration in simulated(8, SLOW, **settings)]
    assert max(oldest) <= settings["max_staleness"]
    if mode == "synchronous drop":
        assert max(oldest) == 0
    if mode == "one step off, drop":
        assert set(oldest[1:]) == {1}


def test_continue_trains_on_long_responses_that_take_several_versions():
    settings: dict[str, Any] = {"unfinished": "continue", "max_staleness": 4, "prompts_in_flight": 12}
    lengths = responses(response_spread=1.2, median=60.0)
    done = simulated(12, None, lengths, **settings)
    assert any(iteration.staleness["staleness/tokens_older"] > 0 for iteration in done)
    assert sum(iteration.counts.dropped_tokens for iteration in done) == 0
    trained = sum(iteration.response_tokens for iteration in done) / sum(i.responses for i in done)
    typical = lengths.typical(4000)
    assert trained == pytest.approx(sum(typical) / len(typical), rel=0.15)


def test_staleness_1_drops_long_responses():
    settings: dict[str, Any] = {"unfinished": "continue", "prompts_in_flight": 24}
    lengths = responses(response_spread=1.2, median=60.0)
    strict, patient = (
        simulated(12, None, lengths, max_staleness=staleness, **settings) for staleness in (1, 4)
    )
    assert sum(iteration.counts.stale for iteration in strict) > 0

    def mean(done: list[Iteration]) -> float:
        return sum(iteration.mean_length for iteration in done) / len(done)

    assert mean(strict) < mean(patient)


def test_one_step_off_hides_the_update_or_the_rollout():
    slow_update = times(score=lambda n: 10.0, update=lambda n: 5000.0, sync=5.0)
    done = simulated(3, slow_update, mode="one_step_off")
    assert [iteration.seconds for iteration in done[1:]] == pytest.approx([5015.0] * 2)
    synchronous = simulated(3, times(update=lambda n: 30.0))
    hidden = simulated(3, times(update=lambda n: 30.0), mode="one_step_off")
    # During the second iteration the groups of the third are sampled.
    assert hidden[1].seconds == pytest.approx(synchronous[2].seconds - 30.0)


def test_fully_asynchronous_engines_work_but_for_the_push():
    slow_trainer = replace(SLOW, update=lambda length: 3.0, sync=1.0)
    settings: dict[str, Any] = MODES["fully asynchronous"] | {"num_engines": 1}
    iteration = simulated(4, slow_trainer, **settings)[-1]
    assert iteration.usage.busy_s == pytest.approx(iteration.seconds - 1.0, abs=0.1)


def test_colocated_engines_sleep_and_wake():
    apart = simulated(2, times(update=lambda n: 50.0))
    together = simulated(
        2, times(update=lambda n: 50.0, sleep=4.0, wake=3.0), placement="colocated", engine="vllm"
    )
    for separate, colocated in zip(apart, together, strict=True):
        assert colocated.seconds == pytest.approx(separate.seconds + 7.0)


def test_a_short_batch_takes_proportionally_less():
    lengths = responses(informative=0.4)
    done = simulated(3, times(update=lambda n: 800.0), lengths, max_prompts=16, prompts_in_flight=16)
    groups = [iteration.responses // 4 for iteration in done]
    assert any(0 < count < 8 for count in groups)
    assert [iteration.phase_seconds(UPDATE) for iteration in done] == pytest.approx(
        [100.0 * n for n in groups]
    )


def test_a_lost_engine_delays_the_iteration_and_changes_no_batch():
    clean = simulated(2, replace(SLOW, engine_restart=5.0))
    middle = (clean[0].start + clean[0].phases[0].start) / 2
    simulation = Simulation(scenario(replace(SLOW, engine_restart=5.0)), [(middle, 1)])
    failing = [simulation.iterate() for _ in range(2)]
    assert failing[0].usage.failures == 1
    assert failing[0].end > clean[0].end
    assert [one.mean_length for one in failing] == [one.mean_length for one in clean]
    assert failing[0].usage.lost_tokens > 0


def test_an_evaluation_takes_its_longest_response():
    simulation = Simulation(scenario(num_engines=64))
    seconds = simulation.evaluate([2] * 5)
    assert math.isclose(seconds, round(seconds))
    assert 80 < seconds <= 400


def test_the_reason_for_a_stop_is_raised():
    simulation = Simulation(scenario(None, responses(informative=1e-9), max_prompts=32))
    with pytest.raises(UserError, match="none of 32 prompts got both right and wrong answers"):
        simulation.iterate()
