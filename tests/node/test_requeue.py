"""Whether a job is requeued: a table, and the promise over any sequence of attempts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.exit_codes import BUG, DONE, INTERRUPTED, LOST, SAVED, USER_ERROR
from megatron_fipo.node.requeue import KILLED, Decision, History, begin, end

OPEN = History(is_open=True, progress="iteration_000005 1")


@pytest.mark.parametrize(
    ("code", "progress", "failures", "requeue", "exit_code", "failures_after"),
    [
        (DONE, "iteration_000005 1", 0, False, 0, 0),
        (SAVED, "iteration_000007 2", 3, True, None, 0),
        (SAVED, "iteration_000005 1", 0, True, None, 1),
        (SAVED, "iteration_000005 9", 0, True, None, 0),  # saved again, with more of a rollout
        (LOST, "iteration_000006 2", 3, True, None, 0),
        (LOST, "iteration_000005 1", 2, True, None, 3),
        (LOST, "iteration_000005 1", 3, False, USER_ERROR, 4),
        (SAVED, "iteration_000005 1", 3, False, USER_ERROR, 4),
        (KILLED, "iteration_000005 1", 0, True, None, 1),
        (KILLED, "iteration_000005 1", 3, False, USER_ERROR, 4),
        (USER_ERROR, "iteration_000007 2", 0, False, USER_ERROR, 0),
        (BUG, "iteration_000007 2", 0, False, BUG, 0),
        (INTERRUPTED, "iteration_000007 2", 0, False, INTERRUPTED, 0),
        (139, "iteration_000007 2", 0, False, 139, 0),
    ],
)
def test_the_end_of_an_attempt(code, progress, failures, requeue, exit_code, failures_after):
    history = History(failures, "iteration_000005 1", is_open=True)
    decision = end(history, code, progress, retries=3)
    assert decision.requeue == requeue
    assert exit_code is None or decision.code == exit_code
    assert not decision.history.is_open
    assert decision.history.failures == failures_after
    assert decision.history.is_finished == (code == DONE)


def test_a_first_save_is_progress():
    assert end(History(is_open=True), LOST, "iteration_000001 1", 0).requeue
    assert not end(History(is_open=True), LOST, None, 0).requeue


def test_a_finished_job_that_is_requeued_ends_with_zero():
    decision = begin(History(is_finished=True), "iteration_000009 1", 3)
    assert isinstance(decision, Decision)
    assert (decision.requeue, decision.code) == (False, 0)


def test_a_requeue_by_the_scheduler_itself_counts_as_an_attempt():
    history = History()
    for failures in (0, 1, 2):
        history = begin(history, None, retries=2)
        assert isinstance(history, History)
        assert history.failures == failures
    stopped = begin(history, None, retries=2)
    assert isinstance(stopped, Decision)
    assert stopped.code == USER_ERROR
    assert "3 attempts in a row saved nothing new (at most 2 are repeated)" in stopped.reason


def test_progress_before_a_requeue_by_the_scheduler_resets_the_count():
    history = begin(History(failures=2, progress="a", is_open=True), "b", retries=2)
    assert history == History(failures=0, progress="b", is_open=True)


@given(
    retries=st.integers(0, 5),
    attempts=st.lists(st.tuples(st.sampled_from([SAVED, LOST, KILLED, None]), st.booleans()), max_size=40),
)
def test_no_job_runs_more_often_in_a_row_without_progress_than_permitted(retries, attempts):
    history: History | Decision = History()
    progress, without = 0, 0
    for code, advances in attempts:
        history = begin(history, str(progress), retries)
        if isinstance(history, Decision):
            break
        progress += advances
        without = 0 if advances else without + 1
        assert without <= retries + 1
        if code is None:  # killed with its node: nothing is recorded
            continue
        decision = end(history, code, str(progress), retries)
        assert decision.requeue == (without <= retries)
        history = decision.history
        if not decision.requeue:
            break


def test_a_job_that_makes_progress_is_never_stopped():
    history: History = History()
    for number in range(50):
        begun = begin(history, str(number), 0)
        assert isinstance(begun, History)
        decision = end(begun, LOST, str(number + 1), 0)
        assert decision.requeue
        history = decision.history
