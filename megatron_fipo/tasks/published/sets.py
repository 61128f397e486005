"""The data sets that `megatron-fipo data` knows: where they are published, and how to tell that a file is one of them."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_fipo.tasks.dapo_math import dapo_math_obstacle
from megatron_fipo.tasks.published.forms import aime_answer


@dataclass(frozen=True)
class PublishedSet:
    name: str
    title: str
    repository: str
    """On the Hugging Face hub."""
    file: str
    """In the repository."""
    data_source: str
    """What the rows get as `data_source`."""
    distinct: range
    """Numbers of different prompts that the published file may have."""
    known: str
    """What is known of that number, for messages."""
    answer: Callable[[str], str | None]
    """The answer as it is stored; None if it is none."""
    answers: str
    """What an answer must be, for messages."""
    mark: re.Pattern[str]
    """Found in the text of one of the problems, and in no other of these sets."""

    @property
    def address(self) -> str:
        return f"https://huggingface.co/datasets/{self.repository}/resolve/main/{self.file}"


def _scorable(text: str) -> str | None:
    return text if dapo_math_obstacle(text) is None else None


_AIME_ANSWERS = "an integer from 0 to 999"
SETS = {
    published.name: published
    for published in (
        PublishedSet(
            "dapo",
            "DAPO-Math-17k",
            "BytedTsinghua-SIA/DAPO-Math-17k",
            "data/dapo-math-17k.parquet",
            "math_dapo",
            range(17_000, 18_000),
            "about 17 thousand different prompts (17,398 in 2025), each about 100 times",
            _scorable,
            "one that reward.name=dapo_math can score",
            re.compile(""),
        ),
        PublishedSet(
            "aime24",
            "AIME 2024",
            "BytedTsinghua-SIA/AIME-2024",
            "data/aime-2024.parquet",
            "aime24",
            range(30, 31),
            "30 problems",
            aime_answer,
            _AIME_ANSWERS,
            re.compile(r"Every morning,? Aya"),
        ),
        PublishedSet(
            "aime25",
            "AIME 2025",
            "math-ai/aime25",
            "test.jsonl",
            "aime25",
            range(30, 31),
            "30 problems (AIME I and II)",
            aime_answer,
            _AIME_ANSWERS,
            re.compile(r"divisor of \$?97_\{?b"),
        ),
    )
}
