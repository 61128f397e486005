"""A call of the user's code in a scorer or an environment worker: its result, or why there is none."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from megatron_fipo.hooks import own_trace
from megatron_fipo.scorer.limits import TimeLimitError
from megatron_fipo.scorer.protocol import Failure, FailureKind
from megatron_fipo.scorer.result import UnusableResultError, shown_error
from megatron_fipo.tasks.task import UnavailableError

Result = TypeVar("Result")


@dataclass(frozen=True)
class UserCall:
    """What is called, as messages name it: `the reward function f` took more than its limit `for response 1 of 2`."""

    subject: str
    place: str
    time_limit: str
    """The setting with its value, as `reward.timeout_s = 10 s`."""
    memory_limit: str

    def result_of(self, function: Callable[[], Result]) -> Result | Failure:
        """What `function` returns, or the failure that it raised as an error of any kind."""
        try:
            return function()
        except TimeLimitError:
            return self._failure(FailureKind.TIME, f"took more than {self.time_limit}")
        except MemoryError:
            return self._failure(FailureKind.MEMORY, f"needed more than {self.memory_limit}")
        except UnusableResultError as error:
            return self._failure(FailureKind.RESULT, str(error))
        except UnavailableError as error:
            return self._failure(FailureKind.UNAVAILABLE, f"got no answer ({shown_error(error)})")
        except BaseException as error:  # the code may raise SystemExit or KeyboardInterrupt
            return self._failure(FailureKind.RAISED, f"raised {shown_error(error)}", own_trace(error))

    def _failure(self, kind: FailureKind, what: str, trace: str = "") -> Failure:
        return Failure(kind, f"{self.subject} {what} {self.place}", trace)
