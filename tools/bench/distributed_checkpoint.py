"""Saving and loading a distributed checkpoint (weights and optimizer) against `cp` of the same bytes.

    python -m tools.bench.distributed_checkpoint [--layers 4] [--folder DIR]     # a minute; prints the table of docs/benchmarks.md

One rank on CPU, a Qwen2-shaped model with random weights in bfloat16 and Adam's state in float32. *Training waits* is the time
until `CheckpointWriter.start` returns, after which the next update may begin; *hash* is that of the manifest. Best of 3.
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_checkpoint
from megatron_fipo.checkpoint.manifest import check_files, hash_files, read_manifest, write_manifest
from megatron_fipo.checkpoint.random_weights import write_random_model
from megatron_fipo.config import HeadConfig, ModelConfig, OptimizerSettings, ParallelConfig
from megatron_fipo.model import parallel
from megatron_fipo.trainer.rank_model import RankModel
from tools.bench.harness import heading, parser, table

ROUNDS = 3
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151_936,
}


def make_policy(folder: Path, layers: int) -> RankModel:
    """A policy whose optimizer has taken a step, so that it has a state."""
    (folder / "config").mkdir()
    (folder / "config/config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    write_random_model(folder / "config", folder / "model", seed=1, dtype=torch.bfloat16)
    sizes = ParallelConfig()
    parallel.initialize(sizes, seed=1)
    model = ModelConfig(path=str(folder / "model"), dtype="bfloat16")
    policy = RankModel(model, sizes, HeadConfig(), OptimizerSettings(), 1.0, torch.device("cpu"))
    policy.load_hf(folder / "model")
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    policy.optimizer.step()
    return policy


def measure(policy: RankModel, folder: Path) -> dict[str, float]:
    """Seconds of each phase, one after the other, and the bytes written."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[name], start = now - start, now

    target = folder / "checkpoint"
    (target / "weights").mkdir(parents=True)
    writer = CheckpointWriter()
    writer.start(policy.modules, policy.optimizer, target / "weights", asynchronous=True)
    lap("training waits")
    writer.finished(blocking=True)
    lap("written in the background")
    write_manifest(target, hash_files(target), {})
    lap("hash")
    assert not check_files(target, read_manifest(target))
    lap("check every byte")
    load_checkpoint(policy.modules, policy.optimizer, target / "weights")
    lap("load")
    subprocess.run(["cp", "-r", target, folder / "copy"], check=True)
    lap("cp")
    seconds["bytes"] = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    shutil.rmtree(target)
    shutil.rmtree(folder / "copy")
    return seconds


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--folder", type=Path, help="folder of the files (default: a temporary one)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        policy = make_policy(folder, arguments.layers)
        rounds = [measure(policy, folder) for _ in range(ROUNDS)]
        dist.destroy_process_group()
    best = {name: min(seconds[name] for seconds in rounds) for name in rounds[0]}
    size = best.pop("bytes")
    print(heading(f"{size / 1e9:.2f} GB") + "\n")
    rows = [(name, f"{value / best['cp']:.2f}", f"{value:.2f} s") for name, value in best.items()]
    print(table(("phase", "time / cp", "time"), rows))


if __name__ == "__main__":
    main()
