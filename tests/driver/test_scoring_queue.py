"""The bookkeeping of scorers: any order of events, and what it guarantees whatever the order is."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megatron_fipo.driver.workers.queue import GRACE_S, START_TIMEOUT_S, WorkQueue
from megatron_fipo.scorer.protocol import ScoreRequest
from tests.scorer.requests import request

TIMEOUT_S = 3.0
CALLS = 2
"""A group is sent at most so often."""


class ScorersAndRequests(RuleBasedStateMachine):
    """Scorers load, answer, die and hang in any order. Their true state is tracked here independently."""

    @initialize(size=st.integers(1, 3))
    def begin(self, size):
        self.now = 0.0
        self.size = size
        self.queue = WorkQueue(size, timeout_s=TIMEOUT_S, now=0.0)
        self.loading = dict.fromkeys(range(size), START_TIMEOUT_S)
        """When each scorer that loads is overdue."""
        self.running: dict[int, tuple[ScoreRequest, float]] = {}
        """The call of each busy scorer, and when it is overdue."""
        self.retry: dict[int, int] = {}
        """Key that waits for a scorer."""
        self.submitted: list[int] = []
        self.first_calls: list[int] = []
        self.attempts: Counter[int] = Counter()
        self.ended: Counter[int] = Counter()
        self.withdrawn: set[int] = set()
        self.failed_starts: Counter[int] = Counter()

    @rule(responses=st.integers(1, 4))
    def submit(self, responses):
        key = len(self.submitted)
        self.queue.submit(request(key, responses))
        self.submitted.append(key)

    @rule()
    def dispatch(self):
        idle = set(range(self.size)) - self.loading.keys() - self.running.keys()
        waiting = len(self.submitted) - len(self.first_calls) - len(self.withdrawn - set(self.first_calls))
        calls = self.queue.start_calls(self.now)
        retries = idle & self.retry.keys()
        assert len(calls) == len(retries) + min(len(idle) - len(retries), waiting), "no scorer waits in vain"
        for number, sent in calls:
            assert number in idle
            if self.attempts[sent.key]:
                assert self.retry.pop(number) == sent.key, "a retry is the first call of the fresh process"
            else:
                assert number not in self.retry
                self.first_calls.append(sent.key)
            self.attempts[sent.key] += 1
            self.running[number] = sent, self.now + len(sent.responses) * TIMEOUT_S + GRACE_S

    @precondition(lambda self: hasattr(self, "loading") and self.loading)
    @rule(data=st.data())
    def load(self, data):
        number = data.draw(st.sampled_from(sorted(self.loading)))
        del self.loading[number]
        self.failed_starts[number] = 0
        self.queue.loaded(number)

    @precondition(lambda self: hasattr(self, "running") and self.running)
    @rule(data=st.data())
    def answer(self, data):
        number = data.draw(st.sampled_from(sorted(self.running)))
        sent, _ = self.running.pop(number)
        assert self.queue.ended(number) == sent.key
        self.ended[sent.key] += 1

    @rule(data=st.data())
    def die(self, data):
        self.lose(data.draw(st.integers(0, self.size - 1)))

    def lose(self, number):
        self.failed_starts[number] += number in self.loading
        self.loading[number] = self.now + START_TIMEOUT_S
        given_up = self.queue.lost(number, self.now)
        call = self.running.pop(number, None)
        if call is None:
            assert given_up is None
            return
        key = call[0].key
        if self.attempts[key] == CALLS:
            assert given_up == key
            self.ended[key] += 1
        else:
            assert given_up is None
            self.retry[number] = key

    @rule(seconds=st.sampled_from([1.0, TIMEOUT_S, GRACE_S, START_TIMEOUT_S]))
    def wait(self, seconds):
        self.now += seconds
        due = {number: due for number, (_, due) in self.running.items()} | self.loading
        assert self.queue.next_deadline == min(due.values(), default=math.inf)
        overdue = sorted(number for number, at in due.items() if at <= self.now)
        assert self.queue.overdue(self.now) == overdue
        for number in overdue:
            self.lose(number)

    @rule()
    def withdraw(self):
        keys = self.queue.withdraw()
        running = {sent.key for sent, _ in self.running.values()}
        assert sorted(keys) == sorted(set(self.submitted) - self.ended.keys() - running)
        self.retry.clear()
        self.withdrawn.update(keys)
        self.ended.update(keys)

    @invariant()
    def every_request_ends_once(self):
        if not hasattr(self, "queue"):
            return
        assert all(count == 1 for count in self.ended.values())
        assert self.queue.outstanding == len(self.submitted) - len(self.ended)
        assert all(count <= CALLS for count in self.attempts.values())
        assert self.first_calls == sorted(self.first_calls), "first come, first served"
        for number in range(self.size):
            assert self.queue.failed_starts(number) == self.failed_starts[number]
            at = self.queue.request_of(number)
            call = self.running.get(number)
            assert self.queue.attempts(number) == (0 if at is None else self.attempts[at.key])
            assert (None if at is None else at.key) == (call[0].key if call else self.retry.get(number))


TestScorersAndRequests = ScorersAndRequests.TestCase
TestScorersAndRequests.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def outcomes(losses: list[int], size: int, order: int) -> dict[int, bool]:
    """Whether each request was scored, if it kills its scorer `losses[key]` times, with random timing."""
    timing = random.Random(order)
    queue = WorkQueue(size, timeout_s=TIMEOUT_S, now=0.0)
    left = dict(enumerate(losses))
    waiting, loading, running = list(left), set(range(size)), dict[int, int]()
    scored: dict[int, bool] = {}
    while len(scored) < len(losses):
        event = timing.choice(["submit", "dispatch", "load", "end", "idle death"])
        if event == "submit" and waiting:
            queue.submit(request(waiting.pop(0)))
        elif event == "dispatch":
            running |= {number: sent.key for number, sent in queue.start_calls(0.0)}
        elif event == "load" and loading:
            number = timing.choice(sorted(loading))
            loading.remove(number)
            queue.loaded(number)
        elif event == "end" and running:
            number = timing.choice(sorted(running))
            key = running.pop(number)
            if left[key] == 0:
                scored[queue.ended(number)] = True
                continue
            left[key] -= 1
            loading.add(number)
            if (given_up := queue.lost(number, 0.0)) is not None:
                scored[given_up] = False
        elif event == "idle death" and timing.random() < 0.1:
            number = timing.randrange(size)
            if number not in running:
                loading.add(number)
                assert queue.lost(number, 0.0) is None
    assert queue.outstanding == 0
    return scored


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4), st.integers(0, 10**6))
def test_what_is_scored_depends_on_the_requests_and_not_on_timing(losses, size, order):
    expected = {key: count < CALLS for key, count in enumerate(losses)}
    assert outcomes(losses, size, order) == expected


def test_a_key_may_be_used_again_only_after_its_request_has_ended():
    queue = WorkQueue(1, timeout_s=TIMEOUT_S, now=0.0)
    queue.submit(request(4))
    with pytest.raises(ValueError, match="key 4 is already outstanding"):
        queue.submit(request(4))
    queue.loaded(0)
    queue.start_calls(0.0)
    queue.ended(0)
    queue.submit(request(4))
