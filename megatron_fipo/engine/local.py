"""The rollout engine on `transformers`: batched decoding with a KV cache.

For laptops, tests and models that vLLM does not support.

It has its own decoding loop instead of `model.generate` for three reasons: finished rows leave the batch at
once (lengths are ragged), a prompt is computed once for all of its responses, and each response has a
separate random stream.
"""

import inspect
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.engine.model_folder import load_model
from megatron_fipo.engine.protocol import (
    NO_WEIGHTS,
    EngineStatus,
    Generation,
    GenerationRequest,
    SamplingParams,
)
from megatron_fipo.engine.stop_strings import Decode, StopStrings, decoder
from megatron_fipo.errors import UserError
from megatron_fipo.families.fused_experts import is_fused, separate
from megatron_fipo.weight_sync.checksum import Checksums


@dataclass
class _Row:
    """One response while it is decoded."""

    uniforms: np.ndarray
    """One random number for each token that may still be sampled."""
    prefix: list[int] = field(default_factory=list)
    """The response before this call."""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str = "abort"
    """Until the last token sets it."""


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
        self._cache_argument = "past_key_values"
        """Of the model's `forward`: older versions of transformers, and code of models, have this name."""
        self._end_ids: frozenset[int] = frozenset()
        self._decode_text: Decode | None = None
        self._version = NO_WEIGHTS
        self._received: set[str] | None = None
        self._check = False
        self._tokens = 0
        """Prompt and response tokens computed."""
        self._generated = 0
        """Response tokens among them."""
        self._prefix_queries = 0
        """Tokens of all requests' prompts and prefixes."""
        self._prefix_hits = 0
        """Those that another request of the same call had too, so they were computed once."""
        self._running = 0
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
                if "cache" in inspect.signature(model.forward).parameters:
                    self._cache_argument = "cache"
                self._device = "cuda" if torch.cuda.is_available() else "cpu"
                self._model = model.eval().requires_grad_(False).to(self._device)
                self._version = 0 if self._load_weights else NO_WEIGHTS
        return self.status()

    def status(self) -> EngineStatus:
        return EngineStatus(
            self._version,
            self._tokens,
            running=self._running,
            generated_tokens=self._generated,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
        )

    # -- generation ------------------------------------------------------------------------------------------

    def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        """Generate each request's response to its end, all in one batch.

        Log-probs are of the distribution at `sampling.temperature` over the full vocabulary, before
        truncation; at temperature 0 (greedy) they are those of temperature 1. Memory: the KV cache of the
        unfinished rows, and their logits [rows, V] of one step.
        """
        with self._using_model:
            if self._version == NO_WEIGHTS or self._received is not None:
                raise RuntimeError(
                    "generate() was called before there were weights or during a weight update"
                )
            self._abort.clear()
            try:
                rows = self._decode(requests, sampling)
            finally:
                self._running = 0
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

    @torch.inference_mode()
    def _decode(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[_Row]:
        """One row per request. An abort takes effect between two decode steps."""
        limit = sampling.max_new_tokens
        rows = [
            _Row(
                np.random.default_rng(request.seed).random(limit)[len(request.prefix) :],
                request.prefix.tolist(),
            )
            for request in requests
        ]
        logits, cache, mask = self._prefill(
            [(*request.prompt_ids, *request.prefix.tolist()) for request in requests]
        )
        running, end_ids = rows, self._end_ids.union(sampling.stop_token_ids)
        stop = StopStrings(sampling.stop, self._decoder()) if sampling.stop else None
        while not self._abort.is_set():
            uniforms = torch.from_numpy(np.array([row.uniforms[len(row.tokens)] for row in running])).to(
                self._device
            )
            tokens, log_probs = sample_tokens(logits, uniforms, sampling)
            self._running = len(running)
            survivors = self._append(running, tokens.tolist(), log_probs.tolist(), end_ids, stop)
            if not survivors:
                break
            if len(survivors) < len(running):
                index = torch.tensor(survivors, device=self._device)
                running = [running[i] for i in survivors]
                cache.batch_select_indices(index)
                tokens, mask = tokens[index], mask[index]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = mask.sum(-1, keepdim=True) - 1
            logits = self._model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{self._cache_argument: cache},
            ).logits[:, -1]
        return rows

    def _prefill(self, contexts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Any, Tensor]:
        """Run each distinct context once, left-padded.

        Returns logits [rows, V], KV cache and mask [rows, P] of all rows.
        """
        from transformers import DynamicCache

        unique = {context: row for row, context in enumerate(dict.fromkeys(contexts))}
        width = max(map(len, unique))
        ids = torch.zeros(len(unique), width, dtype=torch.long)
        mask = torch.zeros(len(unique), width, dtype=torch.long)
        for context, row in unique.items():
            ids[row, width - len(context) :] = torch.tensor(context)
            mask[row, width - len(context) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        cache = DynamicCache(config=self._model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        brought, computed = sum(map(len, contexts)), sum(map(len, unique))
        self._tokens += computed
        self._prefix_queries += brought
        self._prefix_hits += brought - computed
        index = torch.tensor([unique[context] for context in contexts], device=self._device)
        cache.batch_select_indices(index)
        return output.logits[index, -1], cache, mask[index]

    def _append(
        self,
        running: Sequence[_Row],
        tokens: Sequence[int],
        log_probs: Sequence[float],
        end_ids: Collection[int],
        stop: StopStrings | None,
    ) -> list[int]:
        """Add one token to each row; return the indices of the unfinished rows."""
        survivors = []
        self._tokens += len(tokens)
        self._generated += len(tokens)
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

    def _decoder(self) -> Decode:
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
        """Does nothing: only engines on vLLM share a GPU with the trainer."""

    def wake(self) -> None:
        """Does nothing, like `sleep`."""

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


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverse CDF: (tokens [B] int64, their log-probs [B] float32).

    `logits` [B, V] of any float dtype, `uniforms` [B] float64 in [0, 1). The uniform number selects one of the tokens
    that truncation keeps.
    """
    greedy = sampling.temperature == 0
    log_probs = torch.log_softmax(logits.float() / (1.0 if greedy else sampling.temperature), dim=-1)
    if greedy:
        tokens = log_probs.argmax(dim=-1)
    else:
        # In float64 and with u <= 1 - 2^-53, u * total rounds below total: the search never passes the last
        # likely token.
        probs = log_probs.double().exp()
        order = None
        if sampling.top_p < 1 or sampling.top_k or sampling.min_p:
            probs, order = probs.sort(dim=-1, descending=True, stable=True)
            probs = _truncate(probs, sampling)
        cdf = probs.cumsum(dim=-1)
        ranks = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
        tokens = (ranks if order is None else order.gather(-1, ranks)).squeeze(-1)
    return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)


def _truncate(probs: Tensor, sampling: SamplingParams) -> Tensor:
    """Zero probabilities that are not sampled from; `probs` [B, V] is in descending order.

    As in vLLM: min-p compares with the most likely token, top-k then keeps the first, and top-p the smallest set of these
    whose share of their sum reaches `top_p`.
    """
    probs = probs * (probs >= sampling.min_p * probs[:, :1])
    if sampling.top_k:
        probs[:, sampling.top_k :] = 0
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs * (before < sampling.top_p * probs.sum(-1, keepdim=True))
    return probs
