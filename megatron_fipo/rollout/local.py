"""The rollout engine on `transformers`: batched decoding with a KV cache, for laptops, tests and models without a vLLM port.

The loop is our own and not `model.generate` for three reasons: finished rows leave the batch at once (lengths are ragged),
a prompt is computed once for all of its `n` responses, and each response draws from a random stream of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.errors import UserError
from megatron_fipo.rollout.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.rollout.weight_sync import WeightChecksum

MAX_ROWS = 512
"""Responses decoded together at most. More per batch gains no speed on a CPU and costs KV cache."""


@dataclass
class _Row:
    """One response while it is decoded."""

    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


class LocalEngine:
    """A `RolloutEngine`; one process, one device (the GPU where there is one, else one CPU thread).

    Token `t` of response `i` to a request is drawn by inverse CDF from uniform number `t` of a stream seeded with
    `(request.seed, i)`, so the draw does not depend on the other requests of the batch, on `n`, or on how many engines serve.
    What remains is the rounding of the logits, which may differ in the last bits with the shape of the batch: a
    draw that falls within that distance of a boundary (about one in a million in float32) may go the other way.
    """

    def __init__(self, model_path: str, dtype: str, trust_remote_code: bool = False) -> None:
        """Remember the arguments; `ready` loads, so that its errors reach the caller as themselves."""
        self._model_path = model_path
        self._dtype = dtype
        self._trust_remote_code = trust_remote_code
        self._model: Any = None
        self._end_ids: frozenset[int] = frozenset()
        self._version = 0
        self._received: set[str] | None = None

    def ready(self) -> None:
        """Load the model (once). Raises `UserError` where the folder is unreadable or names no end-of-sequence token."""
        if self._model is not None:
            return
        path = self._model_path
        if not Path(path, "config.json").is_file():
            raise UserError(f"model.path {path} is no folder with a config.json; give a model folder in Hugging Face format")
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        options: dict[str, Any] = {"trust_remote_code": self._trust_remote_code, "local_files_only": True}
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, self._dtype), **options)
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"the rollout engine can't load model.path {path}: {_first_line(error)}") from error
        named = _end_of_sequence_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
        # Some tokenizer classes invent an end token that the folder does not name: its id lies beyond the vocabulary.
        self._end_ids = frozenset(token for token in named if token < model.config.get_text_config().vocab_size)
        if not self._end_ids:
            raise UserError(
                f"neither tokenizer nor generation_config.json in {path} names an end-of-sequence token; set eos_token"
            )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().requires_grad_(False).to(self._device)

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[list[Generation]]:
        """Sample `n` responses to each request, in order, in batches of at most `MAX_ROWS` responses.

        Log-probs are of the distribution at `sampling.temperature` over the whole vocabulary, before top-p truncation;
        at temperature 0 (greedy) they are those of temperature 1. Memory: the KV cache of the rows still running, and
        their logits [rows, V] of one step.
        """
        if self._model is None or self._received is not None:
            raise RuntimeError("generate() was called before ready() or within a weight update")
        results: list[list[Generation]] = [[] for _ in requests]
        for batch in _batches(requests):
            rows = self._decode([requests[index] for index, _ in batch], [sample for _, sample in batch], sampling)
            for (index, _), row in zip(batch, rows, strict=True):
                results[index].append(Generation(tuple(row.tokens), tuple(row.log_probs), row.finish_reason, self._version))
        return results

    @torch.inference_mode()
    def _decode(self, requests: Sequence[GenerationRequest], samples: Sequence[int], sampling: SamplingParams) -> list[_Row]:
        """Decode one row per (request, sample index); a request may occur several times."""
        limit = sampling.max_new_tokens
        rows = [
            _Row(np.random.default_rng([request.seed, sample]).random(limit))
            for request, sample in zip(requests, samples, strict=True)
        ]
        logits, cache, mask = self._prefill(requests)
        running = rows
        for step in range(limit):
            uniforms = torch.from_numpy(np.array([row.uniforms[step] for row in running])).to(self._device)
            tokens, log_probs = sample_tokens(logits, uniforms, sampling)
            survivors = self._append(running, tokens.tolist(), log_probs.tolist())
            if not survivors or step + 1 == limit:
                break
            if len(survivors) < len(running):
                index = torch.tensor(survivors, device=self._device)
                running = [running[i] for i in survivors]
                cache.batch_select_indices(index)
                tokens, mask = tokens[index], mask[index]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = mask.sum(-1, keepdim=True) - 1
            logits = self._model(
                input_ids=tokens[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits[:, -1]
        return rows

    def _prefill(self, requests: Sequence[GenerationRequest]) -> tuple[Tensor, Any, Tensor]:
        """Run each distinct prompt once, left-padded; return logits [rows, V], cache and mask [rows, P] of every row."""
        from transformers import DynamicCache

        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        cache = DynamicCache(config=self._model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        place = {prompt: row for row, prompt in enumerate(prompts)}
        index = torch.tensor([place[request.prompt_ids] for request in requests], device=self._device)
        cache.batch_select_indices(index)
        return output.logits[index, -1], cache, mask[index]

    def _append(self, running: Sequence[_Row], tokens: Sequence[int], log_probs: Sequence[float]) -> list[int]:
        """Add one token to each row; return the indices of the rows that go on."""
        survivors = []
        for index, (row, token, log_prob) in enumerate(zip(running, tokens, log_probs, strict=True)):
            row.tokens.append(token)
            row.log_probs.append(log_prob)
            if token in self._end_ids:
                row.finish_reason = "stop"
            else:
                survivors.append(index)
        return survivors

    # -- weights ------------------------------------------------------------------------------------------------------

    def begin_weight_update(self) -> None:
        """Until `finish_weight_update`, tensors may come and `generate` is refused. Beginning again forgets a broken update."""
        self._received = set()

    @torch.no_grad()
    def load_weights(self, bucket: dict[str, Tensor]) -> None:
        """Copy the named tensors into the model. A name, shape or dtype that the model does not have is a `UserError`."""
        if self._received is None:
            raise RuntimeError("load_weights() was called outside begin_weight_update() and finish_weight_update()")
        held = self._held()
        for name, tensor in bucket.items():
            if name not in held:
                raise UserError(
                    f"the rollout engine has no weight {name}; model.path and the trained model differ in architecture"
                )
            target = held[name]
            if target.shape != tensor.shape or target.dtype != tensor.dtype:
                raise UserError(
                    f"weight {name} is {tuple(target.shape)} {target.dtype} in the rollout engine but {tuple(tensor.shape)} "
                    f"{tensor.dtype} in the trainer; both must come from the same model.path and model.dtype"
                )
            target.copy_(tensor)
        self._received.update(bucket)

    def finish_weight_update(self, version: int) -> str:
        """Adopt `version`; return the `WeightChecksum` of the updated names, read back from the model.

        Raises `UserError` where a weight of the model was not updated. Tied weights (`lm_head.weight` and the embedding) count as
        updated by either name.
        """
        if self._received is None:
            raise RuntimeError("finish_weight_update() was called without begin_weight_update()")
        held = self._held()
        updated = {held[name].data_ptr() for name in self._received}
        missing = [name for name, tensor in held.items() if tensor.data_ptr() not in updated]
        if missing:
            raise UserError(f"the weight update lacks {len(missing)} of the engine's tensors, the first is {missing[0]}")
        checksum = WeightChecksum()
        for name in self._received:
            checksum.add(name, held[name])
        self._version, self._received = version, None
        return checksum.hexdigest()

    def _held(self) -> dict[str, Tensor]:
        """Every weight by its Hugging Face name; tied ones under each of their names."""
        return self._model.state_dict()


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse CDF: (tokens [B] int64, their log-probs [B] float32).

    `logits` [B, V] of any float dtype, `uniforms` [B] float64 in [0, 1). With top-p, the smallest set of most likely tokens whose
    probability reaches `top_p` stays, and the uniform number picks within it.
    """
    greedy = sampling.temperature == 0
    log_probs = torch.log_softmax(logits.float() / (1.0 if greedy else sampling.temperature), dim=-1)
    if greedy:
        tokens = log_probs.argmax(dim=-1)
    else:
        # In float64 and with u <= 1 - 2^-53, u * total rounds below total: the search never runs past the last likely token.
        probs = log_probs.double().exp()
        order = None
        if sampling.top_p < 1:
            probs, order = probs.sort(dim=-1, descending=True, stable=True)
            probs = probs * (probs.cumsum(-1) - probs < sampling.top_p)
        cdf = probs.cumsum(dim=-1)
        ranks = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
        tokens = (ranks if order is None else order.gather(-1, ranks)).squeeze(-1)
    return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)


def _batches(requests: Sequence[GenerationRequest]) -> Iterator[list[tuple[int, int]]]:
    """(request index, sample index) pairs in order, at most `MAX_ROWS` at a time."""
    pairs = [(index, sample) for index, request in enumerate(requests) for sample in range(request.n)]
    for start in range(0, len(pairs), MAX_ROWS):
        yield pairs[start : start + MAX_ROWS]


def _end_of_sequence_ids(*sources: int | list[int] | None) -> set[int]:
    ids: set[int] = set()
    for source in sources:
        if source is not None:
            ids.update([source] if isinstance(source, int) else source)
    return ids


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
