"""Unused groups (stale, failed, too few) are dropped and counted; calls in a wrong state are refused."""

import pytest

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.all_wrong import AllWrongWatch
from megatron_fipo.driver.rollout.collector import Collector
from megatron_fipo.driver.rollout.trajectories import Overlong
from megatron_fipo.errors import UserError
from tests.driver.collecting import N, make, run, serials, until_enough
from tests.driver.toy_pool import FAILING_INDEX, MAX_LENGTH, ToyPool, complete_response, dataset


def holding_back_the_first(mode: str) -> tuple[Collector, ToyPool]:
    """Iteration 0 is taken; group 0 has tokens of version 0 and is not finished."""
    pool = ToyPool(["mixed"], slots=100)
    pool.never_finishing = {0}
    pool.scorers.immediate = True
    collector = make(pool, target=2, mode=mode, unfinished="continue", max_staleness=1, prompts_in_flight=3)
    collector.resume(0)
    until_enough(collector)
    assert 0 not in serials(collector.pop_batch())
    if mode == "one_step_off":
        until_enough(collector)
    collector.pause()
    pool.version = 1
    first = collector.state().values["groups"][0]
    assert first["serial"] == 0
    assert any(response["spans"] for response in first["responses"])
    assert any(response["finish_reason"] is None for response in first["responses"])
    return collector, pool


def test_what_only_the_iteration_after_the_next_could_use_too_late_is_not_sent_again():
    collector, pool = holding_back_the_first("one_step_off")
    collector.resume(1)
    counts = collector.pop_batch().counts
    assert counts.stale > 0
    assert counts.unused_share == 0  # none of them was known to be informative
    sent_for = [requests[0].request_id.partition("-")[0] for requests in pool.submitted]
    assert sent_for.count("0") == 1


def test_a_group_that_finishes_too_late_does_not_wait():
    collector, pool = holding_back_the_first("fully_asynchronous")
    collector.resume(1)
    until_enough(collector)
    assert 0 not in serials(collector.pop_batch())
    pool.never_finishing = set()
    while collector.counts.stale == 0:
        collector.step(0.0)
    collector.pause()
    assert 0 not in [group["serial"] for group in collector.state().values["groups"]]


def test_what_new_weights_make_too_old_is_dropped_before_anything_is_sent():
    pool = ToyPool(["mixed"], slots=100)
    collector = make(pool, unfinished="continue", max_staleness=2)
    collector.resume(0)
    while not collector.waiting:
        collector.step(0.0)
    collector.pause()
    begun = sum(
        any(response["spans"] for response in group["responses"])
        for group in collector.state().values["groups"]
    )
    pool.submitted.clear()
    collector.resume(3)
    assert (collector.counts.stale, collector.waiting) == (begun, 0)
    assert not any(len(request.prefix) for requests in pool.submitted for request in requests)


def test_a_failed_group_is_never_scored_and_its_other_responses_are_ignored():
    pool = ToyPool(["failed", "mixed", "mixed", "mixed"], slots=100)
    result = run(pool, iterations=1)[0]
    assert serials(result) == [1, 2, 3]
    assert result.counts.failed == 1
    others = [
        request for request in pool.submitted[0] if not request.request_id.endswith(f"/{FAILING_INDEX}")
    ]
    lengths = [len(complete_response(request.request_id, request.seed, "failed")[0]) for request in others]
    assert result.counts.dropped_tokens == sum(lengths)


def test_a_group_that_cannot_be_scored_is_dropped_and_counted():
    pool = ToyPool(["unscored", "mixed", "mixed", "mixed"], slots=100)
    result = run(pool, iterations=1)[0]
    assert serials(result) == [1, 2, 3]
    assert (result.counts.unscored, result.counts.failed, result.counts.informative) == (1, 0, 3)
    lengths = [len(complete_response(r.request_id, r.seed, "unscored")[0]) for r in pool.submitted[0]]
    assert result.counts.dropped_tokens == sum(lengths)


def test_stale_groups_are_dropped_and_the_unused_share_counts_them():
    pool = ToyPool(["mixed"], slots=100)
    collector = make(pool, target=2, unfinished="continue", prompts_in_flight=6, max_staleness=0)
    collector.resume(0)
    while collector.unfinished:  # all six finish
        collector.step(0.0)
    started = collector.counts.prompts
    counts = collector.pop_batch().counts
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
        (
            ["right", "wrong"],
            r"none of 12 prompts .*\(6 all right, 6 all wrong, 0 failed, 0 not scored, 0 too old\).*responses_per_prompt",
        ),
        (["failed"], "requests of all 12 prompts failed"),
        (
            ["unscored", "failed"],
            r"none of 12 prompts .*\(6 not scored, 6 failed\).*correct the reward function",
        ),
    ],
)
def test_nothing_to_train_on_is_an_error_with_the_fix(outcomes, message):
    collector = make(ToyPool(outcomes), max_prompts=12)
    collector.resume(0)
    until_enough(collector)
    with pytest.raises(UserError, match=message):
        collector.pop_batch()


def test_calls_out_of_turn_are_refused():
    collector = make(ToyPool(["mixed"]))
    state = collector.state()
    with pytest.raises(RuntimeError, match="before there were enough"):
        collector.pop_batch()
    collector.resume(0)
    for call in (lambda: collector.resume(0), collector.state, lambda: collector.load_state(state)):
        with pytest.raises(RuntimeError, match=r"pause\(\)"):
            call()
    collector.pause()
    collector.pause()


def test_other_data_are_refused():
    collector = make(ToyPool(["mixed"]))
    pool = ToyPool([])
    other = Collector(
        dataset(7),
        pool,
        pool.scorers,
        AllWrongWatch(str, print),
        RolloutConfig(),
        Overlong(MAX_LENGTH, 0, 1.0),
        target_groups=1,
        responses_per_prompt=N,
        seed=1,
    )
    with pytest.raises(UserError, match="training set"):
        other.load_state(collector.state())
