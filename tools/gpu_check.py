"""Correctness, then speed, of everything that differs on a GPU; to be run on every new kind of GPU and stack.

    python tools/gpu_check.py --part correctness       # under 7 minutes on one H100 or H200
    python tools/gpu_check.py --part speed             # under 7 minutes
    python tools/gpu_check.py                          # both
    python tools/gpu_check.py --only loss,scan         # some sections
    python tools/gpu_check.py --rehearse               # toy sizes on a CPU: tests this command, measures nothing

Table, JSON, log and profile are in `gpu-check/`, of a part in `gpu-check/PART/`. Runs the tests of tests/gpu and the benchmarks
tools/bench/gpu_*.py, each in processes of their own. Needs torch, Triton, Megatron-Core and pytest; this project need not be
installed. Missing packages (Transformer Engine, Ray, Liger, cut cross-entropy) are skipped with the reason. Exits with 1 only
if a correctness check failed or did not finish, with 2 if it cannot run here. See docs/benchmarks.md.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that this file runs from any folder, without an installation

from tools.bench.report import Report, Row, render  # noqa: E402
from tools.check.children import run_section  # noqa: E402
from tools.check.machine import check_packages, describe_machine, find_gpu, usable_gpu  # noqa: E402
from tools.check.sections import PARTS, SECTIONS, Section, choose  # noqa: E402

REHEARSAL_PATIENCE = 4.0
"""Factor on all limits in a rehearsal: CPUs are slow, and Triton's interpreter slower."""
IGNORED_VARIABLES = ("TRITON_INTERPRET", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""They would change what is measured."""


def main() -> int:
    start = time.monotonic()
    arguments = _arguments()
    try:
        chosen, limit_s = choose(arguments.part, arguments.only)
        check_packages()
        gpu = None if arguments.rehearse else usable_gpu(find_gpu())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    output = arguments.output / (arguments.part or "")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"--output {arguments.output} cannot be written ({error.strerror}); give another folder",
            file=sys.stderr,
        )
        return 2
    check = Check(output.resolve(), describe_machine(gpu, arguments.part), start, arguments.rehearse)
    report = check.run(chosen, limit_s)
    table = render(report)
    (output / "table.md").write_text(table, encoding="utf-8")
    print("\n" + table, end="", flush=True)
    return 0 if report.correct else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("gpu-check"),
        help="folder for table, JSON, log and profile (default: gpu-check); a part has a folder in it",
    )
    parser.add_argument("--part", help=" or ".join(PARTS))
    parser.add_argument(
        "--only", help="sections, with commas: " + ", ".join(section.name for section in SECTIONS)
    )
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    return parser.parse_args()


class Check:
    """Runs sections and keeps their rows; the JSON is rewritten at every row."""

    def __init__(self, output: Path, machine: dict[str, str], start: float, rehearsal: bool) -> None:
        self.output, self.machine, self.start, self.rehearsal = output, machine, start, rehearsal
        self.rows: list[Row] = []

    def run(self, chosen: list[Section], limit_s: float) -> Report:
        """Every chosen section, until `limit_s` after the start."""
        patience = REHEARSAL_PATIENCE if self.rehearsal else 1.0
        (self.output / "step_profile.txt").unlink(missing_ok=True)
        log = self.output / "log.txt"
        heading = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        log.write_text(heading + "\n", encoding="utf-8")
        environment = _environment(self.rehearsal, self.output)
        for section in chosen:
            scaled = replace(section, budget_s=patience * section.budget_s, case_s=patience * section.case_s)
            run_section(scaled, environment, log, self.start + patience * limit_s, self._add)
        self._write(finished=True)
        return self._report(finished=True)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        seconds = time.monotonic() - self.start
        print(f"[{seconds:5.0f} s] {row.section}: {row.name}: {row.result} ({row.verdict})", flush=True)
        self._write(finished=False)

    def _report(self, finished: bool) -> Report:
        seconds = time.monotonic() - self.start
        return Report(self.machine, list(self.rows), seconds, finished, self.rehearsal)

    def _write(self, finished: bool) -> None:
        """Complete or not at all: the check may be killed at any moment."""
        temporary = self.output / "gpu_check.json.part"
        temporary.write_text(json.dumps(self._report(finished).as_json(), indent=1), encoding="utf-8")
        temporary.replace(self.output / "gpu_check.json")


def _environment(rehearsal: bool, output: Path) -> dict[str, str]:
    """Of the children: one process that communicates with itself only, set up as the trainer sets up its ranks."""
    given = {name: value for name, value in os.environ.items() if name not in IGNORED_VARIABLES}
    given |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    given |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), given.get("PYTHONPATH")]))}
    given |= {"GPU_CHECK_OUTPUT": str(output), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if rehearsal:
        return given | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return given | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


if __name__ == "__main__":
    sys.exit(main())
