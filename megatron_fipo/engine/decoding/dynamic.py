"""Decoding with a cache that grows by a column each step and loses rows as they finish: no memory or work for finished rows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.engine.decoding.rows import Append, Counts, Row
from megatron_fipo.engine.decoding.sampling import sample_tokens
from megatron_fipo.engine.decoding.versions import cache_argument
from megatron_fipo.engine.protocol import SamplingParams


class DynamicDecoder:
    """A `Decoder`. Each step launches the model's operations one by one. Keeps no memory between calls."""

    def __init__(self, model: Any, counts: Counts, aborted: Callable[[], bool]) -> None:
        self._model = model
        self._cache_argument = cache_argument(model)
        self._counts = counts
        self._aborted = aborted

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row], sampling: SamplingParams, append: Append) -> None:
        """Left-padded. An abort takes effect between two steps.

        Memory: the KV cache of the unfinished rows, and their logits [rows, V] of one step.
        """
        device = self._model.device
        logits, cache, mask = self._prefill(rows)
        running = list(rows)
        while not self._aborted():
            uniforms = torch.from_numpy(np.array([row.uniforms[len(row.tokens)] for row in running]))
            tokens, log_probs = sample_tokens(logits, uniforms.to(device), sampling)
            self._counts.running = len(running)
            survivors = append(running, tokens.tolist(), log_probs.tolist())
            if not survivors:
                break
            if len(survivors) < len(running):
                index = torch.tensor(survivors, device=device)
                running = [running[i] for i in survivors]
                cache.reorder_cache(index)
                tokens, mask = tokens[index], mask[index]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            logits = self._forward(tokens[:, None], mask, mask.sum(-1, keepdim=True) - 1, cache)

    def release(self) -> None:
        """Does nothing."""

    def _prefill(self, rows: Sequence[Row]) -> tuple[Tensor, Any, Tensor]:
        """Run each distinct context once, left-padded.

        Returns logits [rows, V], KV cache and mask [rows, P] of all rows.
        """
        from transformers import DynamicCache

        device = self._model.device
        unique = {context: index for index, context in enumerate(dict.fromkeys(row.context for row in rows))}
        width = max(map(len, unique))
        ids = torch.zeros(len(unique), width, dtype=torch.long)
        mask = torch.zeros(len(unique), width, dtype=torch.long)
        for context, index in unique.items():
            ids[index, width - len(context) :] = torch.tensor(context)
            mask[index, width - len(context) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        cache: Any = DynamicCache(config=self._model.config)
        logits = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        self._counts.add_contexts(rows)
        sources = torch.tensor([unique[row.context] for row in rows], device=device)
        cache.reorder_cache(sources)
        return logits[sources], cache, mask[sources]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The last column's logits [rows, V]."""
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        ).logits[:, -1]
