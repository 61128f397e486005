"""When a group of ranks counts as hanging: one rank that works is enough, one that does not answer is too many."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.driver.rank_watch import Stall, StallWatch

RANKS = st.integers(0, 2)
EVENTS = st.lists(
    st.tuples(st.floats(0.1, 4.0), st.sampled_from(["beat", "advance", "finish"]), RANKS), max_size=40
)
TIMEOUT_S = 10.0


def watch() -> StallWatch:
    return StallWatch(3, TIMEOUT_S, now=0.0)


@given(EVENTS)
def test_a_group_hangs_if_and_only_if_no_rank_has_advanced_for_the_timeout(events):
    stalls, now, counts, last = watch(), 0.0, [0, 0, 0], 0.0
    for rank in range(3):
        stalls.answered(rank, 0, now)
    for pause, event, rank in events:
        now += pause
        assert (stalls.stalled({0, 1, 2}, now) is not None) == (now - last >= TIMEOUT_S)
        if event == "finish":
            stalls.finished(rank, now)
        else:
            counts[rank] += event == "advance"
            stalls.answered(rank, counts[rank], now)
        if event != "beat":
            last = now


def test_the_rank_that_worked_least_recently_is_named_and_idle_ranks_do_not_hang():
    stalls = watch()
    for rank, now in enumerate((3.0, 1.0, 2.0)):
        stalls.answered(rank, 7, now)
    assert stalls.stalled({0, 1, 2}, 13.0) == Stall(1, answers=True, since=1.0)
    assert stalls.stalled({0, 2}, 13.0) == Stall(2, answers=True, since=2.0)
    assert stalls.stalled((), 1000.0) is None
    stalls.began(13.0)
    assert stalls.stalled({0, 1, 2}, 22.9) is None


def test_of_a_group_that_hangs_the_rank_that_does_not_answer_is_named():
    stalls = watch()
    stalls.asked(0, 9.0)
    stalls.asked(2, 4.0)
    assert stalls.stalled({0, 1, 2}, 9.9) is None
    assert stalls.stalled({0, 1, 2}, 10.0) == Stall(2, answers=False, since=4.0)


def test_a_rank_that_does_not_answer_is_lost_also_between_methods_and_while_others_work():
    stalls = watch()
    stalls.asked(2, 1.0)
    stalls.asked(1, 5.0)
    stalls.answered(0, 1, 10.9)
    assert stalls.stalled((), 10.9) is None
    assert stalls.stalled({0, 1, 2}, 11.0) == Stall(2, answers=False, since=1.0)
    stalls.answered(2, 0, 11.0)
    assert stalls.stalled((), 14.9) is None
    assert stalls.stalled((), 15.0) == Stall(1, answers=False, since=5.0)
