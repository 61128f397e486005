"""Saving and loading a distributed checkpoint (weights and optimizer): time against `cp` of the same bytes, and memory of a save.

    python -m tools.bench.distributed_checkpoint [--layers 4] [--folder DIR]     # minutes; prints the tables of docs/benchmarks.md

Ranks on CPU, a Qwen2-shaped model with random weights in bfloat16 and Adam's state in float32. Time: one rank; *training waits* is
the time until `CheckpointWriter.start` returns, after which the next update may begin; *hash* is that of the manifest. Best of 3.
Memory: data or context ranks of a model with a smaller vocabulary, the rank with the most of each. *Written* is what the rank writes,
which is also what it copies from a GPU; *save* and *load* are what `start` and `load_checkpoint` add to its resident set at most
(device and host are the same memory here, and fork copies nothing); *own part* is 14 bytes per parameter, divided by the ranks.
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
from torch.multiprocessing import spawn

from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_checkpoint
from megatron_fipo.checkpoint.manifest import (
    check_files,
    hash_files,
    list_files,
    read_manifest,
    write_manifest,
)
from megatron_fipo.checkpoint.random_weights import write_random_model
from megatron_fipo.config import HeadConfig, ModelConfig, OptimizerSettings, ParallelConfig
from megatron_fipo.model import parallel
from megatron_fipo.trainer.rank_model import RankModel
from tools.bench.harness import heading, parser, peak_of, table

ROUNDS = 3
LAYOUTS = {
    "data 2": ParallelConfig(data_parallel_size=2),
    "data 4": ParallelConfig(data_parallel_size=4),
    "context 2": ParallelConfig(context_parallel_size=2),
    "context 4": ParallelConfig(context_parallel_size=4),
}
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


def write_model(folder: Path, **changes: int) -> Path:
    (folder / "config").mkdir(parents=True)
    (folder / "config/config.json").write_text(json.dumps({**CONFIG, **changes}))
    write_random_model(folder / "config", folder / "model", seed=1, dtype=torch.bfloat16)
    return folder / "model"


def make_policy(folder: Path, sizes: ParallelConfig) -> RankModel:
    """A policy whose optimizer has taken a step, so that it has a state."""
    parallel.initialize(sizes, seed=1)
    model = ModelConfig(path=str(folder), dtype="bfloat16")
    policy = RankModel(model, sizes, HeadConfig(), OptimizerSettings(), 1.0, torch.device("cpu"))
    policy.load_hf(folder)
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
    write_manifest(target, hash_files(target, list_files(target)), {})
    lap("hash")
    assert not check_files(target, read_manifest(target).files)
    lap("check every byte")
    load_checkpoint(policy.modules, policy.optimizer, target / "weights")
    lap("load")
    subprocess.run(["cp", "-r", target, folder / "copy"], check=True)
    lap("cp")
    seconds["bytes"] = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    shutil.rmtree(target)
    shutil.rmtree(folder / "copy")
    return seconds


def save_and_load(rank: int, world_size: int, model: Path, sizes: ParallelConfig, folder: Path) -> None:
    """One rank of a layout: stores [seconds waited, bytes: own part, written, save, load] in a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    policy = make_policy(model, sizes)
    writer, arguments = CheckpointWriter(), (policy.modules, policy.optimizer, folder / "weights")
    _, seconds, saving = peak_of(lambda: writer.start(*arguments, asynchronous=True))
    writer.finished(blocking=True)
    _, _, loading = peak_of(lambda: load_checkpoint(*arguments))
    own = 14 * sum(parameter.numel() for parameter in policy.modules[0].parameters()) / world_size
    written = sum(path.stat().st_size for path in (folder / "weights").glob(f"__{rank}_*"))
    (folder / f"rank_{rank}.json").write_text(json.dumps([seconds, own, written, saving, loading]))
    dist.barrier()
    dist.destroy_process_group()


def memory(model: Path, sizes: ParallelConfig, folder: Path) -> list[str]:
    """The cells of a layout's row."""
    (folder / "weights").mkdir(parents=True)
    spawn(save_and_load, (sizes.world_size, model, sizes, folder), nprocs=sizes.world_size)
    ranks = [json.loads(path.read_text()) for path in folder.glob("rank_*.json")]
    seconds, own, *others = (max(values) for values in zip(*ranks, strict=True))
    shutil.rmtree(folder)
    return [
        f"{own / 1e6:,.0f} MB",
        *(f"{size / 1e6:,.0f} MB ({size / own:.2f})" for size in others),
        f"{seconds:.2f} s",
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--folder", type=Path, help="folder of the files (default: a temporary one)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        policy = make_policy(write_model(folder, num_hidden_layers=arguments.layers), ParallelConfig())
        rounds = [measure(policy, folder) for _ in range(ROUNDS)]
        dist.destroy_process_group()
        del policy
        small = write_model(folder / "small", num_hidden_layers=arguments.layers, vocab_size=16_384)
        layouts = [(name, *memory(small, sizes, folder / name)) for name, sizes in LAYOUTS.items()]
    best = {name: min(seconds[name] for seconds in rounds) for name in rounds[0]}
    size = best.pop("bytes")
    print(heading(f"{size / 1e9:.2f} GB") + "\n")
    rows = [(name, f"{value / best['cp']:.2f}", f"{value:.2f} s") for name, value in best.items()]
    print(table(("phase", "time / cp", "time"), rows) + "\n")
    print(
        table(
            ("ranks", "own part", "written (/ own)", "save (/ own)", "load (/ own)", "training waits"),
            layouts,
        )
    )


if __name__ == "__main__":
    main()
