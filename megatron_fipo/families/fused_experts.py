"""Names of experts' weights: one tensor per expert, as published, or all experts of a layer in one (transformers 5).

    ...mlp.experts.{e}.gate_proj.weight [F, H], ...up_proj.weight [F, H]  <->  ...mlp.experts.gate_up_proj [E, 2F, H]
    ...mlp.experts.{e}.down_proj.weight [H, F]                            <->  ...mlp.experts.down_proj    [E, H, F]

The package uses the former everywhere. Readers of the latter separate them with `parts_of`: each part is a range of
rows of one expert, and contiguous in memory.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from megatron_fipo.errors import listed

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = {".mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), ".mlp.experts.down_proj": ("down_proj",)}
_NUMBERED = re.compile(r"(?P<before>.*\.experts\.)(?P<expert>0|[1-9]\d*)(?P<after>\..*)")


@dataclass(frozen=True)
class Part:
    """The tensor of one expert within a fused one."""

    name: str
    expert: int
    first_row: int
    rows: int
    """Rows `first_row` to `first_row + rows` (exclusive) of the fused tensor's second dimension."""


def is_fused(name: str) -> bool:
    """Whether a tensor of this name has all experts of a layer."""
    return name.endswith(tuple(_PARTS))


def parts_of(name: str, shape: Sequence[int]) -> Iterator[Part]:
    """The parts of a fused tensor [experts, rows, columns], in the order of its elements. None for any other tensor.

    Example: gate_up_proj [2, 6, 4] has, of each of 2 experts, gate_proj in rows 0 to 3 and up_proj in rows 3 to 6.
    """
    suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
    if suffix is None or len(shape) != 3 or shape[1] % len(_PARTS[suffix]):
        return
    rows = shape[1] // len(_PARTS[suffix])
    for expert in range(shape[0]):
        for index, part in enumerate(_names(name, suffix, expert)):
            yield Part(part, expert, index * rows, rows)


def separate(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The same weights with views of each expert in the place of fused tensors."""
    separated: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        views = {
            part.name: tensor[part.expert, part.first_row : part.first_row + part.rows]
            for part in parts_of(name, tensor.shape)
        }
        separated |= views or {name: tensor}
    return separated


def fused_shape(name: str, shapes: Mapping[str, tuple[int, ...]], experts: int) -> tuple[int, ...] | None:
    """The shape of the fused tensor `name` in a model with tensors of `shapes`; None if the layer has no experts."""
    suffix = next(suffix for suffix in _PARTS if name.endswith(suffix))
    parts = [shapes.get(part) for part in _names(name, suffix, expert=0)]
    if None in parts:
        return None
    return (experts, sum(shape[0] for shape in parts if shape), *(parts[0] or ())[1:])


def compact(names: Iterable[str]) -> list[str]:
    """Names for a message, sorted, those of several experts in one.

    Example: `model.layers.0.mlp.experts.{0-63, 65}.up_proj.weight`.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = _NUMBERED.fullmatch(name)
        numbers.setdefault((found["before"], found["after"]) if found else (name, ""), []).append(
            int(found["expert"]) if found else -1
        )
    return sorted(
        f"{before}{_ranges(experts) if experts[0] >= 0 else ''}{after}"
        for (before, after), experts in numbers.items()
    )


def _names(fused: str, suffix: str, expert: int) -> list[str]:
    """The names of one expert's tensors in a fused tensor."""
    prefix = fused.removesuffix(suffix)
    return [f"{prefix}.mlp.experts.{expert}.{part}.weight" for part in _PARTS[suffix]]


def _ranges(experts: Sequence[int]) -> str:
    """`3`, `{0-127}`, or `{0-3, 7, 9 and 20 more}`."""
    if len(experts) == 1:
        return str(experts[0])
    runs = []
    for _, run in groupby(enumerate(sorted(experts)), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        runs.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return "{" + listed(runs, 3) + "}"
