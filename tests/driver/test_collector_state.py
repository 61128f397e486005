"""A saved state of the collector is restored exactly, or refused with a reason."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from megatron_fipo.driver.rollout.collector import Collector
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir.loop_state import RolloutState
from tests.driver.collecting import make
from tests.driver.toy_pool import ToyPool
from tests.generations import plain

WRONG = (None, "x", -1, 1.5, 10**9, True, float("nan"), [], {}, [None], {"x": 1})


def collector() -> Collector:
    pool = ToyPool(["mixed", "wrong", "unscored"], slots=5)
    return make(pool, target=9, unfinished="continue", max_staleness=2, prompts_in_flight=9)


@pytest.fixture(scope="module")
def state() -> RolloutState:
    """With groups of all kinds."""
    saved = collector()
    saved.resume(0)
    while saved.waiting < 2:
        saved.step(0.0)
    saved.pause()
    state = saved.state()
    assert {group["scores"] is None for group in state.values["groups"]} == {True, False}
    assert state.values["filtered"]
    return state


def places(values: Any) -> Iterator[tuple[str | int, ...]]:
    """The way to each value within JSON values."""
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in items:
        yield (key,)
        yield from ((key, *way) for way in places(value))


def refused_or_exact(values: Any, tokens: dict[str, list[np.ndarray]]) -> bool:
    """Whether a collector refuses a state; if not, it must have restored it."""
    loaded = collector()
    try:
        loaded.load_state(RolloutState(copy.deepcopy(values), tokens))
    except (ValueError, UserError):
        return True
    restored = loaded.state()
    assert plain(restored.values) == plain(values)
    return False


def test_a_wrong_value_anywhere_is_refused_or_restored_as_it_is(state):
    refused = tried = 0
    for way in places(state.values):
        for wrong in WRONG:
            values = copy.deepcopy(state.values)
            parent = values
            for key in way[:-1]:
                parent = parent[key]
            value = parent[way[-1]]
            if plain(value) == plain(wrong) or (value == [] and wrong == {}):
                continue
            if way[-1] == "scores" and wrong is None:
                continue  # as in versions before 0.2
            parent[way[-1]] = wrong
            tried += 1
            refused += refused_or_exact(values, state.tokens)
    assert refused > 0.7 * tried > 1000


def test_a_missing_value_is_refused(state):
    optional = {"scores", "unscored"} | {"observations", "score"}  # the latter since there are environments
    for way in places(state.values):
        if way[-1] in optional or way[:-1] == ("filtered",) or isinstance(way[-1], int):
            continue  # a state with fewer groups is one too
        values = copy.deepcopy(state.values)
        parent = values
        for key in way[:-1]:
            parent = parent[key]
        del parent[way[-1]]
        assert refused_or_exact(values, state.tokens), way


def test_columns_that_do_not_fit_are_refused(state):
    columns = {name: np.concatenate(parts) for name, parts in state.tokens.items()}
    ids, log_probs = columns["token_ids"], columns["log_probs"]
    assert not refused_or_exact(state.values, {name: [column] for name, column in columns.items()})
    nan = log_probs.copy()
    nan[3] = np.nan
    for change in (
        {"token_ids": ids[:-1]},
        {"token_ids": ids[:-1], "log_probs": log_probs[:-1]},
        {"token_ids": np.append(ids, ids), "log_probs": np.append(log_probs, log_probs)},
        {"token_ids": ids.astype(np.int64)},
        {"log_probs": log_probs.astype(np.float64)},
        {"log_probs": nan},
        {"log_probs": 1 - log_probs},
        {"token_ids": -1 - ids},
        {"others": ids},
    ):
        assert refused_or_exact(state.values, {name: [c] for name, c in (columns | change).items()}), change
    assert refused_or_exact(state.values, {})
    assert refused_or_exact(state.values, {"token_ids": [ids]})
