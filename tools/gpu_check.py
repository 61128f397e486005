"""Correctness, then speed, of everything that differs on a GPU; to be run whenever one is at hand.

    python tools/gpu_check.py                          # under 8 minutes on one H100 or H200; table and JSON in gpu-check/
    python tools/gpu_check.py --only loss,scan         # some sections
    python tools/gpu_check.py --rehearse               # toy sizes on a CPU: proves this script, measures nothing

Needs torch, Triton and Megatron-Core; this project need not be installed. What is missing (Transformer Engine, Liger, cut
cross-entropy) is skipped with its reason. Exits with 1 if a correctness check failed or did not finish, and only then. See docs/benchmarks.md.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "bench")]

from gpu.report import Report, Row, render  # noqa: E402
from gpu.runner import Section, run_cases, run_section  # noqa: E402

LIMIT_S = 455.0
"""Of the whole check, all sections together."""
REHEARSAL_PATIENCE = 4.0
"""Budgets are this many times as long in a rehearsal: CPUs are slow, and Triton's interpreter slower."""
SECTIONS = (
    Section("loss", "gpu.loss_check", 90.0, correctness=True),
    Section("head", "gpu.head_check", 60.0, correctness=True),
    Section("model", "gpu.model_check", 120.0, correctness=True),
    Section("ceilings", "gpu.ceilings", 20.0, correctness=False),
    Section("scan", "gpu.scan_bench", 75.0, correctness=False),
    Section("head-speed", "gpu.head_bench", 75.0, correctness=False),
    Section("step", "gpu.step_bench", 150.0, correctness=False),
)
IGNORED_VARIABLES = ("TRITON_INTERPRET", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""They would change what is measured."""
PACKAGES = {
    "torch": "torch",
    "Triton": "triton",
    "megatron-core": "megatron-core",
    "Transformer Engine": "transformer-engine",
    "Liger": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
}


def main() -> int:
    arguments = _arguments()
    if arguments.child:
        return run_cases(
            _named(arguments.child), arguments.from_case, Path(arguments.rows), lambda: _bench(arguments)
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    chosen = [_named(name) for name in arguments.only.split(",")] if arguments.only else list(SECTIONS)
    report = _run(chosen, arguments)
    table = render(report)
    (arguments.output / "table.md").write_text(table, encoding="utf-8")
    print("\n" + table, end="", flush=True)
    return 0 if report.correct else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-check"), help="folder for table, JSON, log and profile"
    )
    parser.add_argument(
        "--only", help="sections, with commas: " + ", ".join(section.name for section in SECTIONS)
    )
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    for internal in ("--child", "--rows"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--from-case", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _named(name: str) -> Section:
    for section in SECTIONS:
        if section.name == name.strip():
            return section
    raise SystemExit(f"no section {name!r}; there are {', '.join(section.name for section in SECTIONS)}")


def _run(chosen: list[Section], arguments: argparse.Namespace) -> Report:
    """Every chosen section, the JSON rewritten whenever a row arrives."""
    start = time.monotonic()
    patience = REHEARSAL_PATIENCE if arguments.rehearse else 1.0
    machine = describe_machine(arguments.rehearse)
    rows: list[Row] = []

    def report(finished: bool) -> Report:
        return Report(machine, list(rows), time.monotonic() - start, finished, arguments.rehearse)

    def say(row: Row) -> None:
        rows.append(row)
        print(
            f"[{time.monotonic() - start:5.0f} s] {row.section}: {row.name}: {row.result} ({row.verdict})",
            flush=True,
        )
        _write(report(False), arguments.output)

    (arguments.output / "step_profile.txt").unlink(missing_ok=True)
    log = arguments.output / "log.txt"
    log.write_text(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n", encoding="utf-8")
    environment = _environment(arguments.rehearse)
    for section in chosen:
        command = [sys.executable, __file__, "--child", section.name, "--output", str(arguments.output)]
        command += ["--rehearse"] if arguments.rehearse else []
        budget = Section(section.name, section.module, patience * section.budget_s, section.correctness)
        run_section(budget, command, environment, log, start + patience * LIMIT_S, say)
        _write(report(False), arguments.output)
    _write(report(True), arguments.output)
    return report(True)


def _write(report: Report, output: Path) -> None:
    """Whole or not at all: the check may be killed at any moment."""
    temporary = output / "gpu_check.json.part"
    temporary.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    temporary.replace(output / "gpu_check.json")


def _environment(rehearsal: bool) -> dict[str, str]:
    """Of the children: one process that talks to itself only, set up as the trainer sets up its ranks."""
    given = {name: value for name, value in os.environ.items() if name not in IGNORED_VARIABLES}
    given |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    if rehearsal:
        return given | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return given | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def describe_machine(rehearsal: bool) -> dict[str, str]:
    """What stands above the table."""
    machine = {"GPU check of": date.today().isoformat()}
    machine["on"] = "CPU" if rehearsal else _gpu()
    for name, package in PACKAGES.items():
        try:
            machine[name] = version(package)
        except PackageNotFoundError:
            machine[name] = "present" if importlib.util.find_spec(package.replace("-", "_")) else "absent"
    machine["Python"] = ".".join(map(str, sys.version_info[:3]))
    return machine


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        name, driver = (
            subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
            .stdout.splitlines()[0]
            .split(",")
        )
        return f"{name.strip()}, driver {driver.strip()}"
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("no GPU here; --rehearse runs at toy size on the CPU") from None
        return f"{torch.cuda.get_device_name(0)}, driver unknown"


def _bench(arguments: argparse.Namespace):
    import torch
    from gpu.measure import Bench

    if arguments.rehearse:
        from gpu.interpreter import mend_interpreter

        mend_interpreter()
        torch.set_num_threads(1)
        return Bench(torch.device("cpu"), True, arguments.output)
    torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is what others are held against
    return Bench(torch.device("cuda", 0), False, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
