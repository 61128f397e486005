"""One engine of the simulation: continuous batching over a KV cache of limited size, as vLLM's scheduler does it.

A running sequence gets one token per step. The engine admits waiting sequences, oldest first, while `max_sequences` and the
cache allow; if the cache cannot hold the next step's tokens, it interrupts the newest running sequence, which waits in front and
has its tokens computed again. Between two such events all steps are taken at once.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from megatron_fipo.driver.rollout.dispatch import Call
from megatron_fipo.engine.protocol import GenerationRequest
from megatron_fipo.simulate.times import Times


@dataclass(eq=False)
class Running:
    """A response at an engine."""

    request: GenerationRequest
    call: Call
    """The call that brought it."""
    length: int
    """Tokens of the complete response."""
    done: int
    """Tokens that it has, the request's prefix included, as of `since`."""
    since: int = 0
    """The engine's count of steps when it was admitted last."""
    order: int = 0
    """Counts admissions; 0 while it waits."""

    @property
    def held(self) -> int:
        """Tokens in the cache as of `since`."""
        return len(self.request.prompt_ids) + self.done


class Engine:
    """One engine. Its own clock `now` may be later than the caller's: a step or a prefill that has begun is finished."""

    def __init__(self, times: Times, now: float) -> None:
        self.now = now
        self.busy_s = 0.0
        """Seconds with a sequence."""
        self.sequence_s = 0.0
        """Running sequences, summed over seconds."""
        self.preemptions = 0
        self._times = times
        self._capacity = math.inf if times.cache_tokens is None else times.cache_tokens
        self._steps = 0
        self._used = 0
        """Tokens in the cache."""
        self._waiting: deque[Running] = deque()
        self._heap: list[tuple[int, int, Running]] = []
        """(step at which it ends, order of admission, sequence); entries of interrupted ones are stale."""
        self._admitted: list[Running] = []
        """Running sequences, oldest first; may contain ended ones."""
        self._count = 0
        self._order = 0

    @property
    def running(self) -> int:
        """Sequences that are being decoded."""
        return self._count

    @property
    def waiting(self) -> int:
        """Sequences that wait for space."""
        return len(self._waiting)

    def submit(self, sequences: Items[Running], now: float) -> None:
        """Queue sequences that arrive at `now`."""
        self.advance(now)
        self._waiting.extend(sequences)
        self._admit()

    @property
    def next_event(self) -> float:
        """When a sequence ends or the cache is full; infinite without a sequence."""
        if not self._count:
            return math.inf
        return self.now + self._seconds(self._steps_to_event())

    def advance(self, now: float) -> None:
        """Take the steps that begin before `now`, up to the next event."""
        if not self._count:
            self.now = max(self.now, now)
            return
        most = self._steps_to_event()
        if self.now < now and most:
            self._take(min(most, self._steps_within(now - self.now)))

    def fire(self) -> list[Running]:
        """Take the steps to the next event, and return the sequences that end with it."""
        self._take(self._steps_to_event())
        ended = []
        while self._top() is not None and self._heap[0][0] == self._steps:
            sequence = heapq.heappop(self._heap)[2]
            self._release(sequence)
            ended.append(sequence)
        while self._count > 1 and self._used + self._count > self._capacity:
            self._interrupt_newest()
        self._admit()
        return ended

    def abort(self, now: float) -> list[Running]:
        """Take all sequences back, unfinished, with their tokens up to `now`."""
        self.advance(now)
        for sequence in [sequence for _, order, sequence in self._heap if order == sequence.order]:
            self._release(sequence)
            self._waiting.append(sequence)
        taken = list(self._waiting)
        self._waiting.clear()
        self._heap.clear()
        self._admitted.clear()
        return taken

    def _admit(self) -> None:
        tokens, prompts = 0, set()
        while self._waiting and self._count < self._times.max_sequences:
            sequence = self._waiting[0]
            if self._count and self._used + sequence.held + self._count + 1 > self._capacity:
                break
            self._waiting.popleft()
            # Responses to one prompt share its keys and values, so that it is computed once.
            prompt = sequence.request.prompt_ids
            tokens += sequence.done + (0 if id(prompt) in prompts else len(prompt))
            prompts.add(id(prompt))
            self._used += sequence.held
            self._count += 1
            self._order += 1
            sequence.since, sequence.order = self._steps, self._order
            end = self._steps + sequence.length - sequence.done
            heapq.heappush(self._heap, (end, self._order, sequence))
            self._admitted.append(sequence)
        if tokens:
            self._pass(self._times.prefill(tokens))

    def _interrupt_newest(self) -> None:
        while not self._admitted[-1].order:
            self._admitted.pop()
        sequence = self._admitted.pop()
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Running) -> None:
        """The sequence runs no more; it keeps its tokens."""
        sequence.done += self._steps - sequence.since
        sequence.order = 0
        self._used -= sequence.held
        self._count -= 1

    def _top(self) -> int | None:
        """The step at which the first running sequence ends."""
        while self._heap and self._heap[0][1] != self._heap[0][2].order:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _steps_to_event(self) -> int:
        """With at least one sequence."""
        end = self._top()
        assert end is not None
        steps = end - self._steps
        if self._capacity < math.inf and self._count > 1:
            steps = min(steps, int(self._capacity - self._used) // self._count)
        return max(steps, 0)

    def _seconds(self, steps: int) -> float:
        """Of the next `steps` steps. Their numbers of cached tokens are used, used + n, ..., of which the mean counts."""
        if not steps:
            return 0.0
        return steps * self._times.decode_step(self._count, self._used + self._count * (steps - 1) / 2)

    def _steps_within(self, seconds: float) -> int:
        """How many steps begin within the time: k with k·first + growth·k(k − 1)/2 = seconds, rounded up."""
        first = self._times.decode_step(self._count, self._used)
        growth = self._times.decode_step(self._count, self._used + self._count) - first
        linear = first - growth / 2
        if growth <= 1e-9 * first:
            return math.ceil(seconds / first)
        return math.ceil((math.sqrt(linear * linear + 2 * growth * seconds) - linear) / growth)

    def _take(self, steps: int) -> None:
        self._pass(self._seconds(steps))
        self._steps += steps
        self._used += steps * self._count

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        self.busy_s += seconds
        self.sequence_s += seconds * self._count
