"""Decoding with fixed tensors, in chunks of steps: for GPUs, where launching an operation takes longer than the operation.

The host launches a chunk, then reads the tokens of the one before and ends rows while the device computes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from megatron_fipo.engine.decoding.cache import Layout, use_attention
from megatron_fipo.engine.decoding.graphs import Runner
from megatron_fipo.engine.decoding.rows import Append, Counts, Row
from megatron_fipo.engine.decoding.sizes import LEAST_LENGTH, LEAST_ROWS, largest_within, size_class
from megatron_fipo.engine.decoding.step import STEPS, State, Step
from megatron_fipo.engine.decoding.versions import cache_argument
from megatron_fipo.engine.protocol import SamplingParams
from megatron_fipo.errors import UserError

PREFILL_TOKENS = 32_768
"""Context tokens computed together, padding included; a longer context is computed alone."""
SHARE = 0.8
"""Of the free memory, for what is kept between steps and the logits. The rest is for a step's and the prefill's activations."""
SAMPLING_BYTES = 64
"""Per row and token of the vocabulary, at most: logits, log-probs, and sorted probabilities with their indices and sums."""
REHEARSED = (
    SamplingParams(1.0, 1.0, 1),
    SamplingParams(0.7, 0.9, 1, top_k=2, min_p=0.1),
    SamplingParams(0.0, 1.0, 1),
)

Slots = list[tuple[int, Row]]
"""Rows with their places in the state."""


class StaticDecoder:
    """A `Decoder` whose steps read and write fixed memory, so that they can be CUDA graphs.

    Keeps its state between calls, as large as the largest call needed. Changes the model's attention function.
    """

    def __init__(
        self,
        model: Any,
        counts: Counts,
        aborted: Callable[[], bool],
        runner: Runner,
        free_bytes: Callable[[], int] = lambda: 2**60,
    ) -> None:
        """`free_bytes` is the device memory that may be allocated. ValueError if the model's cache is of another kind."""
        self._model = model
        self._counts = counts
        self._aborted = aborted
        self._runner = runner
        self._free_bytes = free_bytes
        use_attention(model)
        with torch.inference_mode():
            self._layout = Layout.of(model)
        self._step = Step(model)
        self._state: State | None = None

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Run each kind of step twice, of which the second time as in every later call. Raises whatever the model raises."""
        state = State(self._layout, LEAST_ROWS, LEAST_LENGTH, self._model.device)
        for sampling in REHEARSED:
            for _ in range(2):
                self._run_steps(state, LEAST_ROWS, LEAST_LENGTH, 1, sampling)
        self._runner.release()

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row], sampling: SamplingParams, append: Append) -> None:
        """An abort takes effect between two chunks of steps; tokens that are sampled by then are kept.

        Rows whose KV cache does not fit are decoded after the others. UserError if there is no memory for one row.
        """
        longest = max(len(row.context) + len(row.uniforms) for row in rows)
        state = self._fit(len(rows), size_class(longest, LEAST_LENGTH))
        for first in range(0, len(rows), state.rows):
            if self._aborted():
                return
            self._decode_together(rows[first : first + state.rows], state, sampling, append)

    def release(self) -> None:
        """Free the state and the graphs that point to it."""
        self._state = None
        self._runner.release()

    # -- memory ----------------------------------------------------------------------------------------------

    def _fit(self, rows: int, length: int) -> State:
        """A state for so many rows, or for as many as fit, of this length."""
        held, needed = self._state, size_class(rows, LEAST_ROWS)
        wanted = max(needed, held.rows if held else 0), max(length, held.length if held else 0)
        if self._most_rows(wanted[1]) < wanted[0]:
            wanted = needed, length
        fitting = min(wanted[0], largest_within(self._most_rows(wanted[1]), LEAST_ROWS))
        if fitting < 1:
            raise UserError(
                f"the KV cache of one response of {length} tokens takes {self._bytes_per_row(length) / 2**30:.1f} GiB, more than "
                "the rollout engine's device has free; lower rollout.max_response_length or rollout.max_prompt_length"
            )
        if held and held.rows >= fitting and held.length >= wanted[1]:
            return held
        del held  # its memory is needed
        self.release()
        if fitting < rows:
            print(
                f"rollout engine: device memory is enough for {fitting} of {rows} responses of up to {length} tokens at a time; "
                "the others are decoded after them",
                flush=True,
            )
        self._state = State(self._layout, fitting, wanted[1], self._model.device)
        return self._state

    def _most_rows(self, length: int) -> int:
        held = self._state
        kept = held.rows * State.bytes_per_row(self._layout, held.length) if held else 0
        return int(SHARE * (self._free_bytes() + kept)) // self._bytes_per_row(length)

    def _bytes_per_row(self, length: int) -> int:
        return (
            State.bytes_per_row(self._layout, length)
            + SAMPLING_BYTES * self._model.get_output_embeddings().weight.shape[0]
        )

    # -- the loop --------------------------------------------------------------------------------------------

    def _decode_together(
        self, rows: Sequence[Row], state: State, sampling: SamplingParams, append: Append
    ) -> None:
        self._prefill(rows, state)
        state.load(rows)
        running: Slots = list(enumerate(rows))
        width = min(size_class(len(rows), LEAST_ROWS), state.rows)
        launched: deque[_Chunk] = deque()
        started = 0
        while running and not self._aborted():
            steps = min(STEPS, max(len(row.uniforms) for _, row in running) - started)
            if steps > 0:
                length = _columns(running, started + steps, state.length)
                self._run_steps(state, width, length, steps, sampling)
                launched.append(_Chunk.of(state, running, steps))
                started += steps
            if steps <= 0 or len(launched) > 1:
                running = self._take(launched.popleft(), running, append)
            # Moving the rows costs about as much as two steps, a new size a graph: so only when it halves the batch.
            smaller = min(size_class(len(running), LEAST_ROWS), state.rows)
            if running and 2 * smaller <= width:
                state.select([slot for slot, _ in running], _columns(running, started, state.length))
                running, width = [(slot, row) for slot, (_, row) in enumerate(running)], smaller
        if running:
            for chunk in launched:
                self._take(chunk, running, append)

    def _run_steps(self, state: State, width: int, length: int, steps: int, sampling: SamplingParams) -> None:
        state.step.zero_()
        key = (width, length, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
        for _ in range(steps):
            self._runner.run(key, lambda: self._step(state, width, length, sampling))

    def _take(self, chunk: "_Chunk", running: Slots, append: Append) -> Slots:
        """Add a chunk's tokens to its rows; those of `running` that have not ended."""
        tokens, log_probs = chunk.read()
        live = [(slot, row) for slot, row in chunk.slots if not row.finished]
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if not live:
                break
            self._counts.running = len(live)
            survivors = append(
                [row for _, row in live],
                [token[slot] for slot, _ in live],
                [log_prob[slot] for slot, _ in live],
            )
            live = [live[index] for index in survivors]
        return [(slot, row) for slot, row in running if not row.finished]

    # -- prefill ---------------------------------------------------------------------------------------------

    def _prefill(self, rows: Sequence[Row], state: State) -> None:
        """Fill the KV cache with each row's context but its last token, which is the first step's; distinct contexts once.

        Padded on the right, where causal attention does not see it: no mask, so kernels without one serve.
        """
        self._counts.add_contexts(rows)
        state.stored.clear()
        users: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            users.setdefault(row.context, []).append(index)
        for contexts in _parts(sorted(users, key=len, reverse=True)):
            filled = self._fill(contexts)
            places = [(row, source) for source, context in enumerate(contexts) for row in users[context]]
            targets, sources = torch.tensor(places, device=self._model.device).T
            state.stored.fill(targets, filled, sources)

    def _fill(self, contexts: Sequence[tuple[int, ...]]) -> DynamicCache:
        ids = torch.zeros(len(contexts), len(contexts[0]) - 1, dtype=torch.long)
        for index, context in enumerate(contexts):
            ids[index, : len(context) - 1] = torch.tensor(context[:-1])
        cache = DynamicCache(config=self._model.config)
        self._model(
            input_ids=ids.to(self._model.device),
            position_ids=torch.arange(ids.shape[1], device=self._model.device)[None],
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(self._model): cache},
        )
        return cache


@dataclass(frozen=True)
class _Chunk:
    """Tokens of some steps, on their way to the host."""

    slots: Slots
    tokens: Tensor
    """[steps, rows] on the host, valid after `copied`."""
    log_probs: Tensor
    copied: Any
    """A CUDA event; None on a CPU."""

    @classmethod
    def of(cls, state: State, slots: Slots, steps: int) -> "_Chunk":
        """Of the steps just launched; the copy waits for them on the device."""
        tokens, log_probs = (
            tensor[:steps].clone().to("cpu", non_blocking=True) for tensor in (state.tokens, state.log_probs)
        )
        copied = torch.cuda.Event() if state.tokens.is_cuda else None
        if copied:
            copied.record()
        return cls(slots, tokens, log_probs, copied)

    def read(self) -> tuple[list[list[int]], list[list[float]]]:
        """Wait for the copy; a list of rows for each step."""
        if self.copied:
            self.copied.synchronize()
        return self.tokens.tolist(), self.log_probs.tolist()


def _columns(running: Slots, steps: int, most: int) -> int:
    """The size class of the columns that these rows have used after so many steps."""
    used = max(len(row.context) - 1 + min(steps, len(row.uniforms)) for _, row in running)
    return min(size_class(used, LEAST_LENGTH), most)


def _parts(contexts: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
    """Contexts, longest first, in parts of at most `PREFILL_TOKENS`; without those of one token."""
    contexts = [context for context in contexts if len(context) > 1]
    first = 0
    while first < len(contexts):
        count = max(1, PREFILL_TOKENS // (len(contexts[first]) - 1))
        yield contexts[first : first + count]
        first += count
