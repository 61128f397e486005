"""Log-probs of the same responses under other policies than the trainer's old one: in bfloat16, and by transformers."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.config import Config
from megatron_fipo.engine.model_folder import load_model
from megatron_fipo.trainer.rank_model import RankModel
from megatron_fipo.trainer.rl_worker import RLWorker

ENGINE = "rollout engine"
"""The engine that sampled the run's responses."""
BFLOAT16 = "bfloat16"
"""The trainer's model with weights and activations in bfloat16; its head makes float32 logits."""
BFLOAT16_LOGITS = "bfloat16 logits"
"""transformers in bfloat16, which rounds the logits too, as most engines do."""
ONE_STEP_OFF = "one step off"
"""The weights of one iteration before."""
RESPONSES_AT_ONCE = 32


class BFloat16Trainer:
    """The trainer's model in bfloat16, beside the trained one in the same process."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._model = RankModel(
            replace(config.model, dtype="bfloat16"),
            config.parallel,
            config.head,
            config.optimizer,
            config.rollout.temperature,
            device,
        )

    def take(self, policy: RankModel) -> None:
        """Copy the weights of `policy`, rounded."""
        with torch.no_grad():
            for own, other in zip(self._model.modules, policy.modules, strict=True):
                for target, source in zip(own.parameters(), other.parameters(), strict=True):
                    target.copy_(source)

    def log_probs(self, shards: Sequence[PackedShard]) -> list[torch.Tensor]:
        """float32 [R] per shard."""
        return self._model.log_probs(shards)


def transformers_log_probs(
    worker: RLWorker, batches: Sequence[Sequence[Trajectory]], dtype: str
) -> list[list[np.ndarray]]:
    """float32 [response length] per trajectory of each batch, by transformers in `dtype` under the worker's weights."""
    config = worker.config
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        worker.export_hf(config.model.path, str(folder))
        model, _ = load_model(str(folder), dtype, config.model.trust_remote_code, load_weights=True)
    model = model.eval().to(worker.device)
    return [
        [
            values
            for start in range(0, len(batch), RESPONSES_AT_ONCE)
            for values in _scored(model, batch[start : start + RESPONSES_AT_ONCE], config.rollout.temperature)
        ]
        for batch in batches
    ]


@torch.no_grad()
def _scored(
    model: torch.nn.Module, trajectories: Sequence[Trajectory], temperature: float
) -> list[np.ndarray]:
    """One forward pass. Padding comes last, so causal attention never sees it."""
    sequences = [
        torch.from_numpy(np.concatenate([t.prompt_ids, t.response_ids])).long() for t in trajectories
    ]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits.float() / temperature
    chosen = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2).cpu().numpy()
    return [row[len(t.prompt_ids) - 1 : t.length - 1] for row, t in zip(chosen, trajectories, strict=True)]
