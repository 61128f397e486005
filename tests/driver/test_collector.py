"""Dynamic sampling with scripted outcomes and random timing: which groups are used or kept.

Dropped ones: test_collector_losses.py.
"""

import copy
import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.driver.rollout.collect_counts import CollectCounts
from megatron_fipo.driver.rollout.collector import SCORES_WAIT_S
from megatron_fipo.driver.rollout.prompt_group import request_seed
from megatron_fipo.driver.scoring.pool import ScoreResult
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir.loop_state import RolloutState
from tests.driver.collecting import N, make, responses, run, serials, train, until_enough
from tests.driver.toy_pool import OUTCOMES, ToyPool, complete_response
from tests.generations import plain

MODES = ("synchronous", "one_step_off", "fully_asynchronous")

outcome_lists = st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=5).map(
    lambda outcomes: [*outcomes, "mixed"]
)
orders = st.integers(0, 10**6)
timing_varies = settings(deadline=None, max_examples=60)


def finished_groups(counts: CollectCounts) -> int:
    return counts.informative + counts.all_right + counts.all_wrong + counts.failed + counts.unscored


# -- unfinished=drop -----------------------------------------------------------------------------------------


@timing_varies
@given(outcome_lists, orders, st.integers(1, 40), st.integers(1, 20), st.integers(1, 6))
def test_drop_uses_the_smallest_prefix_whatever_the_timing(outcomes, order, slots, prompts_in_flight, target):
    pool = ToyPool(outcomes, order, slots)
    collector = make(pool, target, prompts_in_flight=prompts_in_flight)
    informative = (serial for serial in itertools.count() if outcomes[serial % len(outcomes)] == "mixed")
    started = 0
    for version in range(3):
        pool.version = version
        collector.resume(version)
        until_enough(collector)
        collector.pause()
        counts = collector.pop_batch().counts
        wanted = list(itertools.islice(informative, target))
        assert counts.prompts == wanted[-1] + 1 - started
        started = wanted[-1] + 1
        assert counts.prompts == finished_groups(counts)
        assert (counts.waiting, counts.unfinished, counts.carried_tokens, counts.stale) == (0, 0, 0, 0)
    names = [int(requests[0].request_id.partition("-")[0]) for requests in pool.submitted]
    assert {*range(started)} <= {*names} <= {*range(started + prompts_in_flight)}
    if prompts_in_flight <= target:
        assert names == [*range(started)], "no prompt is wasted"
    assert all(len(requests) == N for requests in pool.submitted)


@timing_varies
@given(
    outcome_lists,
    orders,
    orders,
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from(["synchronous", "one_step_off"]),
)
def test_drop_gives_the_same_groups_whatever_the_timing(
    outcomes, first, second, slots, prompts_in_flight, mode
):
    one = run(ToyPool(outcomes, first), mode=mode)
    other = run(
        ToyPool(outcomes, second, slots), mode=mode, timing=second, prompts_in_flight=prompts_in_flight
    )
    assert responses(one) == responses(other)
    assert all(serials(collected) == sorted(serials(collected)) for collected in one)


def test_drop_forgets_half_done_responses_at_a_pause_but_no_prompt():
    pool = ToyPool(["mixed", "wrong"], slots=2)
    collector = make(pool, target=4)
    collector.resume(0)
    collector.step(0.0)
    collector.pause()
    collector.resume(1)
    pool.version = 1
    until_enough(collector)
    result = collector.pop_batch()
    assert serials(result) == [0, 2, 4, 6]
    assert all(span.version == 1 for group in result.groups for t in group for span in t.spans)
    assert result.counts.dropped_tokens > 0
    assert all(not len(request.prefix) for requests in pool.submitted for request in requests)


def test_an_interrupted_iteration_leaves_no_trace_after_load_state():
    calm = run(ToyPool(OUTCOMES), iterations=2)
    pool = ToyPool(OUTCOMES)
    collector = make(pool)
    first = next(train(collector, pool, "synchronous", range(1), random.Random(0)))
    before = collector.state()
    collector.resume(1)
    collector.step(0.0)
    collector.pause()
    collector.load_state(before)
    pool.version = 1
    collector.resume(1)
    until_enough(collector)
    second = collector.pop_batch()
    assert responses([first, second]) == responses(calm)
    assert second.counts.prompts == calm[1].counts.prompts


# -- unfinished=continue -------------------------------------------------------------------------------------


@timing_varies
@given(outcome_lists, orders, st.sampled_from(MODES), st.integers(1, 30), st.integers(1, 8))
def test_continue_loses_nothing(outcomes, order, mode, slots, prompts_in_flight):
    pool = ToyPool(outcomes, order, slots)
    collector = make(
        pool, unfinished="continue", mode=mode, max_staleness=100, prompts_in_flight=prompts_in_flight
    )
    runs = list(train(collector, pool, mode, range(4), random.Random(order)))
    taken = [serial for collected in runs for serial in serials(collected)]
    state = collector.state()
    kept = [group["serial"] for group in state.values["groups"]]
    informative = {
        serial for serial in range(state.values["serial"]) if outcomes[serial % len(outcomes)] == "mixed"
    }
    assert len(taken) == len(set(taken))
    assert set(taken) <= informative <= {*taken, *kept}
    assert all(collected.counts.stale == 0 for collected in runs)
    for version, collected in enumerate(runs):
        for group in collected.groups:
            for index, trajectory in enumerate(group):
                check_complete(trajectory, index, version)


def check_complete(trajectory: Trajectory, index: int, version: int) -> None:
    """The same tokens as in one uninterrupted call, with spans that name their weight versions."""
    request_id = f"{trajectory.group_id}/{index}"
    tokens, log_probs = complete_response(request_id, request_seed(1, request_id), "mixed")
    assert trajectory.response_ids.tolist() == tokens
    assert trajectory.rollout_log_probs.tolist() == np.float32(log_probs).tolist()
    spans = trajectory.spans
    assert (spans[0].start, spans[-1].end) == (0, len(tokens))
    assert all(
        left.end == right.start and left.version < right.version for left, right in itertools.pairwise(spans)
    )
    assert all(span.start < span.end for span in spans)
    assert spans[-1].version <= version


def test_continue_goes_on_where_responses_stopped():
    pool = ToyPool(["mixed"], slots=12)
    runs = run(pool, unfinished="continue", prompts_in_flight=12, max_staleness=5)
    assert any(len(request.prefix) for requests in pool.submitted for request in requests)
    assert any(
        len(trajectory.spans) > 1 for collected in runs for group in collected.groups for trajectory in group
    )
    assert any(collected.counts.from_earlier for collected in runs)


@pytest.mark.parametrize("mode", MODES)
def test_prompts_in_flight_are_kept_until_there_is_enough(mode):
    pool = ToyPool(["mixed"], slots=1)
    collector = make(pool, target=3, unfinished="continue", mode=mode, max_staleness=2, prompts_in_flight=5)
    collector.resume(0)
    while not collector.enough:
        assert collector.unfinished == 5
        collector.step(0.0)
    for _ in range(100):
        collector.step(0.0)
    # The number of buffered groups is bounded by max_staleness; in the other modes only started groups
    # finish.
    most = 5 + (3 * 2 if mode == "fully_asynchronous" else 3)
    assert most - 5 <= collector.waiting < most
    assert (pool.most_groups, collector.unfinished) == (5, 0)


# -- all modes -----------------------------------------------------------------------------------------------


@timing_varies
@given(
    outcome_lists,
    orders,
    st.sampled_from(MODES),
    st.sampled_from(["drop", "continue"]),
    st.integers(0, 3),
    st.integers(1, 12),
)
def test_no_group_is_older_than_allowed_and_tokens_add_up(
    outcomes, order, mode, unfinished, max_staleness, prompts_in_flight
):
    if mode != "synchronous":
        max_staleness += 1
    pool = ToyPool(outcomes, order, slots=10)
    options = {
        "mode": mode,
        "unfinished": unfinished,
        "max_staleness": max_staleness,
        "prompts_in_flight": prompts_in_flight,
    }
    carried = in_work = 0
    for version, collected in enumerate(run(pool, timing=order, **options)):
        counts = collected.counts
        assert len(collected.groups) == 3
        assert all(
            0 <= version - t.oldest_version <= max_staleness for group in collected.groups for t in group
        )
        assert counts.used_tokens == sum(t.response_length for group in collected.groups for t in group)
        ends = counts.used_tokens + counts.filtered_tokens + counts.dropped_tokens + counts.carried_tokens
        assert counts.generated_tokens + carried == ends
        carried = counts.carried_tokens
        finished = finished_groups(counts)
        if unfinished == "drop":
            assert finished == counts.prompts
        else:
            assert finished <= in_work + counts.prompts - counts.unfinished <= finished + counts.stale
        in_work = counts.unfinished
        assert (
            pool.most_groups <= prompts_in_flight or "failed" in outcomes
        )  # the other responses of a failed group keep running


@timing_varies
@given(outcome_lists, orders, st.integers(1, 3), st.sampled_from(["drop", "continue"]))
def test_one_step_off_has_its_groups_before_the_next_weights(outcomes, order, max_staleness, unfinished):
    """Enough groups before a push are enough after it: the trainer never waits for the engines."""
    pool = ToyPool(outcomes, order)
    collector = make(
        pool, mode="one_step_off", unfinished=unfinished, max_staleness=max_staleness, prompts_in_flight=9
    )
    for version, _ in enumerate(train(collector, pool, "one_step_off", range(4), random.Random(order))):
        state, rng = collector.state(), copy.deepcopy(pool._rng)
        pool.version = version + 1
        collector.resume(version + 1)
        assert collector.enough
        collector.pause()
        collector.load_state(state)
        pool._rng = rng


@timing_varies
@given(
    outcome_lists,
    orders,
    st.sampled_from(MODES),
    st.sampled_from(["drop", "continue"]),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_a_restored_collector_goes_on_as_the_original(outcomes, order, mode, unfinished, saved_after, steps):
    """Saved between iterations or, with `steps`, during one."""
    options = {"mode": mode, "unfinished": unfinished, "max_staleness": 2, "prompts_in_flight": 6}
    pool = ToyPool(outcomes, order)
    collector = make(pool, **options)
    timing = random.Random(order)
    before = [
        collected
        for _, collected in zip(
            range(saved_after), train(collector, pool, mode, range(6), timing), strict=False
        )
    ]
    assert len(before) == saved_after
    if steps:
        pool.version = saved_after
        collector.resume(saved_after)
        for _ in range(steps):
            collector.step(0.0)
        collector.pause()
    state = collector.state()
    saved = RolloutState(json.loads(json.dumps(state.values)), state.tokens)
    other_pool, other_timing = copy.deepcopy(pool), copy.deepcopy(timing)
    other = make(other_pool, **options)
    other.load_state(saved)
    assert other_pool.scorers.submitted == pool.scorers.submitted, "nothing is scored again"
    assert plain(other.state()) == plain(collector.state()) == plain(saved)
    rest = range(saved_after, saved_after + 3)
    original = list(train(collector, pool, mode, rest, timing))
    restored = list(train(other, other_pool, mode, rest, other_timing))
    assert plain(original) == plain(restored)
    assert plain(collector.state()) == plain(other.state())


@pytest.mark.parametrize("unfinished", ["drop", "continue"])
def test_waiting_groups_of_a_checkpoint_without_scores_are_scored_when_it_is_loaded(unfinished):
    pool = ToyPool(["mixed", "wrong"], slots=30)
    collector = make(pool, mode="one_step_off", unfinished=unfinished, max_staleness=2, prompts_in_flight=9)
    next(train(collector, pool, "one_step_off", range(1), random.Random(2)))
    state = collector.state()
    waiting = [group["serial"] for group in state.values["groups"] if group["scores"] is not None]
    assert waiting
    old = copy.deepcopy(state)
    for group in old.values["groups"]:
        del group["scores"]
    other_pool = ToyPool(["mixed", "wrong"], slots=30)
    other = make(other_pool, mode="one_step_off", unfinished=unfinished, max_staleness=2, prompts_in_flight=9)
    other.load_state(old)
    assert other_pool.scorers.submitted == waiting
    assert plain(other.state()) == plain(state)
    other_pool.scorers.outcomes = ["unscored"]
    other.load_state(old)
    assert (other.waiting, other.counts.unscored) == (0, state.values["counts"]["unscored"] + len(waiting))
    dropped = other.state().values["informative_dropped"]
    assert dropped == state.values["informative_dropped"] + len(waiting)


@timing_varies
@given(outcome_lists, orders, st.sampled_from(MODES), st.integers(1, 12))
def test_a_run_that_scorers_stop_keeps_what_was_scored(outcomes, order, mode, steps):
    pool = ToyPool(outcomes, order)
    collector = make(pool, unfinished="continue", mode=mode, max_staleness=2, prompts_in_flight=9)
    collector.resume(0)
    for _ in range(steps):
        collector.step(0.0)
    waiting = collector.waiting
    pool.scorers.error = UserError("too many failures")
    with pytest.raises(UserError, match="too many"):
        collector.step(0.0)
    collector.pause()
    assert pool.scorers.outstanding == 0
    assert collector.waiting >= waiting
    groups = collector.state().values["groups"]
    for group in groups:
        finished = all(response["finish_reason"] for response in group["responses"])
        assert finished == (group["scores"] is not None)
    assert collector.counts.prompts == len(groups) + finished_groups(collector.counts) - collector.waiting


def test_a_step_waits_for_engines_or_briefly_for_scores():
    pool = ToyPool(["mixed"])
    collector = make(pool)
    collector.resume(0)
    pool.scorers.silent = True
    while not pool.scorers.outstanding:
        collector.step(5.0)
    assert set(pool.waited) == {5.0}
    assert pool.scorers.waited[:-1] == [0.0] * (len(pool.waited) - 1)
    collector.step(5.0)
    assert (pool.waited[-1], pool.scorers.waited[-1]) == (0.0, SCORES_WAIT_S)


def test_sampling_ahead_begins_at_once():
    pool = ToyPool(["mixed"])
    collector = make(pool, mode="one_step_off")
    collector.resume(0)
    until_enough(collector)
    collector.pop_batch()
    collector.step(0.0)
    assert collector.counts.generated_tokens > 0


# -- rollout.filter_by ---------------------------------------------------------------------------------------


class Graded(ToyPool):
    """All responses are right. Those of every second prompt differ in reward."""

    def __init__(self) -> None:
        super().__init__(["right"])
        inner = self.scorers.poll

        def poll(timeout_s: float) -> list[ScoreResult]:
            return [self.graded(result) for result in inner(timeout_s)]

        self.scorers.poll = poll  # type: ignore[method-assign]

    @staticmethod
    def graded(result: ScoreResult) -> ScoreResult:
        assert result.scores is not None
        step = 0.1 * (result.request.key % 2)
        return replace(
            result,
            scores=[replace(score, reward=index * step) for index, score in enumerate(result.scores)],
        )


def test_groups_are_filtered_by_reward_if_that_is_set():
    pool = Graded()
    collector = make(pool, target=3, filter_by="reward")
    collector.resume(0)
    until_enough(collector)
    collector.pause()
    collected = collector.pop_batch()
    assert serials(collected) == [1, 3, 5]
    assert [t.reward for t in collected.groups[0]] == pytest.approx([0.0, 0.1, 0.2])
    assert collected.counts.all_right == 3
    assert collected.counts.all_wrong == 0


def test_equal_accuracies_are_filtered_by_default_whatever_the_rewards_are():
    collector = make(Graded(), target=1, max_prompts=6)
    collector.resume(0)
    until_enough(collector)
    with pytest.raises(UserError, match=r"none of 6 prompts got both right and wrong answers \(6 all right"):
        collector.pop_batch()
