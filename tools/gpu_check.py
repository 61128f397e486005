"""Correctness, then speed, of everything that differs on a GPU; to be run on every new kind of GPU and stack.

    python tools/gpu_check.py                          # under 8 minutes on one H100 or H200; table and JSON in gpu-check/
    python tools/gpu_check.py --only loss,scan         # some sections
    python tools/gpu_check.py --rehearse               # toy sizes on a CPU: tests this command, measures nothing

Runs the tests of tests/gpu and the benchmarks tools/bench/gpu_*.py, each in processes of their own. Needs torch, Triton,
Megatron-Core and pytest; this project need not be installed. Missing packages (Transformer Engine, Liger, cut
cross-entropy) are skipped with the reason. Exits with 1 only if a correctness check failed or did not finish. See
docs/benchmarks.md.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that this file runs from any folder, without an installation

from tools.bench.report import FAILED, SKIPPED, Report, Row, reason, render, title_of_test  # noqa: E402

LIMIT_S = 455.0
"""Of the entire check."""
REHEARSAL_PATIENCE = 4.0
"""Factor on all limits in a rehearsal: CPUs are slow, and Triton's interpreter slower."""
POLL_S = 0.2
PYTEST = (
    "pytest",
    "-m",
    "gpu",
    "-s",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:faulthandler",
    "-q",
    "--no-header",
    "--tb=short",
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


@dataclass(frozen=True)
class Section:
    """A test file or a benchmark. Its process reports cases and rows as `tools.bench.harness.send` does."""

    name: str
    command: tuple[str, ...]
    """After `python -m`; the names of cases are appended if not all of them are to run."""
    budget_s: float
    """Of all cases together."""
    case_s: float
    """Of one case, the start of its process included."""
    correctness: bool
    one_each: tuple[str, ...] = ()
    """If given, these cases run, each in a process of its own, so that memory of one is free for the next."""


def _tests(name: str, file: str, budget_s: float, case_s: float) -> Section:
    return Section(name, (*PYTEST, file), budget_s, case_s, correctness=True)


SECTIONS = (
    _tests("loss", "tests/gpu/test_loss.py", 90.0, 60.0),
    _tests("head", "tests/gpu/test_head.py", 60.0, 45.0),
    _tests("model", "tests/gpu/test_model.py", 120.0, 60.0),
    _tests("scores", "tests/gpu/test_scores.py", 90.0, 50.0),
    _tests("checksum", "tests/gpu/test_checksum.py", 20.0, 20.0),
    Section("ceilings", ("tools.bench.gpu_ceilings",), 25.0, 25.0, False),
    Section("scan", ("tools.bench.gpu_scan",), 75.0, 50.0, False),
    Section("head-speed", ("tools.bench.gpu_head",), 75.0, 50.0, False),
    Section("step", ("tools.bench.gpu_step",), 150.0, 60.0, False),
    Section(
        "layers", ("tools.bench.gpu_layers",), 165.0, 75.0, False, ("BF16", "FP8 blockwise", "FP8 tensorwise")
    ),
)


def main() -> int:
    arguments = _arguments()
    chosen = [_named(name) for name in arguments.only.split(",")] if arguments.only else list(SECTIONS)
    if importlib.util.find_spec("pytest") is None:
        raise SystemExit("pytest is not installed; pip install pytest (with pluggy, iniconfig, packaging)")
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = _run(chosen, arguments.output.resolve(), arguments.rehearse)
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
    return parser.parse_args()


def _named(name: str) -> Section:
    for section in SECTIONS:
        if section.name == name.strip():
            return section
    print(
        f"no section {name!r}; there are {', '.join(section.name for section in SECTIONS)}", file=sys.stderr
    )
    raise SystemExit(2)


def _run(chosen: list[Section], output: Path, rehearsal: bool) -> Report:
    """Every chosen section. The JSON is rewritten at every row."""
    start = time.monotonic()
    patience = REHEARSAL_PATIENCE if rehearsal else 1.0
    machine = describe_machine(rehearsal)
    rows: list[Row] = []

    def report(finished: bool) -> Report:
        return Report(machine, list(rows), time.monotonic() - start, finished, rehearsal)

    def add(row: Row) -> None:
        rows.append(row)
        seconds = time.monotonic() - start
        print(f"[{seconds:5.0f} s] {row.section}: {row.name}: {row.result} ({row.verdict})", flush=True)
        _write(report(False), output)

    (output / "step_profile.txt").unlink(missing_ok=True)
    log = output / "log.txt"
    log.write_text(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n", encoding="utf-8")
    environment = _environment(rehearsal, output)
    for section in chosen:
        scaled = replace(section, budget_s=patience * section.budget_s, case_s=patience * section.case_s)
        run_section(scaled, environment, log, start + patience * LIMIT_S, add)
    _write(report(True), output)
    return report(True)


def _write(report: Report, output: Path) -> None:
    """Complete or not at all: the check may be killed at any moment."""
    temporary = output / "gpu_check.json.part"
    temporary.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    temporary.replace(output / "gpu_check.json")


def _environment(rehearsal: bool, output: Path) -> dict[str, str]:
    """Of the children: one process that communicates with itself only, set up as the trainer sets up its ranks."""
    given = {name: value for name, value in os.environ.items() if name not in IGNORED_VARIABLES}
    given |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    given |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), given.get("PYTHONPATH")]))}
    given |= {"GPU_CHECK_OUTPUT": str(output), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if rehearsal:
        return given | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return given | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@dataclass
class _Child:
    """What a child has reported."""

    cases: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    running: str | None = None
    since: float = field(default_factory=time.monotonic)
    """When the running case began; of the first case, when the process began."""
    failed: bool = False
    """Whether the running case has reported that it failed."""
    killed: str = ""
    """Why it was killed, if it was: "case" (the running case took too long) or "section" (no time is left)."""


def run_section(
    section: Section, environment: dict[str, str], log: Path, deadline: float, add: Callable[[Row], None]
) -> None:
    """All cases of a section. A case that crashes or hangs costs one row: the rest runs in a new process."""
    end = min(time.monotonic() + section.budget_s, deadline)
    pending = list(section.one_each)
    while True:
        chosen = pending[:1] if section.one_each else pending
        child, code = _run_child(section, chosen, environment, log, end, add)
        case = child.running or (chosen[0] if section.one_each else section.name)
        if section.one_each:
            pending = pending[1:]
        else:
            pending = [case for case in child.cases if case not in child.begun]
        if child.killed or code is None:
            # A check that did not finish has shown nothing: a kernel that hangs must not look like one left out.
            verdict = FAILED if section.correctness else SKIPPED
            why = f"it took more than {section.case_s:.0f} s"
            if child.killed == "section" or code is None:
                why = f"the section's {section.budget_s:.0f} s or the time of the entire check are used up"
                case, pending = f"{case} and the following" if pending else case, []
            add(reason(verdict, section.name, _title(case), why, section.correctness))
        elif code != 0 and (child.running or not child.begun) and not child.failed:
            why = f"its process ended with {code}: {_last_line(log)}"
            add(reason(FAILED, section.name, _title(case), why, section.correctness))
        if not pending or not (child.begun or section.one_each):
            return


def _title(case: str) -> str:
    """The row's name for a case: of a test's id, its last part."""
    return title_of_test(case) if "::" in case else case


def _run_child(
    section: Section,
    cases: list[str],
    environment: dict[str, str],
    log: Path,
    end: float,
    add: Callable[[Row], None],
) -> tuple[_Child, int | None]:
    """One process with these cases (all if none are given), its output at the end of `log`; its exit code, None if
    it could not be killed.
    """
    command = [sys.executable, "-m", *section.command]
    if cases:
        # Ids of tests name their file; the command names it for all of them.
        command = [part for part in command if not part.endswith(".py")] + cases
    with tempfile.TemporaryDirectory() as folder, log.open("a", encoding="utf-8") as output:
        messages = Path(folder) / "rows.jsonl"
        messages.touch()
        output.write(f"\n=== {section.name}: {', '.join(cases) or 'all cases'}\n")
        output.flush()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | {"GPU_CHECK_ROWS": str(messages)},
            cwd=ROOT,
        )
        child = _follow(section, process, messages, end, add)
    return child, process.returncode


def _follow(
    section: Section, process: subprocess.Popen, messages: Path, end: float, add: Callable[[Row], None]
) -> _Child:
    """Pass rows to `add` until the process ends, or kill it when its time or that of a case is used up."""
    child = _Child()
    with messages.open(encoding="utf-8") as lines:
        rest = ""
        while True:
            running = process.poll() is None
            rest += lines.read()
            *complete, rest = rest.split("\n")
            for message in map(json.loads, complete):
                _take(message, section, child, add)
            if not running:
                return child
            now = time.monotonic()
            if now >= end or now >= child.since + section.case_s:
                child.killed = "section" if now >= end else "case"
                process.kill()
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:  # it hangs in the driver
                    return child
                continue
            time.sleep(POLL_S)


def _take(message: dict, section: Section, child: _Child, add: Callable[[Row], None]) -> None:
    if "cases" in message:
        child.cases = message["cases"]
    elif "row" in message:
        row = Row(**message["row"] | {"section": section.name})
        child.failed |= row.verdict == FAILED
        add(row)
    elif "begin" in message:
        if child.begun:
            child.since = time.monotonic()
        child.begun.append(message["begin"])
        child.running, child.failed = message["begin"], False
    else:
        child.running = None


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def describe_machine(rehearsal: bool) -> dict[str, str]:
    """The line above the table."""
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
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
        name, driver = done.stdout.splitlines()[0].split(",")
        return f"{name.strip()}, driver {driver.strip()}"
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("no GPU here; --rehearse runs at toy size on the CPU") from None
        return f"{torch.cuda.get_device_name(0)}, driver unknown"


if __name__ == "__main__":
    sys.exit(main())
