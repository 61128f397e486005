"""The phases of a clock add up to its wall time, whatever is nested in what."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.phases import PHASES, PhaseClock

NAMES = [phase.name for phase in PHASES]


class Time:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


blocks = st.recursive(
    st.lists(st.floats(0.0, 50.0), max_size=3),
    lambda inner: st.lists(
        st.one_of(st.floats(0.0, 50.0), st.tuples(st.sampled_from(NAMES), inner)), max_size=4
    ),
    max_leaves=12,
)


def run(clock: PhaseClock, time: Time, block: list, name: str, expected: dict[str, float]) -> None:
    """Let the time of `block` pass: its numbers are seconds of phase `name`, its pairs phases within it."""
    for item in block:
        if isinstance(item, tuple):
            with clock.phase(item[0]):
                run(clock, time, item[1], item[0], expected)
        else:
            time.now += item
            expected[name] += item


@given(st.lists(blocks, min_size=1, max_size=3))
def test_phases_are_disjoint_and_add_up_to_the_wall_time(iterations: list[list]) -> None:
    time = Time()
    clock = PhaseClock(time)
    for block in iterations:
        begin, expected = time.now, dict.fromkeys(NAMES, 0.0)
        run(clock, time, block, "other", expected)
        seconds = clock.take()
        assert seconds.pop("total") == time.now - begin
        assert seconds == pytest.approx(expected, abs=1e-9)
        assert sum(seconds.values()) == pytest.approx(time.now - begin, abs=1e-9)


@given(st.floats(1.0, 100.0), st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_seconds_measured_elsewhere_are_taken_from_the_phase_around_them(
    call: float, old: float, update: float
) -> None:
    time = Time()
    clock = PhaseClock(time)
    with clock.phase("handover"):
        time.now += call
    clock.divide("handover", {"old_log_probs": old * call, "update": update * call})
    seconds = clock.take()
    assert seconds["old_log_probs"] == old * call
    assert seconds["update"] == update * call
    assert sum(seconds.values()) - seconds["total"] == pytest.approx(seconds["total"], rel=1e-9)
    assert seconds["handover"] > -1e-9


def test_a_phase_that_an_error_leaves_is_closed() -> None:
    time = Time()
    clock = PhaseClock(time)

    def fails() -> None:
        with clock.phase("rollout"):
            time.now += 2
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    time.now += 3
    seconds = clock.take()
    assert (seconds["rollout"], seconds["other"], seconds["total"]) == (2, 3, 5)


def test_a_phase_may_be_open_while_an_iteration_ends() -> None:
    time = Time()
    clock = PhaseClock(time)
    with clock.phase("checkpoint"):
        time.now += 2
        assert clock.take()["checkpoint"] == 2
        time.now += 4
    assert clock.take()["checkpoint"] == 4


def test_the_page_of_metrics_lists_the_phases() -> None:
    page = (Path(__file__).parents[1] / "docs/metrics.md").read_text(encoding="utf-8")
    rows = "".join(f"| `time/{phase.name}` | {phase.meaning} |\n" for phase in PHASES)
    assert rows in page
