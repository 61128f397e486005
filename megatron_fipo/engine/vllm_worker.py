"""Code that runs inside vLLM's worker processes (one per tensor-parallel rank), not in the engine's actor.

It has three parts: the weight-transfer backend `megatron_fipo`, the worker extension that returns checksums,
and the logits processor that makes log-probs. vLLM imports this module in every worker because
`engine_arguments` names `WorkerExtension` as `worker_extension_cls`; the import registers the backend. If
an engine has one worker, it runs in vLLM's engine process. (The actor imports this module too, but without
`_end_with_owner`.)

Start, finish and the NCCL handshake are those of vLLM's backend `nccl`, which encloses the update in
layerwise reloading: a layer is loaded into a new copy, post-processed (packed on a CPU) and copied over the
old one, so CUDA graphs stay valid. New here are the path through shared memory, for CPUs and for engines that
share the trainer's GPUs, and the checksums.

**Every tensor-parallel worker receives full tensors** and keeps its slice: (TP - 1) / TP of the bytes are
wasted. vLLM 0.32 has two backends that send slices only, and neither fits here. `nccl_m2n` reshards directly
into a worker's parameter only if a checkpoint tensor is one vLLM parameter; tensors that vLLM fuses (q, k, v;
gate and up; experts), most of a model, arrive in full. It also describes the trainer's layout as Shard or
Replicate over one mesh of contiguous ranks, which cannot express Megatron's fused, interleaved qkv over
pipeline stages. `sharded_rdt` records the slices that each worker's loaders cut and pulls only those, but its
producer first gathers a layer's full Hugging Face tensors, so it reduces the traffic and not the gathering,
and it needs Ray Direct Transport over NIXL on both sides. A source of slices cut directly from Megatron's
shards is what is missing.
"""

import os
import select
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.v1.sample.logits_processor import MinPLogitsProcessor

from megatron_fipo.engine.vllm_start import MIN_P, OWNER_VARIABLE
from megatron_fipo.weight_sync.checksum import Checksums
from megatron_fipo.weight_sync.shared_memory import read_bucket

BACKEND = "megatron_fipo"


@dataclass
class BucketInfo(NCCLWeightTransferUpdateInfo):
    """Names, dtypes and shapes of the next tensors: in the file `path`, or over NCCL if it is None."""

    path: str | None = None
    check: bool = True
    """Compute checksums."""


class BucketTransfer(NCCLWeightTransferEngine):
    """The backend `megatron_fipo` in one worker.

    Its NCCL path is written against vLLM 0.32 and has not run on hardware.
    """

    update_info_cls = BucketInfo
    model: Any

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.checksums = Checksums()
        """Of each tensor received in this update, computed from its receive buffer."""
        self._loading = False

    def init_transfer_engine(self, init_info: Any) -> None:
        """Join a communicator after leaving the previous one, whose buffers vLLM would keep."""
        self.shutdown()
        super().init_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        if (
            self._loading
        ):  # incomplete update: tensors that its layers received would count as received in this one
            super().finish_weight_update()
        if self.device.type == "cpu":
            # On a CPU vLLM packs the experts' weights only when it makes their kernel, not when it reloads them. Without a
            # kernel it makes one.
            for module in self.model.modules():
                if isinstance(module, RoutedExperts):
                    module.quant_method.moe_kernel = None
        super().start_weight_update()
        self._loading, self.checksums = True, Checksums()

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._loading = False
        if self.device.type == "cpu":
            # On a CPU a head keeps a packed copy. If tied to the embedding it receives nothing, so vLLM keeps
            # the old copy.
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        assert isinstance(update_info, BucketInfo)
        model: Any = _ChecksumModel(self.model, self.checksums) if update_info.check else self.model
        if update_info.path is not None:
            model.load_weights(
                read_bucket(update_info.path, update_info.names, update_info.dtype_names, update_info.shapes)
            )
            return
        target: Any = self.model
        self.model = model
        try:
            super().receive_weights(update_info)
        finally:
            self.model = target


class _ChecksumModel:
    """Wraps a model's `load_weights` to record the checksum of each tensor before the model loads it."""

    def __init__(self, model: Any, checksums: Checksums) -> None:
        self._model = model
        self._checksums = checksums

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        return self._model.load_weights(self._with_checksums(weights))

    def _with_checksums(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self._checksums.add(name, tensor)
            yield name, tensor


WeightTransferEngineFactory.register_engine(BACKEND, BucketTransfer)


class WorkerExtension:
    """Methods added to vLLM's worker class, called by `collective_rpc`."""

    weight_transfer_engine: Any

    def received_checksums(self) -> dict[str, str]:
        """Checksums of the current update."""
        return self.weight_transfer_engine.checksums.finish()


class NormalizedLogits(MinPLogitsProcessor):
    """Turns logits into log-probs, after temperature and before truncation. Sampling is not affected.

    With `logprobs_mode="processed_logits"` vLLM then returns the log-prob of the sampled token over the full
    vocabulary. vLLM's own modes give it before temperature (`raw_logprobs`) or renormalised over the nucleus
    (`processed_logprobs`).

    vLLM truncates by min-p before it calls this. So a request brings its min-p as the extra argument `MIN_P`, and this class
    truncates after it has normalised.
    """

    def update_state(self, batch_update: Any) -> None:
        if batch_update is not None:
            added = [
                (index, SamplingParams(min_p=(params.extra_args or {}).get(MIN_P, 0.0)), *tokens)
                for index, params, *tokens in batch_update.added
            ]
            batch_update = replace(batch_update, added=added)
        super().update_state(batch_update)

    def apply(self, logits: Tensor) -> Tensor:
        """[rows, V] float32."""
        return super().apply(torch.log_softmax(logits, dim=-1))


def _end_with_owner() -> None:
    """End vLLM's engine process (this one, or this worker's parent) when the actor's process ends.

    vLLM's engine process does not notice that its parent was killed and would keep its GPU forever.
    """
    owner = int(os.environ[OWNER_VARIABLE])
    engine_process = os.getpid() if os.getppid() == owner else os.getppid()

    def wait_for_end() -> None:
        try:
            poll = select.poll()
            poll.register(os.pidfd_open(owner), select.POLLIN)
            poll.poll()
        except ProcessLookupError:
            pass
        os.kill(engine_process, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait_for_end, name="end-with-owner", daemon=True).start()


if os.environ.get(OWNER_VARIABLE, str(os.getpid())) != str(os.getpid()):  # the actor imports this module too
    _end_with_owner()
