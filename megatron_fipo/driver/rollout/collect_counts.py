"""What happened to prompts and response tokens while one batch was collected."""

from dataclasses import dataclass, fields
from typing import Literal

from megatron_fipo.driver.all_wrong import WrongResponse
from megatron_fipo.errors import logs_place

Unused = Literal["all_right", "all_wrong", "failed", "unscored"]
"""Why a group was not used; names a field of `CollectCounts`."""


@dataclass
class CollectCounts:
    """Counts since the last `Collector.pop_batch`.

    `generated_tokens` + `carried_tokens` of the batch before
    = `used_tokens` + `filtered_tokens` + `dropped_tokens` + `carried_tokens`.
    """

    prompts: int = 0
    """Prompts started."""
    informative: int = 0
    """Finished groups whose responses differ in accuracy, or in reward (`rollout.filter_by`)."""
    all_right: int = 0
    """Filtered groups whose first response is right. With filter_by=reward all have the same reward."""
    all_wrong: int = 0
    failed: int = 0
    """Groups dropped because a response failed more often than `max_retries` allows; never scored."""
    unscored: int = 0
    """Groups dropped because a response could not be scored."""
    stale: int = 0
    """Groups dropped, finished or not, because the next update is more than `max_staleness` versions after
    their oldest token."""
    from_earlier: int = 0
    """Groups of this batch whose prompt was started before the last `pop_batch`."""
    waiting: int = 0
    """Informative groups buffered for later batches."""
    unfinished: int = 0
    """Groups being sampled or scored after this `pop_batch`."""
    generated_tokens: int = 0
    """Response tokens received from the engines."""
    used_tokens: int = 0
    """Of the groups of this batch."""
    filtered_tokens: int = 0
    """Of groups all right or all wrong."""
    dropped_tokens: int = 0
    """Of stale, failed and unscored groups, and with unfinished=drop of groups that were started but not needed."""
    carried_tokens: int = 0
    """Of waiting and unfinished groups, after this `pop_batch`."""
    unused_share: float = 0.0
    """Responses of informative groups that were dropped / all responses of informative groups, since the run
    began."""

    def count_dropped(self, why: Unused, tokens: int) -> None:
        """Count a group that is not used."""
        setattr(self, why, getattr(self, why) + 1)
        if why in ("failed", "unscored"):
            self.dropped_tokens += tokens
        else:
            self.filtered_tokens += tokens

    def __sub__(self, part: "CollectCounts") -> "CollectCounts":
        """These counts without `part` of them."""
        return CollectCounts(**{f.name: getattr(self, f.name) - getattr(part, f.name) for f in fields(self)})


def nothing_informative(counts: CollectCounts, example: WrongResponse | None, filter_by: str) -> str:
    """Why a collection ended without a group to train on, and the fix. `example` is shown if no response is right.

    `filter_by` is `rollout.filter_by`.
    """
    filtered = counts.all_right + counts.all_wrong
    if not filtered and counts.unscored:
        return (
            f"none of {counts.prompts} prompts could be scored or answered ({counts.unscored} not scored, "
            f"{counts.failed} failed), so there is nothing to train on: correct the reward function, whose first "
            "failure is reported above, or its limits reward.timeout_s and reward.memory_mb"
        )
    if not filtered and counts.failed:
        return f"the requests of all {counts.failed} prompts failed; see {logs_place()}"
    differing = (
        "responses with different rewards" if filter_by == "reward" else "both right and wrong answers"
    )
    found = (
        f"none of {counts.prompts} prompts got {differing} ({counts.all_right} all right, "
        f"{counts.all_wrong} all wrong, {counts.failed} failed, {counts.unscored} not scored, {counts.stale} too "
        "old), so there is nothing to train on"
    )
    fix = (
        "choose problems closer to the model's ability, or raise batch.responses_per_prompt or "
        "rollout.max_prompts"
    )
    if counts.all_wrong and not counts.all_right and example is not None:
        return f"{found}; {example}. Otherwise {fix}"
    return f"{found}: {fix}"
