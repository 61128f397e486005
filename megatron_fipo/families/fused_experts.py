"""Names of experts' weights: one tensor per expert, as published, or all experts of a layer in one (transformers 5).

    ...mlp.experts.{e}.gate_proj.weight [F, H], ...up_proj.weight [F, H]  <->  ...mlp.experts.gate_up_proj [E, 2F, H]
    ...mlp.experts.{e}.down_proj.weight [H, F]                            <->  ...mlp.experts.down_proj    [E, H, F]

The package uses the former everywhere. Readers of the latter separate them with `parts_of`: each part is a range of
rows of one expert, and contiguous in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = {".mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), ".mlp.experts.down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Part:
    """The tensor of one expert within a fused one."""

    name: str
    expert: int
    first_row: int
    rows: int
    """Rows `first_row` to `first_row + rows` (exclusive) of the fused tensor's second dimension."""


def parts_of(name: str, shape: Sequence[int]) -> Iterator[Part]:
    """The parts of a fused tensor [experts, rows, columns], expert by expert. None for any other tensor.

    Example: gate_up_proj [2, 6, 4] has, of each of 2 experts, gate_proj in rows 0 to 3 and up_proj in rows 3 to 6.
    """
    suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
    if suffix is None or len(shape) != 3 or shape[1] % len(_PARTS[suffix]):
        return
    prefix, projections = name.removesuffix(suffix), _PARTS[suffix]
    rows = shape[1] // len(projections)
    for expert in range(shape[0]):
        for index, projection in enumerate(projections):
            yield Part(f"{prefix}.mlp.experts.{expert}.{projection}.weight", expert, index * rows, rows)


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
