"""Hugging Face -> Megatron -> Hugging Face against `cp` of the same bytes: time and peak resident memory.

    python tools/bench/conversion.py [--layers 28] [--folder DIR]      # a few minutes; prints the table of docs/benchmarks.md

The model has the shape of Qwen2.5-1.5B with an output layer of its own, random weights, bfloat16. Every measurement runs in a
process of its own and the whole list runs three times; time is the best, without starting Python and importing; CPU time (of
all threads) is what a busy machine changes least. Files are in the page cache beforehand where it is large enough, for all
alike. `cp, synced` waits until the copy is on the disk, as to-megatron does. Memory is the process's peak (VmHWM), with what it
held before converting beside it; the highest of the runs.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from machine import describe_machine, resident

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


def measure(method: str, source: Path, target: Path) -> dict[str, float]:
    """Seconds, by phase too, and bytes of memory before and at the peak, in this process."""
    if method.startswith("cp"):
        start = time.perf_counter()
        subprocess.run(["cp", "-r", source, target], check=True)
        if method == "cp, synced":
            subprocess.run(["sync", *(path for path in target.rglob("*") if path.is_file())], check=True)
        return {"seconds": time.perf_counter() - start, "cpu": _cpu(resource.RUSAGE_CHILDREN)}
    from megatron_fipo.checkpoint.convert.convert import convert

    before = resident("VmRSS")
    marks: dict[str, tuple[float, float]] = {}

    def progress(what: str, done: int, total: int) -> None:
        begun, _ = marks.get(what, (time.perf_counter(), 0.0))
        marks[what] = (begun, time.perf_counter())

    Path("/proc/self/clear_refs").write_text("5")
    start, cpu = time.perf_counter(), _cpu(resource.RUSAGE_SELF)
    getattr(convert, method)(source, target, "keep", progress)
    seconds, cpu = time.perf_counter() - start, _cpu(resource.RUSAGE_SELF) - cpu
    phases = {what: end - begun for what, (begun, end) in marks.items()}
    return {"seconds": seconds, "cpu": cpu, "before": before, "peak": resident("VmHWM"), **phases}


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
            command = [
                sys.executable,
                __file__,
                "--measure",
                method,
                str(folder / source),
                str(folder / method),
            ]
            new = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            old = found.get(method, new)
            best = new if new["seconds"] < old["seconds"] else old
            best = {**best, "cpu": min(new["cpu"], old["cpu"])}
            found[method] = {
                **best,
                **{key: max(new[key], old[key]) for key in ("before", "peak") if key in new},
            }
    return found


def _row(name: str, found: dict[str, float], reference: float, size: int) -> str:
    phases = ", ".join(
        f"{what} {found[what]:.1f} s" for what in ("checking", "converting", "hashing") if what in found
    )
    memory = (
        f"{found['peak'] / 2**20:,.0f} MiB ({found['before'] / 2**20:,.0f} before)"
        if "peak" in found
        else "–"
    )
    seconds = found["seconds"]
    cells = (
        name,
        f"{seconds / reference:.2f}",
        f"{seconds:.1f} s",
        f"{size / seconds / 1e9:.2f} GB/s",
        f"{found['cpu']:.1f} s",
        phases or "–",
        memory,
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=28, help="layers of the model (default 28: 3.5 GB)")
    parser.add_argument("--folder", type=Path, help="disk to measure (default: the temporary folder's)")
    parser.add_argument(
        "--measure", nargs=3, metavar=("METHOD", "SOURCE", "TARGET"), help="one measurement, as JSON"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        method, source, target = arguments.measure
        print(json.dumps(measure(method, Path(source), Path(target))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        (folder / "config").mkdir()
        (folder / "config" / "config.json").write_text(
            json.dumps({**CONFIG, "num_hidden_layers": arguments.layers})
        )
        import torch

        from megatron_fipo.checkpoint.random_weights import write_random_model

        write_random_model(folder / "config", folder / "hf", seed=1, dtype=torch.bfloat16)
        size = sum(path.stat().st_size for path in (folder / "hf").iterdir())
        largest = 2 * VOCABULARY * HIDDEN
        print(
            f"{date.today()}, {describe_machine()}; {size / 1e9:.2f} GB, largest tensor {largest / 2**20:,.0f} MiB\n"
        )
        found = _measure_all(folder)
        print(
            "| | time / cp, synced | time | rate | CPU time | of which | peak memory |\n|---|---|---|---|---|---|---|"
        )
        reference = found["cp, synced"]["seconds"]
        print(*(_row(method, figures, reference, size) for method, figures in found.items()), sep="\n")


if __name__ == "__main__":
    main()
