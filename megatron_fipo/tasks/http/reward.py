"""The reward `http`: a server scores the responses to a problem. Its failures never become scores."""

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_fipo.config import RewardConfig
from megatron_fipo.config.judge_rules import REQUESTS_SHARE
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.http.client import AttemptError, Client
from megatron_fipo.tasks.http.messages import InvalidAnswerError, read_scores, request_body
from megatron_fipo.tasks.task import Completion, Reward, Score, UnavailableError


class Judge:
    """Asks the server, and repeats what fails."""

    def __init__(self, settings: RewardConfig, random_share: Callable[[], float] = random.random) -> None:
        """`random_share` gives numbers from 0 to 1, for the waits."""
        self._settings = settings
        self._share = random_share
        self._client: Client | None = None
        self._retries = 0
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Read the token and make the client, before the first scores. Raises `UserError` if it cannot be used, without showing it."""
        self._client = Client(self._settings.http.url or "", self._token())

    def score_group(self, completions: Sequence[Completion]) -> list[float | Score]:
        """The scores of the responses to one problem, in order. Raises `UnavailableError`."""
        http = self._settings.http
        deadline = time.monotonic() + REQUESTS_SHARE * self._settings.timeout_s * len(completions)
        if http.batch or len(completions) == 1:
            return self._ask(completions, deadline)
        with ThreadPoolExecutor(min(http.concurrency, len(completions))) as threads:
            asked = [threads.submit(self._ask, [completion], deadline) for completion in completions]
            try:
                return [score for future in asked for score in future.result()]
            finally:
                for future in asked:
                    future.cancel()

    def take_retries(self) -> int:
        """Requests sent again since the last call."""
        with self._lock:
            retries, self._retries = self._retries, 0
        return retries

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()

    def _token(self) -> str | None:
        name = self._settings.http.token_variable
        if name is None:
            return None
        token = os.environ.get(name)
        if not token:
            raise UserError(
                f"reward.http.token_variable={name} is not set in the environment of a scorer; set it where Ray starts on "
                "each node"
            )
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise UserError(
                f"the value of {name} (reward.http.token_variable) is no token: it has blanks or other characters"
            )
        return token

    def _ask(self, completions: Sequence[Completion], deadline: float) -> list[float | Score]:
        assert self._client is not None, "prepare() makes it"
        http = self._settings.http
        body = request_body(completions)
        attempt = 0
        while True:
            attempt += 1
            left = deadline - time.monotonic()
            try:
                return read_scores(
                    self._client.post(body, max(0.001, min(http.timeout_s, left))), len(completions)
                )
            except AttemptError as error:
                reason, again, asked_s = str(error), error.again, error.wait_s
            except InvalidAnswerError as error:
                reason, again, asked_s = f"its answer {error}", True, None
            wait_s = self._share() * http.backoff_s * 2 ** (attempt - 1) if asked_s is None else asked_s
            if not again or attempt > http.max_retries or time.monotonic() + wait_s >= deadline:
                late = f"; it asks to wait {asked_s:g} s" if asked_s is not None else ""
                times = f"{attempt} times" if attempt > 1 else "once"
                raise UnavailableError(f"the judge was asked {times}: {reason}{late}")
            with self._lock:
                self._retries += 1
            time.sleep(wait_s)


def http_reward(settings: RewardConfig) -> Reward:
    """The reward `http`."""
    judge = Judge(settings)
    return Reward(None, score_group=judge.score_group, prepare=judge.prepare, take_retries=judge.take_retries)
