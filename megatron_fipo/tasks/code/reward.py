"""The reward `code`: the last Python block of a response, run on the tests of its problem."""

import contextlib
import re
import time
from dataclasses import dataclass

from megatron_fipo.config import RewardConfig
from megatron_fipo.tasks.code.cases import Case, CaseError, read_cases
from megatron_fipo.tasks.code.sandbox import Limits, Run, Sandbox
from megatron_fipo.tasks.task import NO_ANSWER, Completion, Problem, Reward, Score, UnavailableError

TESTS_SHARE = 0.8
"""Of `reward.timeout_s`, for the tests of one response together."""
WALL_FACTOR = 2.0
"""Wall-clock time of a test, relative to its processor time."""
_FENCE = re.compile(r"\s{0,3}```\s*([A-Za-z0-9+#_-]*)")
_PYTHON = ("python", "python3", "py")


def last_python_block(text: str) -> str | None:
    """The content of the last complete fenced block marked as Python, or if there is none, of the last without a language."""
    blocks: dict[bool, str] = {}
    language, lines = None, list[str]()
    for line in text.splitlines():
        fence = _FENCE.match(line)
        if fence is None:
            lines.append(line)
        elif language is None:
            language, lines = fence[1].lower(), []
        else:
            if language in _PYTHON or not language:
                blocks[bool(language)] = "\n".join(lines) + "\n"
            language = None
    return blocks.get(True, blocks.get(False))


def code_obstacle(problem: Problem) -> str | None:
    """Why the ground truth has no tests that an answer can pass."""
    try:
        read_cases(problem.ground_truth)
    except CaseError as error:
        return str(error)
    return None


@dataclass
class CodeTests:
    """Scores responses by the tests of their problems. Owns the sandbox, which starts with the first response."""

    settings: RewardConfig

    def __post_init__(self) -> None:
        self._sandbox = Sandbox(self.settings.code.modules)

    def check(self) -> None:
        """Start the sandbox. Raises `UserError` if this machine cannot confine answers."""
        self._sandbox.check()

    @property
    def process_id(self) -> int | None:
        """Of the sandbox's main process; None if none runs."""
        return self._sandbox.process_id

    def close(self) -> None:
        """End the sandbox."""
        self._sandbox.close()

    def score(self, completion: Completion) -> Score:
        """1 if all tests pass, else 0 or with `partial` their share; `accuracy` is 1 if all pass."""
        cases = read_cases(completion.problem.ground_truth)
        source = last_python_block(completion.text)
        passed, timed_out = (0, False) if source is None else self._passed(source, cases)
        correct = float(passed == len(cases))
        return Score(
            reward=passed / len(cases) if self.settings.code.partial else correct,
            accuracy=correct,
            answer=NO_ANSWER if source is None else source,
            extra={"tests": len(cases), "tests_passed": passed, "timed_out": float(timed_out)},
        )

    def _passed(self, source: str, cases: tuple[Case, ...]) -> tuple[int, bool]:
        """The number of tests that pass, and whether one took too long. Without `partial` it ends at the first that fails."""
        deadline = time.monotonic() + TESTS_SHARE * self.settings.timeout_s
        passed, timed_out = 0, False
        for case in cases:
            left = deadline - time.monotonic()
            run = self._run(source, case, left) if left > 0 else Run("time", b"", 0.0)
            timed_out |= run.end == "time"
            if run.end == "finished" and case.passed(run.output):
                passed += 1
            elif not self.settings.code.partial:
                break
        return passed, timed_out

    def _run(self, source: str, case: Case, left: float) -> Run:
        code = self.settings.code
        limits = Limits(
            cpu_s=code.test_timeout_s,
            wall_s=min(WALL_FACTOR * code.test_timeout_s, left),
            memory_mb=code.memory_mb,
            output_bytes=case.output_bytes,
        )
        with contextlib.suppress(OSError, EOFError):
            return self._sandbox.run(source, case.call, case.given, limits)
        try:  # its main process is lost, for example by the kernel's choice when memory is short
            return self._sandbox.run(source, case.call, case.given, limits)
        except (OSError, EOFError) as error:
            raise UnavailableError("the sandbox ended twice") from error


def code_reward(settings: RewardConfig) -> Reward:
    """The reward `code`."""
    tests = CodeTests(settings)
    return Reward(tests.score, obstacle=code_obstacle, prepare=tests.check, reads_columns=False)
