"""Failures to score are logged once per kind; too large a share of them ends the run with the reason and the fix."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.driver.scoring.pool import WORDING
from megatron_fipo.driver.workers.failures import LEAST_FAILURES, WINDOW, FailureWatch
from megatron_fipo.errors import UserError
from megatron_fipo.scorer.protocol import Failure, FailureKind


def failure(kind: FailureKind, number: int = 0) -> Failure:
    return Failure(kind, f"the reward function s {kind.value} for response {number} of 16 to problem p")


def stopped_by(watch: FailureWatch) -> str | None:
    try:
        watch.raise_if_too_many()
    except UserError as error:
        return str(error)
    return None


@given(st.lists(st.booleans(), max_size=3 * WINDOW), st.floats(0, 1))
def test_a_run_stops_when_the_share_of_the_last_groups_is_above_the_limit(failed, limit):
    watch = FailureWatch(limit, lambda _: None, WORDING)
    for number, wrong in enumerate(failed):
        watch.ended(failure(FailureKind.TIME, number) if wrong else None)
        window = failed[: number + 1][-WINDOW:]
        too_many = sum(window) >= LEAST_FAILURES and sum(window) / len(window) > limit
        assert (stopped_by(watch) is not None) == too_many


def test_the_sentence_has_the_share_the_last_reason_and_the_fix():
    watch = FailureWatch(0.1, lambda _: None, WORDING)
    for number in range(30):
        watch.ended(failure(FailureKind.TIME, number) if number < 12 else None)
    assert stopped_by(watch) == (
        "12 of the last 30 groups could not be scored, above reward.max_failure_share = 0.1; the last reason: the "
        "reward function s time for response 11 of 16 to problem p; make the reward function faster, load what it "
        "needs when its module is imported, or raise reward.timeout_s, then run the command "
        "again with the correction; a training run resumes"
    )


@pytest.mark.parametrize(
    ("kinds", "too_low"),
    [
        ({FailureKind.TIME}, True),
        ({FailureKind.TIME, None}, False),
        ({FailureKind.TIME, FailureKind.RAISED}, False),
        ({FailureKind.MEMORY}, False),
    ],
)
def test_a_limit_that_every_group_exceeds_is_called_too_low(kinds, too_low):
    watch = FailureWatch(0.1, lambda _: None, WORDING)
    for _ in range(LEAST_FAILURES):
        for kind in kinds:
            watch.ended(None if kind is None else failure(kind))
    words = "; all exceeded the limit, which is probably too low for this reward function; make the reward function faster"
    assert (words in (stopped_by(watch) or "")) == too_low
    assert stopped_by(watch) is not None


def test_every_kind_has_a_fix_and_is_logged_once():
    logged: list[str] = []
    watch = FailureWatch(0.0, logged.append, WORDING)
    for kind in FailureKind:
        for number in range(WINDOW):
            watch.happened(failure(kind, number))
            watch.ended(failure(kind, number))
        assert stopped_by(watch) is not None
    assert [line.partition(" for")[0] for line in logged] == [
        f"the reward function s {kind.value}" for kind in FailureKind
    ]
    counted = "; groups that they cost are counted in groups/unscored, problems of an evaluation in evaluation/failed"
    assert all("response 0 " in line and line.endswith(counted) for line in logged)


def test_the_traceback_of_the_user_s_code_is_logged_once_per_kind_and_ends_the_run():
    logged: list[str] = []
    watch = FailureWatch(0.0, logged.append, WORDING)
    for number in range(LEAST_FAILURES):
        found = Failure(FailureKind.RAISED, f"problem {number} raised", f"line of {number}")
        watch.happened(found)
        watch.ended(found)
    assert len(logged) == 1
    assert logged[0].startswith("problem 0 raised; further failures of this kind are not shown")
    assert logged[0].endswith("evaluation/failed\nline of 0")
    with pytest.raises(UserError) as stopped:
        watch.raise_if_too_many()
    assert stopped.value.trace == f"line of {LEAST_FAILURES - 1}"
