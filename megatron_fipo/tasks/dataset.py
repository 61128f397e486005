"""The order in which training takes its problems: seeded, endless, and resumable at any problem."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.task import Problem


def digest(*parts: object) -> bytes:
    """16 bytes that identify values by what they print as; the same on every machine."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def fingerprint(problems: Sequence[Problem]) -> str:
    """Identifies problems by their ids and rows: prompts and answers as they are stored.

    It does not depend on the tokenizer, its chat template or the date that a template prints.
    """
    return _joint_digest((problem.problem_id, problem.row_digest) for problem in problems)


def _by_prompts(problems: Sequence[Problem]) -> str:
    return _joint_digest((problem.problem_id, problem.prompt_text) for problem in problems)


def _joint_digest(parts: Iterable[tuple[str, str]]) -> str:
    joint = hashlib.blake2b(digest_size=16)
    for part in parts:
        joint.update(digest(*part))
    return joint.hexdigest()


class ProblemOrder(Protocol):
    """The problems of training, in an endless order: those of one set (`Dataset`) or of several (`mixture.Mixture`)."""

    @property
    def problems(self) -> Sequence[Problem]:
        """All of them, once each."""

    def fresh(self) -> "ProblemOrder":
        """The same order at its start."""

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""

    def put_back(self, count: int) -> None:
        """Undo the last `count` problems taken: the next `take` returns them again."""

    def state(self) -> dict[str, Any]:
        """The position as JSON values."""

    def load_state(self, state: Any) -> None:
        """Resume exactly at `state`. Raises `UserError` if it is of other problems, and `ValueError` if it is no state."""


class Dataset:
    """Problems in an order that depends on the seed and the epoch only; each epoch has a new order.

    The order is computed from a hash instead of a random generator, so it is the same on every machine and
    library version. Sets of one run have a `name`, which gives each its own order.
    """

    def __init__(self, problems: Sequence[Problem], seed: int, name: str = ""):
        if not problems:
            raise UserError("the training set has no problems; check data.train_path or data.train_size")
        self.problems = list(problems)
        self.seed = seed
        self.name = name
        self.epoch = 0
        self.position = 0
        self.fingerprint = fingerprint(self.problems)
        """Identifies the problems by content."""
        self._order = self._shuffled()

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def taken(self) -> int:
        """Problems taken so far."""
        return self.epoch * len(self.problems) + self.position

    def fresh(self) -> "Dataset":
        return Dataset(self.problems, self.seed, self.name)

    def _shuffled(self) -> list[int]:
        named = (self.name,) if self.name else ()
        return sorted(
            range(len(self.problems)), key=lambda index: digest(*named, self.seed, self.epoch, index)
        )

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems, across the end of an epoch if necessary."""
        taken: list[Problem] = []
        while len(taken) < count:
            if self.position == len(self.problems):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            end = min(self.position + count - len(taken), len(self.problems))
            taken += [self.problems[index] for index in self._order[self.position : end]]
            self.position = end
        return taken

    def put_back(self, count: int) -> None:
        """Undo the last `count` problems taken: the next `take` returns them again."""
        epoch, position = divmod(self.taken - count, len(self.problems))
        if count < 0 or epoch < 0:
            raise ValueError(
                f"{count} problems cannot be put back after {self.epoch} epochs and {self.position} problems"
            )
        if epoch != self.epoch:
            self.epoch = epoch
            self._order = self._shuffled()
        self.position = position

    def state(self) -> dict[str, Any]:
        """The position as JSON values: `epoch` and `position` in it.

        `seed` and `rows` identify the order and the problems that the position refers to.
        """
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "rows": self.fingerprint,
        }

    def load_state(self, state: Any) -> None:
        """Resume exactly at `state`.

        Raises `UserError` if it is of another seed or of other problems, and `ValueError` if it is no state.
        """
        if not isinstance(state, dict) or not {"seed", "epoch", "position"} <= state.keys():
            raise ValueError("the position in the data is missing")
        epoch, position = state["epoch"], state["position"]
        if not (type(epoch) is type(position) is int and epoch >= 0 and position >= 0):
            raise ValueError(f"the position in the data is epoch {epoch!r}, problem {position!r}")
        if state["seed"] != self.seed:
            raise UserError(
                f"the checkpoint's data order has seed {state['seed']} but this run has seed {self.seed}; "
                f"set seed={state['seed']}"
            )
        # Before 0.2 the state identified problems by their formatted prompts.
        same = (
            state["rows"] == self.fingerprint
            if "rows" in state
            else state.get("fingerprint") == _by_prompts(self.problems)
        )
        if not same:
            raise UserError(
                "the training set is not the one of the checkpoint, so the run cannot resume at its "
                "position; restore the data or start in a new run_dir"
            )
        if position > len(self.problems):
            raise ValueError(f"the position in the data is {position} of {len(self.problems)} problems")
        self.epoch, self.position = epoch, position
        self._order = self._shuffled()
