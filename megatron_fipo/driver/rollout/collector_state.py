"""What a collector saves in a checkpoint, as JSON values and the tokens of its groups."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from megatron_fipo.driver.rollout.collect_counts import CollectCounts, Unused
from megatron_fipo.driver.rollout.saved_groups import SavedGroup, natural, pack_groups, unpack_groups
from megatron_fipo.run_dir.loop_state import RolloutState
from megatron_fipo.tasks.task import Problem

_NATURAL = ("serial", "first_serial", "base", "informative", "informative_dropped")


@dataclass
class CollectorState:
    """The attributes of a paused `Collector` under their names."""

    dataset: dict[str, Any]
    """`Dataset.state`."""
    serial: int
    first_serial: int
    base: int
    filtered: dict[int, tuple[Unused, int]]
    informative: int
    informative_dropped: int
    counts: CollectCounts
    groups: list[SavedGroup]

    def pack(self) -> RolloutState:
        """The form in a checkpoint."""
        groups, tokens = pack_groups(self.groups)
        values = {
            "dataset": self.dataset,
            **{name: getattr(self, name) for name in _NATURAL},
            "filtered": {str(serial): list(why) for serial, why in self.filtered.items()},
            "counts": asdict(self.counts),
            "groups": groups,
        }
        return RolloutState(values, tokens)

    @classmethod
    def unpack(cls, saved: RolloutState, problems: Mapping[str, Problem]) -> "CollectorState":
        """The inverse of `pack`. Raises `ValueError`, with the reason, for values that `pack` does not give."""
        values = saved.values
        try:
            numbers = {name: natural(values, name) for name in _NATURAL}
            groups = unpack_groups(values["groups"], saved.tokens, problems)
            serials = [group.serial for group, _ in groups]
            if len(set(serials)) < len(serials) or max(serials, default=-1) >= numbers["serial"]:
                raise ValueError("serials of groups occur twice or are not below that of the next")
            return cls(
                dataset=dict(values["dataset"]),
                filtered=dict(map(_filtered, values["filtered"].items())),
                counts=_counts(values["counts"]),
                groups=groups,
                **numbers,
            )
        except KeyError as error:
            raise ValueError(f"{error.args[0]!r} is missing") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from error


def _filtered(item: tuple[str, list[Any]]) -> tuple[int, tuple[Unused, int]]:
    serial, (why, tokens) = item
    if why not in get_args(Unused) or type(tokens) is not int:
        raise ValueError(f"the reason why group {serial} was not used is {[why, tokens]}")
    return int(serial), (why, tokens)


def _counts(values: Mapping[str, Any]) -> CollectCounts:
    values = {"unscored": 0, **values}  # versions before 0.2 did not save it
    for field in fields(CollectCounts):
        allowed = (int, float) if field.type is float else (int,)
        if type(values[field.name]) not in allowed:
            raise ValueError(f"counts: {field.name} is {values[field.name]!r}")
    return CollectCounts(**values)
