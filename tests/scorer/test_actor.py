"""A scorer's answers, and the limits of one response, in a process of its own."""

import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import psutil
import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.driver.tokenizer import checked_tokenizer
from megatron_fipo.errors import UserError
from megatron_fipo.scorer.actor import ScorerActor
from megatron_fipo.scorer.limits import TimeLimitError, within
from megatron_fipo.scorer.protocol import Failure, FailureKind, ScoreRequest, ScorerSettings
from megatron_fipo.tasks.rewards import REWARDS
from megatron_fipo.tasks.task import Score
from tests.completions import scored
from tests.scorer.faulty import GOOD, SETTINGS, FaultyScorer
from tests.scorer.requests import request

_actor: dict[tuple[type, str], ScorerActor] = {}


def answer(actor_class: type, settings: ScorerSettings, sent: ScoreRequest) -> list[Score] | Failure:
    """Runs in the child process, in its main thread, where an actor's methods run."""
    key = (actor_class, repr(settings))
    if key not in _actor:
        _actor[key] = actor_class(settings)
        _actor[key].ready()
    return _actor[key].score(sent)


def torch_is_loaded() -> bool:
    return sys.modules.get("torch") is not None


def timer_after(seconds: float) -> tuple[float, float]:
    """What is left of the timer after a call that took too long."""
    with pytest.raises(TimeLimitError):
        within(seconds, lambda: time.sleep(0.01))
    return signal.getitimer(signal.ITIMER_REAL)


Ask = Callable[..., Any]
TOO_LONG = ("own timer", "slow", "loop", "swallow")


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    """One process for all tests: a failure leaves nothing behind in it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(scope="module")
def ask(child: ProcessPoolExecutor) -> Ask:
    def ask(behaviour: str, responses: int = 1) -> list[Score] | Failure:
        """Only a behaviour that takes too long meets the time limit, also on a slow machine."""
        settings = (
            SETTINGS
            if behaviour in TOO_LONG
            else replace(SETTINGS, reward=replace(SETTINGS.reward, timeout_s=60.0))
        )
        return child.submit(answer, FaultyScorer, settings, request(7, responses, behaviour)).result()

    return ask


@pytest.mark.parametrize(
    ("behaviour", "kind", "words"),
    [
        ("fraction", FailureKind.RESULT, "gave the accuracy 0.5 (float), not 0 or 1"),
        ("nan", FailureKind.RESULT, "gave the reward nan (float), not a finite number"),
        ("infinite", FailureKind.RESULT, "gave the reward inf (float)"),
        ("text", FailureKind.RESULT, "gave the reward '1.0' (str)"),
        ("boolean", FailureKind.RESULT, "gave the accuracy True (bool)"),
        ("no answer", FailureKind.RESULT, "gave the answer None (NoneType), not valid text"),
        ("half a character", FailureKind.RESULT, r"gave the answer '\ud83d' (str)"),
        ("no JSON", FailureKind.RESULT, "as extra, not an object of JSON values"),
        ("nan in extra", FailureKind.RESULT, "gave {'value': nan} (dict) as extra"),
        ("nested too deep", FailureKind.RESULT, "JSON values nested at most 32 deep"),
        ("nested far too deep", FailureKind.RESULT, "gave an object (dict) as extra"),
        ("too long", FailureKind.RESULT, "gave answer and extra of 1,048,590 characters, above 1,048,576"),
        ("huge number", FailureKind.RESULT, "000... (int), not a finite number"),
        ("type like str", FailureKind.RESULT, "gave the answer np.str_('3') (str_), not valid text"),
        ("none", FailureKind.RESULT, "returned None (NoneType), not a finite number or a Score"),
        ("true", FailureKind.RESULT, "returned True (bool), not a finite number or a Score"),
        ("infinity", FailureKind.RESULT, "returned inf (float), not a finite number or a Score"),
        ("unavailable", FailureKind.UNAVAILABLE, "got no answer (UnavailableError (the judge is away))"),
        ("raise", FailureKind.RAISED, "raised KeyError ('missing')"),
        ("exit", FailureKind.RAISED, "raised SystemExit (3)"),
        ("interrupt", FailureKind.RAISED, "raised KeyboardInterrupt (KeyboardInterrupt)"),
        ("base exception", FailureKind.RAISED, "raised BaseException (reason)"),
        ("unreadable score", FailureKind.RAISED, "raised ValueError (no reward)"),
        ("unreadable error", FailureKind.RAISED, "raised Unreadable (without a message)"),
        ("long error", FailureKind.RAISED, r"raised ValueError (\ud83dxxx"),
        ("own timer", FailureKind.TIME, "took more than reward.timeout_s = 0.5 s"),
        ("slow", FailureKind.TIME, "took more than reward.timeout_s = 0.5 s"),
        ("loop", FailureKind.TIME, "took more than"),
        ("swallow", FailureKind.TIME, "took more than"),
        ("memory", FailureKind.MEMORY, "needed more than reward.memory_mb = 300 MB"),
    ],
)
def test_a_failure_names_reward_function_problem_and_response(ask, behaviour, kind, words):
    failure = ask(behaviour, 3)
    assert failure.kind == kind
    assert words in failure.reason
    assert failure.reason.startswith("the reward function faulty ")
    assert failure.reason.endswith("for response 1 of 3 to problem p7")
    assert len(failure.reason.encode()) < 400
    assert ask("good") == [GOOD], "the limits of the next response are its own"


def test_a_failure_counts_responses_from_one(ask):
    assert ask("raise at every second call", 3).reason.endswith(" for response 2 of 3 to problem p7")


def test_scores_have_the_order_of_the_responses_and_plain_numbers(ask):
    assert ask("good", 4) == [GOOD] * 4
    (score,) = ask("whole numbers")
    assert (type(score.reward), type(score.accuracy)) == (float, float)
    (score,) = ask("types like float and dict")
    assert score == Score(-1.0, 0.0, "", {"a": 1.0})
    types = type(score.reward), type(score.accuracy), type(score.extra), type(score.extra["a"])
    assert types == (float, float, dict, float)


def test_extra_that_can_be_saved_with_a_run_is_accepted(ask):
    (score,) = ask("nested")
    json.dumps(asdict(score))


def test_a_process_that_a_reward_function_forked_ends(ask):
    (score,) = ask("fork")
    assert score.extra["child"] > 0
    while psutil.pid_exists(score.extra["child"]):  # as a zombie until its parent ends it
        if psutil.Process(score.extra["child"]).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.01)


@pytest.mark.parametrize("seconds", [1e-9, 1e-6])
def test_a_limit_that_ends_at_once_leaves_no_timer(child, seconds):
    assert child.submit(timer_after, seconds).result() == (0.0, 0.0)


def test_a_real_reward_scores_the_decoded_text_as_in_one_process(child):
    tokenizer = checked_tokenizer(SETTINGS.model_path, False)
    texts = ["#3*7+5", "3+7#3*7+5", "#3+7+5", "", "#3*7+5<eos>"]
    problem_of = request(0, [tokenizer.encode(text) for text in texts], truth="3,7,5=26", reward="countdown")
    scores = child.submit(answer, ScorerActor, replace(SETTINGS, rewards=("countdown",)), problem_of).result()
    reward = REWARDS["countdown"](RewardConfig()).score
    expected = [scored(reward, text.removesuffix("<eos>"), problem_of.problem) for text in texts]
    assert scores == expected
    assert [score.accuracy for score in scores] == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_a_scorer_does_not_load_torch(child):
    child.submit(answer, FaultyScorer, SETTINGS, request(1, truth="good")).result()
    assert not child.submit(torch_is_loaded).result()


def test_a_number_alone_is_a_reward_and_right_if_above_zero(ask):
    assert ask("number") == [Score(0.25, 1.0)]
    assert ask("negative number") == [Score(-1.0, 0.0)]


def test_a_reward_by_import_path_that_cannot_be_loaded_is_an_error(tmp_path):
    settings = replace(SETTINGS, rewards=("no.such.module:score",), hook_folder=str(tmp_path))
    with pytest.raises(UserError, match="there is no module no in"):
        ScorerActor(settings).ready()
