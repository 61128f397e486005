"""What a rank sets up on its own node."""

import os
import socket
from datetime import timedelta

import psutil

from megatron_fipo.network import LOOPBACK
from megatron_fipo.trainer.rank import MegatronRank
from tests.ranks import run_ranks


def variables_and_listener(rank: int, world_size: int) -> tuple[str | None, list[str]]:
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    made = MegatronRank(0, 1, None)  # type: ignore[arg-type]
    host, port = made.rendezvous().split(":")
    store = made._store(f"{host}:{port}", timedelta(seconds=30))
    store.set("key", "value")
    assert store.get("key") == b"value"
    listening = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == int(port)
    ]
    with socket.create_connection((host, int(port)), timeout=5):
        pass
    return os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"), listening


def test_a_rank_sets_its_variables_and_its_store_listens_on_its_address_alone():
    assert run_ranks(1, variables_and_listener) == [("1", [LOOPBACK])]
