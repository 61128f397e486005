"""An environment worker's answers, the limits of one answer, and instances that are lost and replayed, in a process of its own."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from megatron_fipo.environments.actor import EnvironmentActor
from megatron_fipo.environments.load import load_environment
from megatron_fipo.environments.protocol import TurnAnswer, TurnRequest
from megatron_fipo.errors import UserError
from megatron_fipo.hooks import HookError
from megatron_fipo.scorer.protocol import Failure, FailureKind
from megatron_fipo.tasks.task import Score
from tests.environments import faulty
from tests.environments.faulty import COUNTER, SETTINGS, Counter, request, turn
from tests.scorer.faulty import ROOT

_actor: list[EnvironmentActor] = []


def answer(turns: list[TurnRequest]) -> Any:
    """Runs in the child process, in its main thread, where an actor's methods run."""
    if not _actor:
        _actor.append(EnvironmentActor(SETTINGS))
        _actor[0].ready()
    return _actor[0].answer(request(*turns))


def counted(turns: list[TurnRequest]) -> tuple[list[str], int]:
    """The answers as text, and the calls of `Counter.step` that they took."""
    answer([])
    before = Counter.calls
    answers = answer(turns)
    return [_actor[0]._text(a.observation) or a.finish_reason for a in answers], Counter.calls - before


def refusal(path: str) -> tuple[str, str]:
    """Why an environment is refused, and its traceback. In the child process, since `ready` limits the memory of its own."""
    try:
        EnvironmentActor(replace(SETTINGS, samples={path: faulty.problem()})).ready()
    except HookError as error:
        return str(error), error.trace
    raise AssertionError(f"{path} was not refused")


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(scope="module")
def ask(child: ProcessPoolExecutor):
    return lambda *turns: child.submit(answer, list(turns)).result()


def shown(found: TurnAnswer) -> tuple[Any, ...]:
    return found.finish_reason, found.observation.tolist(), found.score, found.truncated


@pytest.mark.parametrize(
    ("behaviour", "space", "expected"),
    [
        ("good", 2, (None, [4, 5], None, False)),
        ("good", 1, ("length", [], None, False)),
        ("ids", 9, (None, [5, 6, 7], None, False)),
        ("long", 9, (None, [4, 5, 6, 7, 8, 9], None, True)),
        ("done", 0, ("stop", [], None, False)),
        ("score", 0, ("stop", [], Score(0.5, 1.0), False)),
        ("full score", 0, ("stop", [], Score(1.0, 0.0, "a"), False)),
    ],
)
def test_answers(ask, behaviour, space, expected):
    (found,) = ask(turn(behaviour, space=space))
    assert shown(found) == expected


@pytest.mark.parametrize(
    ("behaviour", "kind", "words"),
    [
        ("nan", FailureKind.RESULT, "returned nan (float), not a finite number"),
        ("empty", FailureKind.RESULT, "without tokens; return None to end the episode"),
        ("number", FailureKind.RESULT, "returned 3 (int), not a text, messages"),
        ("large id", FailureKind.RESULT, "returned [5, 99] (list), not a text, messages"),
        ("messages", FailureKind.RESULT, "the tokenizer has no chat template; return a text"),
        ("message without role", FailureKind.RESULT, "not a role and a content"),
        ("half a character", FailureKind.RESULT, r"returned '\ud83d' (str), not valid text"),
        ("raise", FailureKind.RAISED, "raised KeyError ('missing')"),
        ("exit", FailureKind.RAISED, "raised SystemExit (3)"),
        ("unavailable", FailureKind.UNAVAILABLE, "got no answer (UnavailableError (the tool is away))"),
    ],
)
def test_a_failure_is_of_its_turn_alone(ask, behaviour, kind, words):
    good, failure, last = ask(turn(), turn(behaviour, [("3", "4"), ("5", "")]), turn())
    assert isinstance(failure, Failure)
    assert failure.kind == kind
    assert words in failure.reason
    assert failure.reason.startswith(f"the environment {faulty.FAULTY} ")
    assert failure.reason.endswith(" in turn 2 of a response to problem p7")
    assert ("KeyError" in failure.trace) == (behaviour == "raise")
    assert shown(good) == shown(last) == (None, [4, 5], None, False)


@pytest.mark.parametrize(
    ("behaviour", "kind", "words"),
    [
        ("slow", FailureKind.TIME, "took more than environment.timeout_s = 0.5 s"),
        ("swallow", FailureKind.TIME, "took more than"),
        ("memory", FailureKind.MEMORY, "needed more than environment.memory_mb = 300 MB"),
    ],
)
def test_a_failure_of_the_limits_is_of_the_process(ask, behaviour, kind, words):
    failure = ask(turn(), turn(behaviour))
    assert failure.kind == kind
    assert words in failure.reason


def test_what_failed_once_is_tried_again_by_replay(ask, tmp_path):
    for behaviour in ("raise", "nan", "unavailable"):
        (found,) = ask(turn(f"{behaviour}@{tmp_path / behaviour}"))
        assert shown(found) == (None, [4, 5], None, False)


def episode(count: int, **settings: Any) -> TurnRequest:
    """Turn `count` of an episode of `Counter`."""
    turns = [("3", str(n)) for n in range(1, count)] + [("3", "")]
    return turn(turns=turns, environment=COUNTER, **settings)


def test_an_instance_answers_its_episode_and_a_lost_one_is_replayed(child):
    def ask(*turns: TurnRequest) -> tuple[list[str], int]:
        return child.submit(counted, list(turns)).result()

    assert ask(episode(1), episode(1, episode_id="f")) == (["1", "1"], 2)
    assert ask(episode(2)) == (["2"], 1), "the same instance"
    assert ask(episode(3)) == (["3"], 1)
    assert ask(episode(3)) == (["3"], 3), "it has answered this turn: replayed"
    assert ask(episode(4, episode_id="g")) == (["4"], 4), "unknown here: replayed"
    assert ask(episode(2, episode_id="f")) == (["2"], 1)
    assert ask(episode(1)) == (["1"], 1), "begun again"
    assert ask(episode(5, episode_id="g")) == (["stop"], 1)
    assert ask(episode(5, episode_id="g")) == (["stop"], 5), "an instance ends with its episode"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("waits", "waits is an async function.*asyncio.run"),
        ("AsyncStep", "AsyncStep.step is an async function"),
        ("Nameless", "has no method step"),
        ("two_arguments", "two_arguments has the arguments .*, but it is called with one"),
        ("yields", "yields is a generator"),
        ("WantsSize", "must take no argument"),
        ("FAULTY", "is a str; name a function or a class"),
        ("missing", "has no missing"),
    ],
)
def test_what_is_no_environment_is_refused(name, words):
    with pytest.raises(UserError, match=words):
        load_environment(f"tests.environments.faulty:{name}", str(ROOT))


def test_an_environment_is_tried_before_the_run(child):
    message, trace = child.submit(refusal, "tests.environments.faulty:raises_on_nothing").result()
    assert "empty response to problem p7, it raised IndexError" in message
    assert "return episode.response[0]" in trace
