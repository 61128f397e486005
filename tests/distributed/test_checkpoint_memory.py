"""A save copies no more than the rank's own part of weights and optimizer, under any number of replicas."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
from torch.profiler import ProfilerActivity, profile

from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_checkpoint
from megatron_fipo.checkpoint.random_weights import write_random_model
from megatron_fipo.config import ParallelConfig
from tests.distributed.test_distributed_checkpoint import forked_managers  # noqa: F401 (a fixture)
from tests.distributed.test_policy_grid import LAYOUTS
from tests.ranks import run_ranks
from tools.bench.distributed_checkpoint import make_policy

MOST = 1.3
"""Times the rank's own part, because of the messages of the plan and of what tensor-parallel ranks all have."""
BYTES_PER_PARAMETER = 14
"""bfloat16 weights; float32 weights and two moments."""
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 1024,
}


@pytest.fixture(scope="module")
def large_model():
    """3.1 million parameters, so that tensors outweigh the messages about them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config").mkdir()
        (folder / "config/config.json").write_text(json.dumps(CONFIG))
        write_random_model(folder / "config", folder / "model", seed=1, dtype=torch.bfloat16)
        yield folder / "model"


def peak_bytes(call, trace: Path) -> int:
    """The most bytes of tensors on the host during a call, beyond those before it, from torch's own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    profiled.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    assert len(events) > 10
    events.sort(key=lambda event: event["ts"])
    first = events[0]["args"]
    return max(event["args"]["Total Allocated"] for event in events) - (
        first["Total Allocated"] - first["Bytes"]
    )


def save_and_load(rank: int, world_size: int, folder: Path, sizes: ParallelConfig, target: Path):
    """Bytes of a rank's own part, what its save adds at most, what it writes, what its load adds at most."""
    torch.set_num_threads(1)
    policy = make_policy(folder, sizes)
    parameters = sum(parameter.numel() for parameter in policy.modules[0].parameters())
    own = BYTES_PER_PARAMETER * parameters / (sizes.data_parallel_size * sizes.context_parallel_size)
    writer, arguments = CheckpointWriter(), (policy.modules, policy.optimizer, target)
    trace = target.with_name(f"trace_{rank}.json")
    saving = peak_bytes(lambda: writer.start(*arguments, asynchronous=False), trace)
    written = sum((target / name).stat().st_size for name in writer.files)
    loading = peak_bytes(lambda: load_checkpoint(*arguments), trace)
    return own, saving, written, loading


@pytest.mark.parametrize("layout", ["1", "dp2", "dp4", "cp2", "cp4", "tp2-dp2"])
def test_a_save_copies_the_ranks_own_part_at_most(large_model, tmp_path, layout):
    sizes = LAYOUTS[layout]
    (tmp_path / "weights").mkdir()
    ranks = run_ranks(sizes.world_size, save_and_load, large_model, sizes, tmp_path / "weights")
    for own, saving, written, loading in ranks:
        assert 0.5 * own < written < MOST * own
        assert saving < MOST * own
        assert loading < MOST * own
