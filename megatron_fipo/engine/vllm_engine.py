"""The rollout engine on vLLM: an asynchronous Ray actor around `vllm.AsyncLLMEngine`.

This module runs in the actor's process. vLLM's engine process is its child, and the worker processes are
children of that one; `vllm_worker.py` runs in the workers.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from torch import Tensor

from megatron_fipo.engine.protocol import (
    NO_WEIGHTS,
    EngineStatus,
    Generation,
    GenerationRequest,
    SamplingParams,
)
from megatron_fipo.engine.stop_strings import Decode, StopStrings, decoder
from megatron_fipo.engine.vllm_requests import ended_across, generation_of, sampling_of
from megatron_fipo.engine.vllm_start import (
    ModelFacts,
    VLLMSettings,
    check_model,
    check_routes,
    check_vllm,
    check_weights,
    engine_config,
    error_reason,
    prepare_environment,
    read_model,
)
from megatron_fipo.errors import UserError, logs_place
from megatron_fipo.network import node_address
from megatron_fipo.weight_sync.shared_memory import description, in_shared_memory


class VLLMEngine:
    """A `RolloutEngine`: an actor that owns vLLM's engine process and workers, on one node unless `spans_nodes`.

    Each request is one vLLM request; vLLM batches all requests that run. With `deterministic` a response depends on its
    request's seed and the weights, and one call runs at a time, as one batch that is complete before its first step, so that
    the same call gives the same bits. Without it requests have no seed: vLLM samples all rows of a batch together.

    Log-probs are those over the full vocabulary, before truncation, after the temperature of training. If that is 1, a request
    of another temperature (evaluation) also gets those of temperature 1; else each request gets those of its own
    temperature. At temperature 0 (greedy) they are those of temperature 1.
    """

    requests_per_call: ClassVar[int] = 16
    calls_at_once: ClassVar[int] = 64

    def __init__(
        self,
        model_path: str,
        dtype: str,
        *,
        max_model_len: int,
        trust_remote_code: bool = False,
        load_weights: bool = True,
        tensor_parallel_size: int = 1,
        gpu_memory_share: float = 0.85,
        deterministic: bool = False,
        spans_nodes: bool = False,
        temperature: float = 1.0,
        stop_strings: bool = False,
        routes: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Store the arguments. `ready` loads, so that the caller gets its errors unwrapped.

        `max_model_len` is the longest prompt plus response. Without `load_weights` the folder's weights are not read.
        `temperature` is that of training; `stop_strings` says whether requests may have some, `routes` whether generations have
        routes; `arguments` are further ones of vLLM's engine.
        """
        given = dict(arguments or {})
        self._settings = VLLMSettings(
            model_path=model_path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            load_weights=load_weights,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_share=gpu_memory_share,
            max_num_seqs=given.pop("max_num_seqs", self.requests_per_call * self.calls_at_once),
            deterministic=deterministic,
            spans_nodes=spans_nodes,
            temperature=temperature,
            stop_strings=stop_strings,
            routes=routes,
            arguments=given,
        )
        self._decode: Decode | None = None
        self._gpu = False
        self._llm: Any = None
        self._stats: Any = None
        self._model: ModelFacts
        self._version = NO_WEIGHTS
        self._update: _Update | None = None
        self._worker_updating = False
        self._loading = asyncio.Lock()
        self._batch = asyncio.Lock()
        self._running: set[str] = set()
        self._requests = 0
        self._aborts = 0

    async def ready(self) -> EngineStatus:
        """Start vLLM and load the model (once), in a thread, so that `status` returns meanwhile.

        Raises `UserError` if vLLM is missing or its version is not supported, the folder is refused (see
        `load_model` and `check_weights`), vLLM does not know the architecture, or the sizes do not fit (tensor
        parallelism, memory, length).
        """
        async with self._loading:
            if self._llm is None:
                self._llm = await asyncio.to_thread(self._start)
                await self._llm.get_supported_tasks()  # else the first request would do this, half registered
                self._version = 0 if self._settings.load_weights else NO_WEIGHTS
        return await self.status()

    def _start(self) -> Any:
        check_vllm()
        import torch

        self._gpu = torch.cuda.is_available()
        self._model = read_model(self._settings)
        prepare_environment(self._gpu, node_address(), self._settings)
        from vllm import AsyncLLMEngine
        from vllm.platforms import current_platform

        check_routes(self._settings)
        check_model(
            self._settings, self._model, current_platform.get_device_total_memory() if self._gpu else None
        )
        check_weights(self._settings)
        path = self._settings.model_path
        try:
            config = engine_config(self._settings, self._gpu)
        except (ValueError, OSError, TypeError, NotImplementedError) as error:
            given = "".join(
                f", rollout.vllm.{name}={value}" for name, value in self._settings.arguments.items()
            )
            raise UserError(
                f"vLLM refuses model.path {path}{given} (max_model_len is rollout.max_prompt_length + "
                f"rollout.max_response_length): {error_reason(error)}"
            ) from error
        try:
            return AsyncLLMEngine.from_vllm_config(
                config, stat_loggers=[self._core_stats], disable_log_stats=True
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"vLLM could not load model.path {path}: {error_reason(error)}; its log is in {logs_place(socket.gethostname())}"
            ) from error

    def _core_stats(self, config: Any, engine_index: int) -> Any:
        from megatron_fipo.engine.vllm_stats import CoreStats

        self._stats = CoreStats(config, engine_index)
        return self._stats

    async def status(self) -> EngineStatus:
        """Raises `RuntimeError` if vLLM's engine process is dead."""
        if self._llm is None or self._stats is None:
            return EngineStatus(self._version, 0)
        if self._llm.errored:
            raise RuntimeError("vLLM's engine process is dead")
        cache = self._llm.vllm_config.cache_config
        return self._stats.status(self._version, cache.num_gpu_blocks * cache.block_size)

    # -- generation ------------------------------------------------------------------------------------------

    async def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        """Generate each request's response to its end.

        Raises `UserError` if prompt and limit exceed `max_model_len`, or for stop strings that the engine did not expect.
        """
        if sampling.stop and not self._settings.stop_strings:
            raise UserError("the engine has no tokenizer for stop strings; set rollout.stop")
        if self._version == NO_WEIGHTS or self._update is not None:
            raise RuntimeError("generate() was called before there were weights or during a weight update")
        for request in requests:
            if len(request.prompt_ids) + sampling.max_new_tokens > self._settings.max_model_len:
                raise UserError(
                    f"request {request.request_id} has a prompt of {len(request.prompt_ids)} tokens, which "
                    f"with a response of {sampling.max_new_tokens} exceeds the engine's "
                    f"{self._settings.max_model_len}; raise rollout.max_prompt_length"
                )
        version, aborts = self._version, self._aborts
        ids = [f"{self._requests + index}" for index in range(len(requests))]
        self._requests += len(ids)
        self._running.update(ids)
        try:
            if self._settings.deterministic:
                async with self._batch:
                    async with self._paused():
                        collectors = await self._submit(ids, requests, sampling, aborts)
                    outputs = [await collector.get() for collector in collectors]
            else:
                collectors = await self._submit(ids, requests, sampling, aborts)
                outputs = [await collector.get() for collector in collectors]
        except BaseException:
            await self._llm.abort(ids)  # else the rest of the call would run with no receiver
            raise
        finally:
            self._running.difference_update(ids)
        generations = [generation_of(output, version) for output in outputs]
        if sampling.stop:
            stop = StopStrings(sampling.stop, self._decoder())
            generations = [
                ended_across(stop, request, generation)
                for request, generation in zip(requests, generations, strict=False)
            ]
        return generations + [Generation.not_started(version)] * (len(requests) - len(outputs))

    def _decoder(self) -> Decode:
        if self._decode is None:
            self._decode = decoder(self._settings.model_path, self._settings.trust_remote_code)
        return self._decode

    async def _submit(
        self, ids: Sequence[str], requests: Sequence[GenerationRequest], sampling: SamplingParams, aborts: int
    ) -> list[Any]:
        """Submit requests to vLLM in order until an abort.

        Returns one output collector for each; `get` waits for its end.
        """
        from vllm.inputs import tokens_input

        collectors: list[Any] = []
        for request_id, request in zip(ids, requests, strict=True):
            if self._aborts != aborts:
                break
            prompt = tokens_input([*request.prompt_ids, *request.prefix.tolist()])
            collectors.append(
                await self._llm.add_request(
                    request_id, prompt, sampling_of(request, sampling, self._settings, self._model.end_ids)
                )
            )
        return collectors

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Within it vLLM queues requests and runs none."""
        await self._llm.pause_generation(mode="keep", clear_cache=False)
        try:
            yield
        finally:
            await self._llm.resume_generation()

    async def abort(self) -> None:
        self._aborts += 1
        await self._llm.abort(list(self._running))

    # -- weights ---------------------------------------------------------------------------------------------

    async def begin_weight_update(self, check: bool) -> None:
        """Stop generation and discard all cached keys and values. Without `check`, no checksums are computed.

        A second call discards an incomplete update.
        """
        self._update = _Update(self._model, check)  # from now on `generate` raises
        # Also ends calls that are still submitting requests, which the pause would only queue.
        await self.abort()
        await self._llm.pause_generation(mode="abort", clear_cache=True)
        if self._worker_updating:
            self._worker_updating = False
            await self._llm.finish_weight_update()
        await self._llm.start_weight_update()
        self._worker_updating = True

    async def load_weights(self, bucket: dict[str, Tensor]) -> None:
        """Send the tensors to every worker, through shared memory of the bucket's size.

        Raises `UserError` for a name, shape or dtype that the model does not have, and for a weight already
        received in this update.
        """
        update = self._current_update()
        update.record(description(bucket))
        with in_shared_memory(bucket) as info:
            await self._update_workers({**info, "check": update.check})

    async def nccl_init(self, info: dict[str, Any]) -> None:
        """Join the trainer's NCCL group. Returns when all ranks have joined.

        `info` has the fields of vLLM's `NCCLWeightTransferInitInfo`. Like `nccl_update`, this is written
        against vLLM 0.32 and has not run on hardware.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def nccl_update(self, info: dict[str, Any]) -> None:
        """Receive the tensors that the trainer broadcasts meanwhile.

        `info` has their `names`, `dtype_names` and `shapes` in the trainer's order.
        """
        update = self._current_update()
        update.record(info)
        await self._update_workers({**info, "check": update.check})

    async def _update_workers(self, info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        try:
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info=info))
        except BaseException:
            self._worker_updating = False  # vLLM itself ends a failed update
            raise

    async def finish_weight_update(self, version: int) -> dict[str, str]:
        """Adopt `version`.

        If the update began with `check`, return the checksums that the workers computed from their receive
        buffers.

        Raises `UserError` if a weight of the model was not received; tied weights may come under either name.
        """
        update = self._current_update()
        missing = update.missing()
        if missing:
            raise UserError(
                f"the weight update lacks {len(missing)} of the engine's tensors, the first is {missing[0]}"
            )
        checksums: dict[str, str] = {}
        if update.check:
            checksums, *others = await self._llm.collective_rpc("received_checksums")
            for worker, other in enumerate(others, start=1):
                for name in checksums:
                    if other.get(name) != checksums[name]:
                        raise RuntimeError(
                            f"workers 0 and {worker} of the rollout engine received different bytes for "
                            f"{name}"
                        )
        await self._llm.finish_weight_update(str(version))
        self._worker_updating = False
        await self._llm.resume_generation()
        self._version, self._update = version, None
        return checksums

    def _current_update(self) -> "_Update":
        if self._update is None:
            raise RuntimeError("weights came outside begin_weight_update() and finish_weight_update()")
        return self._update

    # -- memory ----------------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Free the GPU memory of weights and KV cache. Does nothing on a CPU."""
        if self._gpu:
            await self._llm.sleep(level=2)
            self._version = NO_WEIGHTS

    async def wake(self) -> None:
        """Allocate the memory again. The weights are undefined until the next update."""
        if self._gpu:
            await self._llm.wake_up()


class _Update:
    """The weights received in one update so far, checked against the model's."""

    def __init__(self, model: ModelFacts, check: bool) -> None:
        self.check = check
        self._weights = model.weights
        self._received: set[str] = set()

    def record(self, info: dict[str, Any]) -> None:
        """Record the tensors of `names`, `dtype_names`, `shapes`.

        If one does not fit, raises `UserError` and records none.
        """
        names: list[str] = info["names"]
        for name, dtype, shape in zip(names, info["dtype_names"], info["shapes"], strict=True):
            weight = self._weights.get(name)
            if weight is None:
                raise UserError(
                    f"the rollout engine has no weight {name}; model.path and the trained model differ in "
                    "architecture"
                )
            if (weight.shape, weight.dtype) != (tuple(shape), f"torch.{dtype}"):
                raise UserError(
                    f"weight {name} is {weight.shape} {weight.dtype} in the rollout engine but "
                    f"{tuple(shape)} torch.{dtype} in the trainer; both must come from the same model.path "
                    "and model.dtype"
                )
            if name in self._received:
                raise UserError(f"weight {name} came twice in one weight update; begin the update again")
        self._received.update(names)

    def missing(self) -> list[str]:
        """Weights not received under any of their names."""
        storages = {self._weights[name].storage for name in self._received}
        return [name for name, weight in self._weights.items() if weight.storage not in storages]
