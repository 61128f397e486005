"""Pushing weights into engines in this process, with Ray's object store and calls stood in for by `handles.py`.

The same with real actors is in `tests/system`.
"""

import pickle
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.protocol import SamplingParams
from megatron_fipo.errors import UserError
from megatron_fipo.weight_sync.checksum import tensor_checksum
from megatron_fipo.weight_sync.object_store import (
    Bucket,
    _buckets,
    first_difference,
    push_weights,
)
from megatron_fipo.weight_sync.transport import Transport, WeightSyncError, transport_for
from tests.engine.conftest import loaded
from tests.engine.tiny import save_model, some_requests
from tests.generations import ids
from tests.weight_sync.handles import Stored, handles

VICTIM = "model.layers.1.mlp.up_proj.weight"


class Troubled(LocalEngine):
    """A local engine whose trouble is the function put into it, called with each bucket before it is loaded."""

    trouble = staticmethod(lambda bucket: bucket)

    def load_weights(self, bucket: dict[str, torch.Tensor]) -> None:
        super().load_weights(self.trouble(bucket))


@pytest.fixture(autouse=True)
def object_store(monkeypatch):
    monkeypatch.setattr(ray, "put", Stored)


@pytest.fixture(scope="module")
def new_weights(tmp_path_factory) -> dict[str, torch.Tensor]:
    return load_file(save_model(tmp_path_factory.mktemp("new"), seed=9) / "model.safetensors")


@pytest.fixture
def engines(model_folder: Path) -> list[Troubled]:
    found = [Troubled(str(model_folder), "float32", load_weights=False) for _ in range(2)]
    for engine in found:
        engine.ready()
    return found


class Export:
    """The tensors as a trainer's rank 0 gets them, and how far it went."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self.exhausted = False

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.weights.items()
        self.exhausted = True


def push(
    weights: dict[str, torch.Tensor], *engines, timeout_s: float = 60.0, check: bool = True, version: int = 3
) -> None:
    export = Export(weights)
    with handles(*engines) as actors:
        try:
            push_weights(export, actors, version, bucket_bytes=10_000, timeout_s=timeout_s, check=check)
        finally:
            assert export.exhausted, "the collective export was left halfway"


@pytest.mark.parametrize("check", [True, False])
def test_pushed_weights_serve_as_a_fresh_engine_does(engines, new_weights, tmp_path, check):
    push(new_weights, *engines, check=check)
    fresh = loaded(save_model(tmp_path, seed=9))
    sampling = SamplingParams(1.0, 1.0, 12)
    expected = [ids(generation) for generation in fresh.generate(some_requests(), sampling)]
    for engine in engines:
        assert engine.status().weight_version == 3
        assert [ids(generation) for generation in engine.generate(some_requests(), sampling)] == expected


def test_one_wrong_bit_is_named_with_engine_and_tensor(engines, new_weights):
    def flip(bucket: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bucket = {name: tensor.clone() for name, tensor in bucket.items()}
        if VICTIM in bucket:
            bucket[VICTIM].view(torch.int32)[3, 5] ^= 1
        return bucket

    engines[1].trouble = flip
    with pytest.raises(
        WeightSyncError, match=f"engine 1 holds other weights than were sent for version 3: {VICTIM} differs"
    ):
        push(new_weights, *engines)
    push(new_weights, *engines, check=False)


def test_a_tensor_that_the_engine_passes_over_is_named(engines, new_weights):
    """The engine has had all weights before, so that it does not notice by itself, and leaves one of the next ones out."""
    push(new_weights, *engines)

    def lose(bucket: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        engines[0]._received.add(VICTIM)
        return {name: tensor for name, tensor in bucket.items() if name != VICTIM}

    engines[0].trouble = lose
    with pytest.raises(
        WeightSyncError, match=f"engine 0 holds other weights than were sent for version 4: {VICTIM} differs"
    ):
        push({name: tensor + 1 for name, tensor in new_weights.items()}, *engines, version=4)


def test_what_the_engine_refuses_arrives_as_itself(engines, new_weights):
    with pytest.raises(UserError, match=rf"lacks 1 of the engine's tensors, the first is {VICTIM}"):
        push({name: tensor for name, tensor in new_weights.items() if name != VICTIM}, *engines)
    with pytest.raises(UserError, match="the rollout engine has no weight extra"):
        push({"extra": torch.zeros(3), **new_weights}, *engines)


def test_an_engine_that_fails_or_dies_is_named(engines, new_weights):
    def fail(bucket: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise ArithmeticError("an unlucky bucket")

    def die(bucket: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise ray.exceptions.ActorDiedError

    engines[1].trouble = fail
    with pytest.raises(
        WeightSyncError,
        match=r"engine 1 failed while taking the weights: ArithmeticError\('an unlucky bucket'\)",
    ):
        push(new_weights, *engines)
    engines[1].trouble = die
    with pytest.raises(
        WeightSyncError, match=r"engine 1 died while taking the weights \(ActorDiedError\)"
    ) as caught:
        push(new_weights, *engines)
    assert pickle.loads(pickle.dumps(caught.value)).engine == 1


@pytest.mark.parametrize("method", ["begin_weight_update", "load_weights", "finish_weight_update"])
def test_the_deadline_holds_wherever_an_engine_hangs(engines, new_weights, monkeypatch, method):
    released = threading.Event()
    monkeypatch.setattr(engines[1], method, lambda *args: released.wait(30))
    export = Export(new_weights)
    with handles(*engines) as actors:
        started = time.monotonic()
        try:
            with pytest.raises(
                WeightSyncError, match=r"engine 1 did not take the weights within rollout\.timeout_s = 0\.3 s"
            ):
                push_weights(export, actors, 3, bucket_bytes=10_000, timeout_s=0.3, check=True)
            assert time.monotonic() - started < 5
        finally:
            released.set()
    assert export.exhausted


def test_the_engine_that_fails_is_named_while_another_is_slow(engines, new_weights):
    released = threading.Event()

    def fail(bucket: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        threading.Timer(0.5, released.set).start()
        raise ArithmeticError("at once")

    engines[0].trouble = lambda bucket: released.wait(30) and bucket
    engines[1].trouble = fail
    with pytest.raises(WeightSyncError, match="engine 1 failed"):
        push(new_weights, *engines)


def test_slow_engines_bound_what_is_in_memory(engines):
    """Beside the object store: the bucket being put there, the one being made and the tensor that did not fit into it."""
    alive: list[weakref.ref] = []
    most = taking = most_at_once = 0

    def export() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(30):
            tensor = torch.full((1000,), float(index))
            alive.append(weakref.ref(tensor))
            yield f"t{index}", tensor
            del tensor

    class SlowEngine:
        def begin_weight_update(self, check: bool) -> None: ...

        def load_weights(self, bucket: dict[str, torch.Tensor]) -> None:
            """Not done before the trainer has come as it can without this engine."""
            nonlocal taking, most, most_at_once
            taking += 1
            most_at_once = max(most_at_once, taking)
            self.held = getattr(self, "held", {}) | {
                name: tensor_checksum(name, tensor) for name, tensor in bucket.items()
            }
            made = -1
            while made != len(alive):
                made = len(alive)
                time.sleep(0.1)
            most = max(most, sum(reference() is not None for reference in alive))
            taking -= 1

        def finish_weight_update(self, version: int) -> dict[str, str]:
            return self.held

    engine = SlowEngine()
    with handles(engine) as actors:
        push_weights(export(), actors, 1, bucket_bytes=12_000, timeout_s=60, check=True)
    assert len(engine.held) == 30
    assert 3 < most <= 3 + 3 + 1
    assert most_at_once == 1, "calls to an actor with several threads may overtake each other"


def test_ranks_without_tensors_only_iterate():
    export = Export({f"t{index}": None for index in range(3)})
    push_weights(export, {}, 1, bucket_bytes=10, timeout_s=1, check=True)
    assert export.exhausted


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(12, generator=generator).to(torch.bfloat16),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 5),
        "view": torch.randn(100, 100, generator=generator)[:7, 3:9],
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "one of a column": torch.randn(5, 3, generator=generator)[2:3, 1],
        "empty, of numpy": torch.from_numpy(np.empty((0, 2), np.int64)),
    }


def test_a_bucket_travels_beside_the_pickle_and_without_the_storage_around_it():
    tensors = some_tensors()
    stored = Stored(Bucket(tensors))
    assert len(stored.pickled) < 3000
    assert sum(map(len, stored.buffers)) == sum(tensor.nbytes for tensor in tensors.values())
    arrived = stored.value()
    assert type(arrived) is dict
    assert list(arrived) == list(tensors)
    for name, tensor in tensors.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor), name


@given(st.dictionaries(st.text("abc", min_size=1), st.text("01"), max_size=5), st.data())
def test_the_first_difference_is_named(sent, data):
    assert first_difference(sent, dict(reversed(sent.items()))) is None
    assert first_difference(sent, sent | {"z": "0"}) == "z was not sent"
    if sent:
        wrong = data.draw(st.sets(st.sampled_from(sorted(sent)), min_size=1))
        lost = data.draw(st.sets(st.sampled_from(sorted(sent))))
        held = {name: checksum + "x" * (name in wrong) for name, checksum in sent.items() if name not in lost}
        first = next(name for name in sent if name in wrong | lost)
        assert first_difference(sent, held) == f"{first} {'is missing' if first in lost else 'differs'}"


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 100))
def test_buckets_keep_order_and_stay_within_the_limit(sizes, limit):
    tensors = [
        (f"t{index}", torch.full((size,), index, dtype=torch.uint8)) for index, size in enumerate(sizes)
    ]
    buckets = list(_buckets(tensors, limit))
    assert [name for bucket in buckets for name in bucket] == [name for name, _ in tensors]
    for bucket in buckets:
        assert sum(tensor.nbytes for tensor in bucket.values()) <= limit or len(bucket) == 1


def test_only_engines_with_gpus_of_their_own_use_nccl():
    chosen = {
        (engine, device, colocated): transport_for(engine, device, colocated)
        for engine in ("local", "vllm")
        for device in ("cpu", "cuda")
        for colocated in (False, True)
    }
    assert [case for case, transport in chosen.items() if transport is Transport.NCCL] == [
        ("vllm", "cuda", False)
    ]
