"""The push over NCCL with vLLM's trainer engine: its factory, handshake, order of calls and source checks.

Only the parts that need a GPU are replaced: creating the communicator, and the broadcast of packed buffers.
"""

from types import SimpleNamespace

import pytest
import ray
import torch

from megatron_fipo.checkpoint.hf_export import TensorInfo
from megatron_fipo.weight_sync.nccl import NcclTransport
from tests.engine.wire import WireEngine, broadcast
from tests.weight_sync.handles import handles

WEIGHTS = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16), "c": torch.randn(())}
INFOS = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in WEIGHTS.items()]


@pytest.fixture
def nccl_engine(monkeypatch):
    module = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    group = SimpleNamespace(destroy=lambda: None)
    monkeypatch.setattr(module, "open_trainer_endpoint", lambda info: group)
    return module


def vllm_like(nccl_engine) -> WireEngine:
    """An engine that accepts exactly what vLLM's worker accepts."""

    class VLLMLike(WireEngine):
        def nccl_init(self, info):
            self.inits.append(nccl_engine.NCCLWeightTransferEngine.init_info_cls(**info))

        def nccl_update(self, info):
            update = nccl_engine.NCCLWeightTransferEngine.update_info_cls(**info)
            assert [getattr(torch, name) for name in update.dtype_names] == [
                tensor.dtype for tensor in WEIGHTS.values()
            ]
            super().nccl_update(info)

    return VLLMLike()


def push(nccl_engine, monkeypatch, actors, infos) -> None:
    def send(iterator, group, src, post_iter_func, buffer_size_bytes, num_buffers) -> None:
        assert (src, buffer_size_bytes) == (0, 64)
        for _ in broadcast(iterator, {number: actor.engine for number, actor in actors.items()}):
            pass

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", send)
    sync = NcclTransport(
        lambda: iter(WEIGHTS.items()),
        infos,
        rank=0,
        device=torch.device("cpu"),
        workers_per_engine=2,
        buffer_bytes=64,
    )
    sync.push(actors, 7, timeout_s=30.0, check=True)


def test_vllm_sends_what_the_export_yields(nccl_engine, monkeypatch):
    with handles(vllm_like(nccl_engine), vllm_like(nccl_engine)) as actors:
        push(nccl_engine, monkeypatch, actors, INFOS)
        engines = [actor.engine for actor in actors.values()]
        for engine in engines:
            assert engine.version == 7
            assert all(torch.equal(engine.held[name], tensor) for name, tensor in WEIGHTS.items())
            (init,) = engine.inits
            assert (init.world_size, init.packed, init.packed_buffer_size_bytes) == (5, True, 64)
        assert [engine.inits[0].rank_offset for engine in engines] == [1, 3]


def test_vllm_refuses_an_export_in_another_order(nccl_engine, monkeypatch):
    with handles(vllm_like(nccl_engine)) as actors:
        with pytest.raises(ValueError, match="same parameters in the same order"):
            push(nccl_engine, monkeypatch, actors, INFOS[::-1])
        for _ in INFOS:  # the engine still waits for the rest
            actors[0].engine.wire.put(torch.zeros(12))
