"""Hugging Face -> Megatron -> Hugging Face against `cp` of the same bytes: time and peak resident memory.

    python -m tools.bench.conversion [--layers 28] [--folder DIR]      # a few minutes; prints the table of docs/benchmarks.md

The model has the shape of Qwen2.5-1.5B with an untied output layer, random weights, bfloat16. Every measurement runs in a
process of its own and the entire list runs three times; time is the best, without starting Python and importing; CPU time (of
all threads) depends least on other load. Files are in the page cache beforehand for all methods if it is large enough.
`cp, synced` waits until the copy is on the disk, as to-megatron does. Memory is the process's peak, and beside it that before
converting; the highest of the runs.
"""

import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tools.bench.harness import heading, in_own_process, measurement, parser, peak_of, resident, table

ROUNDS = 3
HIDDEN, VOCABULARY = 1536, 151_936
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}


def measure(method: str, source: str, target: str) -> dict[str, float]:
    """Seconds, by phase too, and bytes of memory before and at the peak, in this process."""
    if method.startswith("cp"):
        start = time.perf_counter()
        subprocess.run(["cp", "-r", source, target], check=True)
        if method == "cp, synced":
            files = [path for path in Path(target).rglob("*") if path.is_file()]
            subprocess.run(["sync", *files], check=True)
        return {"seconds": time.perf_counter() - start, "cpu": _cpu(resource.RUSAGE_CHILDREN)}
    from megatron_fipo.checkpoint.convert import convert

    before = resident("VmRSS")
    marks: dict[str, tuple[float, float]] = {}

    def progress(what: str, done: int, total: int) -> None:
        begun, _ = marks.get(what, (time.perf_counter(), 0.0))
        marks[what] = (begun, time.perf_counter())

    cpu = _cpu(resource.RUSAGE_SELF)
    run = getattr(convert, method)
    _, seconds, growth = peak_of(lambda: run(Path(source), Path(target), "keep", progress))
    cpu = _cpu(resource.RUSAGE_SELF) - cpu
    phases = {what: end - begun for what, (begun, end) in marks.items()}
    return {"seconds": seconds, "cpu": cpu, "before": before, "peak": before + growth, **phases}


def _cpu(who: int) -> float:
    """Seconds of processor time, of all threads, in user and system mode."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _measure_all(folder: Path) -> dict[str, dict[str, float]]:
    """The best time, and the highest memory, of each method."""
    steps = (("cp", "hf"), ("cp, synced", "hf"), ("to_megatron", "hf"), ("to_hf", "to_megatron"))
    found: dict[str, dict[str, float]] = {}
    for _ in range(ROUNDS):
        for method, source in steps:
            shutil.rmtree(folder / method, ignore_errors=True)
            os.sync()
            arguments = (method, folder / source, folder / method)
            new = in_own_process("tools.bench.conversion", *arguments, threads=None)
            old = found.get(method, new)
            best = new if new["seconds"] < old["seconds"] else old
            best = {**best, "cpu": min(new["cpu"], old["cpu"])}
            memory = {key: max(new[key], old[key]) for key in ("before", "peak") if key in new}
            found[method] = {**best, **memory}
    return found


def _row(name: str, found: dict[str, float], reference: float, size: int) -> tuple[str, ...]:
    phases = [
        f"{what} {found[what]:.1f} s" for what in ("checking", "converting", "hashing") if what in found
    ]
    memory = "–"
    if "peak" in found:
        memory = f"{found['peak'] / 2**20:,.0f} MiB ({found['before'] / 2**20:,.0f} before)"
    seconds = found["seconds"]
    return (
        name,
        f"{seconds / reference:.2f}",
        f"{seconds:.1f} s",
        f"{size / seconds / 1e9:.2f} GB/s",
        f"{found['cpu']:.1f} s",
        ", ".join(phases) or "–",
        memory,
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=28, help="layers of the model (default 28: 3.5 GB)")
    options.add_argument("--folder", type=Path, help="disk to measure (default: the temporary folder's)")
    options.add_argument(
        "--measure", nargs=3, metavar=("METHOD", "SOURCE", "TARGET"), help="one measurement, as JSON"
    )
    arguments = options.parse_args()
    if measurement(measure, arguments.measure):
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name).resolve()
        (folder / "config").mkdir()
        config = json.dumps({**CONFIG, "num_hidden_layers": arguments.layers})
        (folder / "config" / "config.json").write_text(config)
        import torch

        from megatron_fipo.checkpoint.random_weights import write_random_model

        write_random_model(folder / "config", folder / "hf", seed=1, dtype=torch.bfloat16)
        size = sum(path.stat().st_size for path in (folder / "hf").iterdir())
        largest = 2 * VOCABULARY * HIDDEN
        print(heading(f"{size / 1e9:.2f} GB", f"largest tensor {largest / 2**20:,.0f} MiB") + "\n")
        found = _measure_all(folder)
        reference = found["cp, synced"]["seconds"]
        heads = ("", "time / cp, synced", "time", "rate", "CPU time", "of which", "peak memory")
        print(table(heads, [_row(*item, reference, size) for item in found.items()]))


if __name__ == "__main__":
    main()
