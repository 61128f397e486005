"""One decoding step as a function of fixed tensors: no shape, no address and no decision depends on a value.

So the step can be a CUDA graph, and the tests can run it on the meta device, where tensors have no values.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_fipo.engine.decoding.cache import KeyValues, Layout, StepCache, visible
from megatron_fipo.engine.decoding.rows import Row
from megatron_fipo.engine.decoding.sampling import sample_fast
from megatron_fipo.engine.decoding.versions import cache_argument
from megatron_fipo.engine.protocol import SamplingParams

STEPS = 8
"""Steps whose tokens the host reads at once. A row's end is noticed at most twice as many steps late: the host reads those of
one chunk while the device runs the next."""


class State:
    """Everything that a step reads and writes, for up to `rows` rows of up to `length` tokens.

    A row that has ended is decoded until the host removes it: its position stops at its last one, so it writes into its own
    columns only.
    """

    def __init__(self, layout: Layout, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length = rows, length
        self.stored = KeyValues(layout, rows, length, device)
        self.slots = torch.zeros(4, rows, dtype=torch.long, device=device)
        """Of each row: next input token, its position, the last position, and what to add to a position for its uniform
        number."""
        self.uniforms = torch.zeros(rows * length, dtype=torch.float64, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        """Of the chunk."""
        self.tokens = torch.zeros(STEPS, rows, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(STEPS, rows, dtype=torch.float32, device=device)

    @staticmethod
    def bytes_per_row(layout: Layout, length: int) -> int:
        return length * (layout.bytes_per_token + 8) + STEPS * 12 + 4 * 8

    def load(self, rows: Sequence[Row]) -> None:
        """Put each row before its first step, except for the KV cache, which must have all but the last token of its context.

        One copy to the device for the slots and one for the uniform numbers.
        """
        width = max(len(row.uniforms) for row in rows)
        uniforms = np.zeros((len(rows), width))
        slots = np.zeros((4, self.rows), dtype=np.int64)
        for index, row in enumerate(rows):
            uniforms[index, : len(row.uniforms)] = row.uniforms
            first = len(row.context) - 1
            slots[:, index] = (
                row.context[-1],
                first,
                first + len(row.uniforms) - 1,
                index * width - first,
            )
        self.slots.copy_(torch.from_numpy(slots))
        self.uniforms[: uniforms.size].copy_(torch.from_numpy(uniforms.reshape(-1)))

    def select(self, indices: Sequence[int], length: int) -> None:
        """Keep these rows, in the first places, with their first `length` columns. Waits for nothing on the host."""
        index = torch.tensor(indices, device=self.slots.device)
        self.slots[:, : len(indices)] = self.slots[:, index]
        self.stored.select(index, length)


class Step:
    """A model's decoding step."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache_argument = cache_argument(model)

    def __call__(self, state: State, rows: int, length: int, sampling: SamplingParams) -> None:
        """Decode one token of each of the first `rows` rows over the first `length` columns.

        Rows that have not ended must have their position below `length`. Memory: logits [rows, V] and, in float32, their
        log-probs and probabilities.
        """
        token, position, last, offset = state.slots[:, :rows]
        column = position.clamp(max=length - 1)
        logits = self._model(
            input_ids=token[:, None],
            attention_mask=visible(column, length, self._model.dtype),
            position_ids=column[:, None],
            use_cache=True,
            **{self._cache_argument: StepCache(state.stored, column, length)},
        ).logits[:, -1]
        tokens, log_probs = sample_fast(logits, state.uniforms[offset + position], sampling)
        state.tokens[:, :rows].index_copy_(0, state.step, tokens[None])
        state.log_probs[:, :rows].index_copy_(0, state.step, log_probs[None])
        token.copy_(tokens)
        position.copy_(torch.minimum(position + 1, last))
        state.step.add_(1)
