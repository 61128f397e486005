"""The pool's two pure parts, fleet and dispatcher: any order of events, and single transitions."""

import math
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megatron_fipo.driver.rollout.dispatch import Call, Dispatcher
from megatron_fipo.driver.rollout.fleet import FAILURES_IN_A_ROW, FORGIVEN_AFTER_ANSWERS, Fleet, State
from megatron_fipo.engine.protocol import EngineStatus, GenerationRequest, SamplingParams

LOAD_S, HEALTH_S, STALL_S = 100.0, 8.0, 50.0


def status(tokens: int = 0, waiting: int = 0) -> EngineStatus:
    return EngineStatus(0, tokens, waiting)


class EnginesAndRequests(RuleBasedStateMachine):
    """Engines load, serve, fail, die, hang and get weights in any order; the pool is only its bookkeeping.

    The true state of the engines is tracked here independently: `weights` by engine.
    """

    @initialize(
        size=st.integers(1, 3),
        max_restarts=st.integers(0, 2),
        max_retries=st.integers(0, 2),
        keep_batches=st.booleans(),
        calls_at_once=st.integers(1, 2),
        serve_loaded=st.booleans(),
    )
    def begin(self, size, max_restarts, max_retries, keep_batches, calls_at_once, serve_loaded):
        self.now = 0.0
        self.size, self.max_restarts, self.max_retries, self.keep_batches = (
            size,
            max_restarts,
            max_retries,
            keep_batches,
        )
        self.loaded_version = 0 if serve_loaded else None
        self.fleet = Fleet(
            size,
            max_restarts=max_restarts,
            load_timeout_s=LOAD_S,
            health_timeout_s=HEALTH_S,
            stall_timeout_s=STALL_S,
            loaded_version=self.loaded_version,
            now=0.0,
        )
        self.dispatcher = Dispatcher(
            requests_per_call=3,
            calls_at_once=calls_at_once,
            max_retries=max_retries,
            keep_batches=keep_batches,
        )
        self.calls_at_once = calls_at_once
        self.current = self.loaded_version
        self.weights: dict[int, int | None] = {}
        self.starts = Counter(range(size))
        self.batches: dict[str, frozenset[str]] = {}
        self.attempts: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.running: list[Call] = []
        self.tokens: Counter[int] = Counter()
        self.progressed: dict[int, float] = {}
        """When each engine with a call last got its first call, answered one or had computed a token at a probe."""
        self.answers: Counter[int] = Counter()
        """Of each engine since its last start."""

    def lose(self, number):
        for call in self.dispatcher.at(number):
            self.give_back(call)
        self.weights.pop(number, None)
        self.progressed.pop(number, None)
        if self.answers[number] >= FORGIVEN_AFTER_ANSWERS:
            self.starts[number] = 1
        self.tokens[number] = self.answers[number] = 0
        if self.fleet.lost(number, self.now):
            self.starts[number] += 1

    def give_back(self, call):
        self.running.remove(call)
        given_up = self.dispatcher.failed(call)
        assert given_up == [
            r.request_id for r in call.requests if self.attempts[r.request_id] == self.max_retries + 1
        ]
        self.ended.update(given_up)

    def pick(self, data, *states):
        return data.draw(st.sampled_from(self.fleet.numbers(*states)))

    def some(self, *states):
        return hasattr(self, "fleet") and bool(self.fleet.numbers(*states))

    @rule(count=st.integers(1, 7), top_p=st.sampled_from([0.5, 1.0]))
    def submit(self, count, top_p):
        first = len(self.batches)
        requests = [GenerationRequest(str(first + i), (1,), 0) for i in range(count)]
        self.dispatcher.submit(requests, SamplingParams(1.0, top_p, 8))
        self.batches |= {r.request_id: frozenset(r.request_id for r in requests) for r in requests}

    @rule()
    def dispatch(self):
        for call in self.dispatcher.start_calls(dict.fromkeys(self.fleet.numbers(State.SERVING), math.inf)):
            self.fleet.called(call.engine, len(call.items), self.now)
            self.progressed.setdefault(call.engine, self.now)
            assert self.weights[call.engine] == self.current
            assert self.current is not None
            assert call.requests
            assert all(item.sampling == call.sampling for item in call.items)
            ids = [request.request_id for request in call.requests]
            self.attempts.update(ids)
            if self.keep_batches:
                assert all(frozenset(ids) == self.batches[request_id] for request_id in ids)
            else:
                assert len(ids) <= 3
                last = [i for i in ids if self.attempts[i] == self.max_retries + 1 and self.max_retries > 0]
                assert not last or len(ids) == 1
            self.running.append(call)

    @precondition(lambda self: self.some(State.STARTING))
    @rule(data=st.data())
    def load(self, data):
        number = self.pick(data, State.STARTING)
        self.fleet.loaded(number, status(), self.now)
        self.weights[number] = self.loaded_version

    @precondition(lambda self: hasattr(self, "fleet"))
    @rule(data=st.data())
    def push(self, data):
        """To some loaded engines, one of which may be lost before the others have their weights."""
        takers = [number for number in self.weights if data.draw(st.booleans())]
        self.current = (self.current or 0) + 1
        for number in takers:
            self.weights[number] = self.current
        if takers and data.draw(st.booleans()):
            self.lose(takers[0])
        self.fleet.updated(takers, self.current)

    @precondition(lambda self: bool(getattr(self, "running", None)))
    @rule(data=st.data(), works=st.booleans())
    def reply(self, data, works):
        call = data.draw(st.sampled_from(self.running))
        if works:
            self.running.remove(call)
            self.dispatcher.answered(call)
            self.ended.update(request.request_id for request in call.requests)
            answers = data.draw(st.sampled_from([1, FORGIVEN_AFTER_ANSWERS]))
            self.answers[call.engine] += answers
            self.fleet.answered_call(call.engine, answers, self.now)
            self.progress(call.engine)
        else:
            self.give_back(call)
            self.progress(call.engine)
            if self.fleet.failed_call(call.engine, self.now):
                self.lose(call.engine)

    def progress(self, number):
        self.progressed.pop(number, None)
        if self.dispatcher.at(number):
            self.progressed[number] = self.now

    @precondition(lambda self: self.some(State.STARTING, State.STALE, State.SERVING, State.SUSPECT))
    @rule(data=st.data())
    def die(self, data):
        self.lose(self.pick(data, State.STARTING, State.STALE, State.SERVING, State.SUSPECT))

    @rule(
        seconds=st.floats(0.0, 20.0),
        hanging=st.sets(st.integers(0, 2)),
        computing=st.sets(st.integers(0, 2)),
    )
    def time_passes(self, seconds, hanging, computing):
        """Probes go out and are answered, except by engines that hang; some engines compute tokens."""
        self.now += seconds
        self.fleet.probes_due(self.now)
        for number in self.fleet.probing:
            if number not in hanging:
                if number in computing and self.dispatcher.at(number):
                    self.tokens[number] += 1
                    self.progress(number)
                self.fleet.answered_probe(number, status(self.tokens[number]), self.now)
        for number, reason in self.fleet.overdue(self.now):
            if "computed no token" in reason:
                assert self.now - self.progressed[number] >= STALL_S
            else:
                assert ("probe" in reason) == (number in self.weights)
            self.lose(number)
        assert all(self.now - since < STALL_S for since in self.progressed.values())
        assert self.fleet.next_event() > self.now

    @rule()
    def withdraw(self):
        self.ended.update(self.dispatcher.withdraw())

    @invariant()
    def bookkeeping_holds(self):
        if not hasattr(self, "fleet"):
            return
        assert all(count <= self.max_restarts + 1 for count in self.starts.values())
        assert all(count == 1 for count in self.ended.values())
        assert self.dispatcher.outstanding == len(self.batches) - len(self.ended)
        assert all(count <= self.max_retries + 1 for count in self.attempts.values())
        assert self.dispatcher.retries == sum(self.attempts.values()) - len(self.attempts)
        for number in range(self.size):
            assert len(self.dispatcher.at(number)) <= self.calls_at_once
            assert (self.fleet.state(number) in (State.STARTING, State.RETIRED)) == (
                number not in self.weights
            )
        assert sorted(map(id, self.running)) == sorted(
            id(c) for n in range(self.size) for c in self.dispatcher.at(n)
        )

    def teardown(self):
        """Without further faults all requests end, if an engine is left."""
        if not hasattr(self, "fleet") or len(self.fleet.numbers(State.RETIRED)) == self.size:
            return
        for number in self.fleet.numbers(State.STARTING):
            self.fleet.loaded(number, status(), self.now)
            self.weights[number] = self.loaded_version
        for number in self.fleet.probing:
            self.fleet.answered_probe(number, status(), self.now)
        self.current = (self.current or 0) + 1
        self.weights = dict.fromkeys(self.weights, self.current)
        self.fleet.updated(self.weights, self.current)
        for _ in range(len(self.batches) + 1):
            self.dispatch()
            for call in list(self.running):
                self.running.remove(call)
                self.dispatcher.answered(call)
                self.ended.update(request.request_id for request in call.requests)
        assert self.ended == Counter(self.batches.keys())


TestEnginesAndRequests = EnginesAndRequests.TestCase
TestEnginesAndRequests.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def fleet(size=1, max_restarts=1, loaded_version=None) -> Fleet:
    return Fleet(
        size,
        max_restarts=max_restarts,
        load_timeout_s=LOAD_S,
        health_timeout_s=HEALTH_S,
        stall_timeout_s=STALL_S,
        loaded_version=loaded_version,
        now=0.0,
    )


def test_an_engine_serves_once_it_holds_the_current_weights():
    engines = fleet(2)
    assert engines.numbers(State.STARTING) == [0, 1]
    engines.loaded(0, status(), 1.0)
    assert engines.state(0) is State.STALE
    engines.updated([0, 1], 5)
    assert engines.numbers(State.SERVING) == [0]
    engines.loaded(1, status(), 2.0)
    assert engines.state(1) is State.STALE
    engines.updated([1], 6)
    assert (engines.numbers(State.STALE), engines.numbers(State.SERVING)) == ([0], [1])
    engines.forgot_weights()
    assert engines.numbers(State.STALE) == [0, 1]


def test_loaded_weights_serve_only_until_others_are_current():
    engines = fleet(2, loaded_version=0)
    engines.loaded(0, status(), 1.0)
    assert engines.state(0) is State.SERVING
    assert engines.lost(0, 2.0)
    engines.loaded(0, status(), 3.0)
    assert engines.state(0) is State.SERVING
    engines.loaded(1, status(), 3.0)
    engines.updated([1], 1)
    assert engines.state(0) is State.STALE


def test_an_unanswered_probe_makes_an_engine_suspect_then_overdue():
    engines = fleet(loaded_version=0)
    engines.loaded(0, status(), 0.0)
    assert engines.next_event() == HEALTH_S / 4
    assert engines.probes_due(1.0) == []
    assert engines.probes_due(2.0) == engines.probing == [0]
    assert engines.probes_due(3.0) == []
    assert engines.state(0) is State.SERVING
    assert engines.probes_due(2.0 + HEALTH_S / 4) == []
    assert engines.state(0) is State.SUSPECT
    assert engines.overdue(2.0 + HEALTH_S - 0.1) == []
    engines.answered_probe(0, status(), 9.0)
    assert engines.state(0) is State.SERVING
    assert engines.probing == []
    engines.probe_all()
    assert engines.probes_due(9.0) == [0]
    ((number, reason),) = engines.overdue(9.0 + HEALTH_S)
    assert number == 0
    assert "rollout.health_timeout_s = 8 s" in reason


def test_a_load_has_its_own_deadline_and_restarts_are_bounded():
    engines = fleet(max_restarts=1)
    assert engines.overdue(LOAD_S - 1) == []
    assert "rollout.timeout_s = 100 s" in engines.overdue(LOAD_S)[0][1]
    assert engines.lost(0, LOAD_S)
    assert engines.overdue(2 * LOAD_S - 1) == []
    assert not engines.lost(0, 2 * LOAD_S)
    assert engines.state(0) is State.RETIRED
    assert engines.next_event() == math.inf
    assert engines.overdue(math.inf) == []


@pytest.mark.parametrize("interrupted", [False, True])
def test_failures_in_a_row_condemn_an_engine(interrupted):
    engines = fleet(loaded_version=0)
    engines.loaded(0, status(), 0.0)
    for _ in range(FAILURES_IN_A_ROW + interrupted):
        engines.called(0, 1, 0.0)
    for _ in range(FAILURES_IN_A_ROW - 1):
        assert not engines.failed_call(0, 0.0)
    if interrupted:
        engines.answered_call(0, 1, 0.0)
    assert engines.failed_call(0, 0.0) is not interrupted


def busy(tokens: int = 0) -> Fleet:
    engines = fleet(loaded_version=0, max_restarts=1)
    engines.loaded(0, status(tokens), 0.0)
    engines.called(0, 1, 1.0)
    return engines


def test_a_call_may_last_as_long_as_its_tokens_come():
    engines = busy()
    for tokens in range(1, 100):
        engines.answered_probe(0, status(tokens), tokens * (STALL_S - 1))
        assert engines.overdue(tokens * (STALL_S - 1)) == []


def test_an_engine_that_answers_probes_and_computes_nothing_hangs():
    engines = busy(tokens=7)
    for now in (10.0, 30.0, 50.9):
        engines.answered_probe(0, status(7), now)
    assert engines.overdue(50.9) == []
    assert engines.next_event() == 1.0 + STALL_S
    ((number, reason),) = engines.overdue(1.0 + STALL_S)
    assert (number, reason) == (0, "computed no token of its 1 calls within rollout.stall_timeout_s = 50 s")


def test_an_engine_without_calls_need_not_compute():
    engines = busy()
    engines.answered_call(0, 1, 2.0)
    engines.answered_probe(0, status(), 5000.0)
    assert engines.overdue(5000.0) == []
    engines.called(0, 1, 5000.0)
    assert engines.overdue(5000.0 + STALL_S - 1) == []
    engines.called(0, 1, 5040.0)  # a further call is no progress
    assert len(engines.overdue(5000.0 + STALL_S)) == 1


def test_good_work_makes_up_for_restarts():
    engines = fleet(loaded_version=0, max_restarts=1)
    for start in range(5):
        engines.loaded(0, status(), 0.0)
        engines.called(0, 1, 0.0)
        engines.called(0, 1, 0.0)
        engines.answered_call(0, FORGIVEN_AFTER_ANSWERS - 1, 0.0)
        assert engines.restarts(0) == min(start, 1)
        engines.answered_call(0, 1, 0.0)
        assert engines.restarts(0) == 0
        assert engines.lost(0, 1.0)
    assert not engines.lost(0, 2.0)


class TestUnfinished:
    def probe(self, engines: Fleet, running: int, now: float, waiting: int = 0) -> None:
        assert engines.probes_due(now) == [0]
        engines.answered_probe(0, EngineStatus(0, int(now), waiting=waiting, running=running), now)

    def test_all_that_was_sent_until_two_probes_have_seen_it(self):
        engines = busy()
        engines.called(0, 16, 2.0)
        assert engines.unfinished(0) == 17
        self.probe(engines, running=0, now=10.0)  # may not have seen the last call yet
        assert engines.unfinished(0) == 17
        self.probe(engines, running=5, now=20.0)
        assert engines.unfinished(0) == 5

    def test_those_sent_after_the_older_probe_are_added(self):
        engines = busy()
        for now in (10.0, 20.0):
            self.probe(engines, running=3, now=now)
        engines.called(0, 16, 21.0)
        assert engines.unfinished(0) == 3 + 16
        self.probe(engines, running=10, now=30.0, waiting=4)
        assert engines.unfinished(0) == 10 + 4 + 16
        self.probe(engines, running=10, now=40.0)
        assert engines.unfinished(0) == 10

    def test_a_call_sent_while_a_probe_is_under_way_is_not_lost(self):
        engines = busy()
        for now in (10.0, 20.0):
            self.probe(engines, running=1, now=now)
        engines.probes_due(30.0)
        engines.called(0, 16, 30.5)
        engines.answered_probe(0, EngineStatus(0, 30, running=1), 31.0)
        assert engines.unfinished(0) == 1 + 16

    def test_a_restarted_engine_has_none(self):
        engines = busy()
        engines.called(0, 16, 2.0)
        assert engines.lost(0, 3.0)
        assert engines.unfinished(0) == 0
