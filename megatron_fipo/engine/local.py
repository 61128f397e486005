"""The rollout engine on `transformers`: batched decoding with a KV cache.

For laptops, tests and models that vLLM does not support.

It has its own decoding loop instead of `model.generate` for three reasons: finished rows leave the batch at
once (lengths are ragged), a prompt is computed once for all of its responses, and each response has a
separate random stream.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.engine.decoding.dynamic import DynamicDecoder
from megatron_fipo.engine.decoding.rows import Counts, Decoder, Row
from megatron_fipo.engine.model_folder import load_model
from megatron_fipo.engine.protocol import (
    NO_WEIGHTS,
    EngineStatus,
    Generation,
    GenerationRequest,
    SamplingParams,
)
from megatron_fipo.engine.stop_strings import Decode, StopStrings, decoder
from megatron_fipo.errors import UserError, first_line
from megatron_fipo.families.fused_experts import is_fused, separate
from megatron_fipo.weight_sync.checksum import Checksums


class LocalEngine:
    """A `RolloutEngine` in one process on one device (the GPU if there is one, else one CPU thread).

    Token `t` of a response, counted from the start of its prefix, is sampled by inverse CDF from uniform
    number `t` of a stream seeded with `request.seed`. So the sample does not depend on the other requests of
    the batch, on the number of engines, or on how often the response was aborted and continued. The rounding
    of the logits still depends on the shape of the batch in the last bits: a uniform number within that
    distance of a CDF boundary (about one in a million in float32) may give another token.

    Methods may be called from several threads. One call of `generate` or one bucket of weights uses the model
    at a time; `status` and `abort` never wait.
    """

    requests_per_call: ClassVar[int] = 512
    """More responses decoded together gain no speed on a CPU and cost KV cache."""
    calls_at_once: ClassVar[int] = 1

    def __init__(
        self, model_path: str, dtype: str, trust_remote_code: bool = False, load_weights: bool = True
    ) -> None:
        """Store the arguments. `ready` loads, so that the caller gets its errors unwrapped.

        Without `load_weights` the weights in the folder are not read; the engine serves after its first
        weight update.
        """
        self._model_path = model_path
        self._dtype = dtype
        self._trust_remote_code = trust_remote_code
        self._load_weights = load_weights
        self._model: Any = None
        self._decoder: Decoder
        self._end_ids: frozenset[int] = frozenset()
        self._decode_text: Decode | None = None
        self._version = NO_WEIGHTS
        self._received: set[str] | None = None
        self._check = False
        self._counts = Counts()
        self._using_model = threading.Lock()
        self._abort = threading.Event()

    def ready(self) -> EngineStatus:
        """Load the model (once).

        Raises `UserError` if the folder is unreadable or names no end-of-sequence token.
        """
        with self._using_model:
            if self._model is None:
                torch.set_num_threads(1)
                model, self._end_ids = load_model(
                    self._model_path, self._dtype, self._trust_remote_code, self._load_weights
                )
                _choose_products(model)
                device = "cuda" if torch.cuda.is_available() else "cpu"
                self._model = model.eval().requires_grad_(False).to(device)
                self._decoder = _new_decoder(self._model, self._counts, self._abort.is_set)
                self._version = 0 if self._load_weights else NO_WEIGHTS
        return self.status()

    def status(self) -> EngineStatus:
        return EngineStatus(
            self._version,
            self._counts.computed,
            running=self._counts.running,
            generated_tokens=self._counts.generated,
            prefix_queries=self._counts.prefix_queries,
            prefix_hits=self._counts.prefix_hits,
        )

    # -- generation ------------------------------------------------------------------------------------------

    def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        """Generate each request's response to its end, all in one batch.

        Log-probs are of the distribution at `sampling.temperature` over the full vocabulary, before
        truncation; at temperature 0 (greedy) they are those of temperature 1.
        """
        with self._using_model:
            if self._version == NO_WEIGHTS or self._received is not None:
                raise RuntimeError(
                    "generate() was called before there were weights or during a weight update"
                )
            self._abort.clear()
            rows = [Row.of(request, sampling.max_new_tokens) for request in requests]
            end_ids = self._end_ids.union(sampling.stop_token_ids)
            stop = StopStrings(sampling.stop, self._text_decoder()) if sampling.stop else None

            def append(
                running: Sequence[Row], tokens: Sequence[int], log_probs: Sequence[float]
            ) -> list[int]:
                return self._append(running, tokens, log_probs, end_ids, stop)

            try:
                self._decoder.decode(rows, sampling, append)
            finally:
                self._counts.running = 0
            return [
                Generation(
                    np.array(row.tokens, dtype=np.int32),
                    np.array(row.log_probs, dtype=np.float32),
                    row.finish_reason,
                    self._version,
                )
                for row in rows
            ]

    def abort(self) -> None:
        self._abort.set()

    def _append(
        self,
        running: Sequence[Row],
        tokens: Sequence[int],
        log_probs: Sequence[float],
        end_ids: Collection[int],
        stop: StopStrings | None,
    ) -> list[int]:
        """Add one token to each row; return the indices of the unfinished rows."""
        survivors = []
        self._counts.computed += len(tokens)
        self._counts.generated += len(tokens)
        for index, (row, token, log_prob) in enumerate(zip(running, tokens, log_probs, strict=True)):
            row.tokens.append(token)
            row.log_probs.append(log_prob)
            if token in end_ids or (stop is not None and stop.ends(row.prefix, row.tokens)):
                row.finish_reason = "stop"
            elif len(row.tokens) == len(row.uniforms):
                row.finish_reason = "length"
            else:
                survivors.append(index)
        return survivors

    def _text_decoder(self) -> Decode:
        if self._decode_text is None:
            self._decode_text = decoder(self._model_path, self._trust_remote_code)
        return self._decode_text

    # -- weights ---------------------------------------------------------------------------------------------

    def begin_weight_update(self, check: bool) -> None:
        """Accept tensors and refuse `generate` until `finish_weight_update`.

        A second call discards an incomplete update.
        """
        with self._using_model:
            self._received, self._check = set(), check

    @torch.no_grad()
    def load_weights(self, bucket: dict[str, Tensor]) -> None:
        """Copy the named tensors into the model.

        Raises `UserError` for a name, shape or dtype that it does not have.
        """
        with self._using_model:
            if self._received is None:
                raise RuntimeError(
                    "load_weights() was called outside begin_weight_update() and finish_weight_update()"
                )
            weights = self._weights()
            for name, tensor in bucket.items():
                if name not in weights:
                    raise UserError(
                        f"the rollout engine has no weight {name}; model.path and the trained model differ "
                        "in architecture"
                    )
                target = weights[name]
                if target.shape != tensor.shape or target.dtype != tensor.dtype:
                    raise UserError(
                        f"weight {name} is {tuple(target.shape)} {target.dtype} in the rollout engine but "
                        f"{tuple(tensor.shape)} {tensor.dtype} in the trainer; both must come from the same "
                        "model.path and model.dtype"
                    )
                target.copy_(tensor)
            self._received.update(bucket)

    def finish_weight_update(self, version: int) -> dict[str, str]:
        """Adopt `version`.

        If the update began with `check`, return the checksums of the updated names, read back from the model.

        Raises `UserError` if a weight of the model was not updated. Tied weights (`lm_head.weight` and the
        embedding) may be updated under either name.
        """
        with self._using_model:
            if self._received is None:
                raise RuntimeError("finish_weight_update() was called without begin_weight_update()")
            weights = self._weights()
            updated = {weights[name].data_ptr() for name in self._received}
            missing = [name for name, tensor in weights.items() if tensor.data_ptr() not in updated]
            if missing:
                raise UserError(
                    f"the weight update lacks {len(missing)} of the engine's tensors, the first is "
                    f"{missing[0]}"
                )
            checksums = Checksums()
            for name in self._received if self._check else ():
                checksums.add(name, weights[name])
            self._version, self._received = version, None
            return checksums.finish()

    def sleep(self) -> None:
        """Free the device memory of the KV cache and the CUDA graphs; the next call of `generate` makes them again.

        The weights stay. On a CPU nothing is kept between calls.
        """
        with self._using_model:
            self._decoder.release()

    def wake(self) -> None:
        """Does nothing."""

    def _weights(self) -> dict[str, Tensor]:
        """All weights by Hugging Face name, of each expert separately; tied ones under each of their names."""
        return separate(self._model.state_dict())


def _choose_products(model: Any) -> None:
    """Compute experts one after another where torch's grouped product, transformers' default, can't: rows of any width.

    The grouped product needs rows of multiples of 16 bytes. It is as fast in float32, and up to twice as fast in bfloat16.
    """
    if any(
        is_fused(name) and tensor.shape[-1] * tensor.element_size() % 16
        for name, tensor in model.state_dict().items()
    ):
        model.set_experts_implementation("eager")


def _new_decoder(model: Any, counts: Counts, aborted: Callable[[], bool]) -> Decoder:
    """On a GPU the one with CUDA graphs, if the model can be captured."""
    if model.device.type == "cuda":
        from megatron_fipo.engine.decoding.graphs import Graphs, free_bytes
        from megatron_fipo.engine.decoding.static import StaticDecoder

        try:
            decoder = StaticDecoder(model, counts, aborted, Graphs(), free_bytes)
            decoder.rehearse()
            return decoder
        except Exception as error:  # the model's code decides what it raises
            print(
                f"rollout engine: {type(model).__name__} cannot be decoded with CUDA graphs ({first_line(error)}); it is decoded "
                "without, which is slower",
                flush=True,
            )
    return DynamicDecoder(model, counts, aborted)
