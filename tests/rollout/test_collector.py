"""Dynamic sampling over scripted outcomes and random timing: what is used, what is kept, what is dropped, what is counted."""

import copy
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.config import RolloutConfig
from megatron_fipo.errors import UserError
from megatron_fipo.rollout.collector import Collected, Collector
from megatron_fipo.rollout.groups import request_seed
from tests.rollout.toy_pool import FAILING_PLACE, MAX_LENGTH, OUTCOMES, SCORE_GROUP, ToyPool, dataset, whole_response

N = 3
MODES = ("synchronous", "one_step_off", "fully_asynchronous")

outcome_lists = st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=5).map(lambda outcomes: [*outcomes, "mixed"])
orders = st.integers(0, 10**6)
timing_varies = settings(deadline=None, max_examples=60)


def make(pool: ToyPool, target: int = 3, **options: Any) -> Collector:
    config = RolloutConfig(**{"prompts_in_flight": 4, "max_response_length": MAX_LENGTH, **options})
    return Collector(dataset(), pool, SCORE_GROUP, config, target_groups=target, responses_per_prompt=N, seed=1)


def until_enough(collector: Collector) -> None:
    while not collector.enough:
        collector.step(0.0)


def train(collector: Collector, pool: ToyPool, mode: str, versions: Sequence[int], timing: random.Random) -> Iterator[Collected]:
    """What the training loop does in each mode, with interruptions in between; yields while the collector is paused."""
    for version in versions:
        pool.version = version
        collector.resume(version)
        while not collector.enough:
            collector.step(0.0)
            if timing.random() < 0.1:  # as for an evaluation
                collector.pause()
                collector.resume(version)
        if mode == "synchronous":
            collector.pause()
        collected = collector.take()
        if mode != "synchronous":
            for _ in range(timing.randrange(6)):
                collector.step(0.0)
        if mode == "one_step_off":
            until_enough(collector)
        collector.pause()
        assert pool.outstanding == 0
        yield collected


def run(pool: ToyPool, iterations: int = 4, timing: int = 0, **options: Any) -> list[Collected]:
    mode = options.get("mode", "synchronous")
    return list(train(make(pool, **options), pool, mode, range(iterations), random.Random(timing)))


def serials(collected: Collected) -> list[int]:
    return [int(group[0].group_id.partition("-")[0]) for group in collected.groups]


def responses(runs: Sequence[Collected]) -> list[list[tuple[str, list[int]]]]:
    return [[(t.group_id, t.response_ids) for group in collected.groups for t in group] for collected in runs]


# -- unfinished=drop -----------------------------------------------------------------------------------------------------


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
        counts = collector.take().counts
        wanted = list(itertools.islice(informative, target))
        assert counts.prompts == wanted[-1] + 1 - started
        started = wanted[-1] + 1
        assert counts.prompts == counts.informative + counts.all_right + counts.all_wrong + counts.failed
        assert (counts.waiting, counts.unfinished, counts.carried_tokens, counts.stale) == (0, 0, 0, 0)
    names = [int(requests[0].request_id.partition("-")[0]) for requests in pool.submitted]
    assert {*range(started)} <= {*names} <= {*range(started + prompts_in_flight)}
    if prompts_in_flight <= target:
        assert names == [*range(started)], "nothing is sampled in vain"
    assert all(len(requests) == N for requests in pool.submitted)


@timing_varies
@given(outcome_lists, orders, orders, st.integers(1, 40), st.integers(1, 20), st.sampled_from(["synchronous", "one_step_off"]))
def test_drop_gives_the_same_groups_whatever_the_timing(outcomes, first, second, slots, prompts_in_flight, mode):
    one = run(ToyPool(outcomes, first), mode=mode)
    other = run(ToyPool(outcomes, second, slots), mode=mode, timing=second, prompts_in_flight=prompts_in_flight)
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
    result = collector.take()
    assert serials(result) == [0, 2, 4, 6]
    assert all(span.version == 1 for group in result.groups for t in group for span in t.spans)
    assert result.counts.dropped_tokens > 0
    assert all(not request.prefix for requests in pool.submitted for request in requests)


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
    second = collector.take()
    assert responses([first, second]) == responses(calm)
    assert second.counts.prompts == calm[1].counts.prompts


# -- unfinished=continue -------------------------------------------------------------------------------------------------


@timing_varies
@given(outcome_lists, orders, st.sampled_from(MODES), st.integers(1, 30), st.integers(1, 8))
def test_continue_loses_nothing(outcomes, order, mode, slots, prompts_in_flight):
    pool = ToyPool(outcomes, order, slots)
    collector = make(pool, unfinished="continue", mode=mode, max_staleness=100, prompts_in_flight=prompts_in_flight)
    runs = list(train(collector, pool, mode, range(4), random.Random(order)))
    taken = [serial for collected in runs for serial in serials(collected)]
    state = collector.state()
    held = [group["serial"] for group in state["groups"]]
    informative = {serial for serial in range(state["serial"]) if outcomes[serial % len(outcomes)] == "mixed"}
    assert len(taken) == len(set(taken))
    assert set(taken) <= informative <= {*taken, *held}
    assert all(collected.counts.stale == 0 for collected in runs)
    for version, collected in enumerate(runs):
        for group in collected.groups:
            for place, trajectory in enumerate(group):
                check_whole(trajectory, place, version)


def check_whole(trajectory: Trajectory, place: int, version: int) -> None:
    """Sampled token by token as in one go, and its spans say by what."""
    request_id = f"{trajectory.group_id}/{place}"
    tokens, log_probs = whole_response(request_id, request_seed(1, request_id), "mixed")
    assert (trajectory.response_ids, trajectory.rollout_log_probs) == (tokens, log_probs)
    spans = trajectory.spans
    assert (spans[0].start, spans[-1].end) == (0, len(tokens))
    assert all(left.end == right.start and left.version < right.version for left, right in itertools.pairwise(spans))
    assert all(span.start < span.end for span in spans)
    assert spans[-1].version <= version


def test_continue_goes_on_where_responses_stopped():
    pool = ToyPool(["mixed"], slots=12)
    runs = run(pool, unfinished="continue", prompts_in_flight=12, max_staleness=5)
    assert any(request.prefix for requests in pool.submitted for request in requests)
    assert any(len(trajectory.spans) > 1 for collected in runs for group in collected.groups for trajectory in group)
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
    # Ahead of the trainer: as much as max_staleness allows; else only what was in work.
    most = 5 + (3 * 2 if mode == "fully_asynchronous" else 3)
    assert most - 5 <= collector.waiting < most
    assert (pool.most_groups, collector.unfinished) == (5, 0)


# -- all modes -----------------------------------------------------------------------------------------------------------


@timing_varies
@given(
    outcome_lists, orders, st.sampled_from(MODES), st.sampled_from(["drop", "continue"]), st.integers(0, 3), st.integers(1, 12)
)
def test_no_group_is_older_than_allowed_and_tokens_add_up(outcomes, order, mode, unfinished, max_staleness, prompts_in_flight):
    if mode != "synchronous":
        max_staleness += 1
    pool = ToyPool(outcomes, order, slots=10)
    options = {"mode": mode, "unfinished": unfinished, "max_staleness": max_staleness, "prompts_in_flight": prompts_in_flight}
    carried = in_work = 0
    for version, collected in enumerate(run(pool, timing=order, **options)):
        counts = collected.counts
        assert len(collected.groups) == 3
        assert all(0 <= version - t.oldest_version <= max_staleness for group in collected.groups for t in group)
        assert counts.used_tokens == sum(t.response_length for group in collected.groups for t in group)
        ends = counts.used_tokens + counts.filtered_tokens + counts.dropped_tokens + counts.carried_tokens
        assert counts.generated_tokens + carried == ends
        carried = counts.carried_tokens
        judged = counts.informative + counts.all_right + counts.all_wrong + counts.failed
        if unfinished == "drop":
            assert judged == counts.prompts
        else:
            assert judged <= in_work + counts.prompts - counts.unfinished <= judged + counts.stale
        in_work = counts.unfinished
        assert pool.most_groups <= prompts_in_flight or "failed" in outcomes  # whose other responses run on


@timing_varies
@given(outcome_lists, orders, st.integers(1, 3), st.sampled_from(["drop", "continue"]))
def test_one_step_off_has_its_groups_before_the_next_weights(outcomes, order, max_staleness, unfinished):
    """What was enough before a push is enough behind it, so that the trainer never waits for engines that hold new weights."""
    pool = ToyPool(outcomes, order)
    collector = make(pool, mode="one_step_off", unfinished=unfinished, max_staleness=max_staleness, prompts_in_flight=9)
    for version, _ in enumerate(train(collector, pool, "one_step_off", range(4), random.Random(order))):
        state, rng = collector.state(), copy.deepcopy(pool._rng)
        pool.version = version + 1
        collector.resume(version + 1)
        assert collector.enough
        collector.pause()
        collector.load_state(state)
        pool._rng = rng


@timing_varies
@given(outcome_lists, orders, st.sampled_from(MODES), st.sampled_from(["drop", "continue"]), st.integers(1, 3), st.integers(0, 5))
def test_a_restored_collector_goes_on_as_the_original(outcomes, order, mode, unfinished, saved_after, steps):
    """Saved between iterations or, with `steps`, within one."""
    options = {"mode": mode, "unfinished": unfinished, "max_staleness": 2, "prompts_in_flight": 6}
    pool = ToyPool(outcomes, order)
    collector = make(pool, **options)
    timing = random.Random(order)
    before = [collected for _, collected in zip(range(saved_after), train(collector, pool, mode, range(6), timing), strict=False)]
    assert len(before) == saved_after
    if steps:
        pool.version = saved_after
        collector.resume(saved_after)
        for _ in range(steps):
            collector.step(0.0)
        collector.pause()
    saved = json.loads(json.dumps(collector.state()))
    other_pool, other_timing = copy.deepcopy(pool), copy.deepcopy(timing)
    other = make(other_pool, **options)
    other.load_state(saved)
    assert other.state() == collector.state() == saved
    rest = range(saved_after, saved_after + 3)
    original = list(train(collector, pool, mode, rest, timing))
    restored = list(train(other, other_pool, mode, rest, other_timing))
    assert original == restored
    assert collector.state() == other.state()


def holding_back_the_first(mode: str) -> tuple[Collector, ToyPool]:
    """Iteration 0 is taken; group 0 has tokens of version 0 and is not finished."""
    pool = ToyPool(["mixed"], slots=100)
    pool.held_back = {0}
    collector = make(pool, target=2, mode=mode, unfinished="continue", max_staleness=1, prompts_in_flight=3)
    collector.resume(0)
    until_enough(collector)
    assert 0 not in serials(collector.take())
    if mode == "one_step_off":
        until_enough(collector)
    collector.pause()
    pool.version = 1
    first = collector.state()["groups"][0]
    assert first["serial"] == 0
    assert any(response["spans"] for response in first["responses"])
    assert any(response["finish_reason"] is None for response in first["responses"])
    return collector, pool


def test_what_only_the_iteration_after_the_next_could_use_too_late_is_not_sent_again():
    collector, pool = holding_back_the_first("one_step_off")
    collector.resume(1)
    counts = collector.take().counts
    assert counts.stale > 0
    assert counts.unused_share == 0  # none of them was known to be informative
    sent_for = [requests[0].request_id.partition("-")[0] for requests in pool.submitted]
    assert sent_for.count("0") == 1


def test_a_group_that_finishes_too_late_does_not_wait():
    collector, pool = holding_back_the_first("fully_asynchronous")
    collector.resume(1)
    until_enough(collector)
    assert 0 not in serials(collector.take())
    pool.held_back = set()
    while collector.counts.stale == 0:
        collector.step(0.0)
    collector.pause()
    assert 0 not in [group["serial"] for group in collector.state()["groups"]]


def test_what_new_weights_make_too_old_is_dropped_before_anything_is_sent():
    pool = ToyPool(["mixed"], slots=100)
    collector = make(pool, unfinished="continue", max_staleness=2)
    collector.resume(0)
    while not collector.waiting:
        collector.step(0.0)
    collector.pause()
    begun = sum(any(response["spans"] for response in group["responses"]) for group in collector.state()["groups"])
    pool.submitted.clear()
    collector.resume(3)
    assert (collector.counts.stale, collector.waiting) == (begun, 0)
    assert not any(request.prefix for requests in pool.submitted for request in requests)


def test_sampling_ahead_begins_at_once():
    pool = ToyPool(["mixed"])
    collector = make(pool, mode="one_step_off")
    collector.resume(0)
    until_enough(collector)
    collector.take()
    collector.step(0.0)
    assert collector.counts.generated_tokens > 0


# -- counting and refusing -----------------------------------------------------------------------------------------------


def test_a_failed_group_is_never_scored_and_its_other_responses_are_ignored():
    pool = ToyPool(["failed", "mixed", "mixed", "mixed"], slots=100)
    result = run(pool, iterations=1)[0]
    assert serials(result) == [1, 2, 3]
    assert result.counts.failed == 1
    others = [request for request in pool.submitted[0] if not request.request_id.endswith(f"/{FAILING_PLACE}")]
    lengths = [len(whole_response(request.request_id, request.seed, "failed")[0]) for request in others]
    assert result.counts.dropped_tokens == sum(lengths)


def test_stale_groups_are_dropped_and_the_unused_share_counts_them():
    pool = ToyPool(["mixed"], slots=100)
    collector = make(pool, target=2, unfinished="continue", prompts_in_flight=6, max_staleness=0)
    collector.resume(0)
    while collector.unfinished:  # all six finish
        collector.step(0.0)
    started = collector.counts.prompts
    counts = collector.take().counts
    assert counts.stale == started - 2 > 0
    assert counts.unused_share == (started - 2) / started
    assert (counts.waiting, counts.carried_tokens) == (0, 0)


def test_max_prompts_ends_an_iteration_with_the_groups_there_are():
    outcomes = ["mixed"] + ["wrong"] * 30
    first, second = run(ToyPool(outcomes), iterations=2, max_prompts=31)
    assert (serials(first), serials(second)) == ([0], [31])
    assert (first.counts.prompts, second.counts.prompts) == (31, 31)


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        (["right", "wrong"], r"none of 12 prompts .*\(6 all right, 6 all wrong, 0 failed, 0 too old\).*responses_per_prompt"),
        (["failed"], "requests of all 12 prompts failed"),
    ],
)
def test_nothing_to_learn_from_is_said_with_the_mend(outcomes, message):
    collector = make(ToyPool(outcomes), max_prompts=12)
    collector.resume(0)
    until_enough(collector)
    with pytest.raises(UserError, match=message):
        collector.take()


def test_calls_out_of_turn_are_refused():
    collector = make(ToyPool(["mixed"]))
    state = collector.state()
    with pytest.raises(RuntimeError, match="before there were enough"):
        collector.take()
    collector.resume(0)
    for call in (lambda: collector.resume(0), collector.state, lambda: collector.load_state(state)):
        with pytest.raises(RuntimeError, match=r"pause\(\)"):
            call()
    collector.pause()
    collector.pause()


def test_other_data_are_refused():
    collector = make(ToyPool(["mixed"]))
    other = Collector(dataset(7), ToyPool([]), SCORE_GROUP, RolloutConfig(), target_groups=1, responses_per_prompt=N, seed=1)
    with pytest.raises(UserError, match="training set"):
        other.load_state(collector.state())
