"""Puts faults into the loss path, one at a time in a scratch copy, and checks that the named tests fail.

    python -m tests.mutation.check              # all faults, some minutes on an idle machine; prints the table
    python -m tests.mutation.check carry drop   # those whose name contains one of the words

Every test named beside a fault has to fail with it, and pass on the unchanged copy. Exits with 1 if one does not. In the
table, an ending `…]` stands for that case of a parametrized test; without one, some case fails.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.mutation.kernel_mutants import FOLDER, KERNEL_MUTANTS
from tests.mutation.loss_mutants import GRID, MUTANTS
from tests.mutation.mutant import ROOT, Mutant

COPIED = ("megatron_fipo", "tests", "tools", "docs")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in the copy, with Triton and its interpreter for the kernels' tests only; `make venv-triton` installs it."""
    kernels = any(argument.startswith(f"tests/{FOLDER}") for argument in arguments)
    paths = [str(folder), str(ROOT / ".venv" / "triton")] if kernels else [str(folder)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, *(os.environ.get("PYTHONPATH", "").split(os.pathsep))]),
        "COLUMNS": "1000",
        "TRITON_INTERPRET": str(int(kernels)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def failed_tests(folder: Path, tests: Sequence[str]) -> list[str]:
    """Ids of failed tests, below `tests/`. RuntimeError if pytest could not run them."""
    failed: list[str] = []
    for kernels in (False, True):
        chosen = [f"tests/{test}" for test in tests if test.startswith(FOLDER) == kernels]
        if not chosen:
            continue
        done = run(folder, "--tb=no", "-rf", *chosen)
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
        lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED tests/")]
        failed += [line.removeprefix("FAILED tests/").split(" - ")[0] for line in lines]
    return failed


def collect(folder: Path) -> list[str]:
    """Ids of all tests of the loss path."""
    listings = [
        run(folder, "--collect-only", *(f"tests/{name}" for name in names))
        for names in (("objective", "batching", "distributed"), (FOLDER,))
    ]
    for done in listings:
        if done.returncode:
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    lines = "".join(done.stdout for done in listings).splitlines()
    return [line.removeprefix("tests/") for line in lines if line.startswith("tests/")]


def tests_of(mutant: Mutant, everything: Sequence[str]) -> list[str]:
    """Every case of a named function, but only the first of those named of the costly grid."""
    picked = [
        next(test for test in everything if test.startswith(beginning))
        if beginning.startswith(GRID)
        else beginning
        for beginning in mutant.caught_by
    ]
    return sorted({test for beginning in picked for test in everything if test.startswith(beginning)})


def check_table(mutants: Sequence[Mutant], everything: Sequence[str]) -> None:
    """SystemExit with every entry that fits the sources or tests no longer."""
    problems = [problem for mutant in mutants if (problem := mutant.stale())]
    problems += [
        f"{mutant.name}: no test's id begins with {beginning}"
        for mutant in mutants
        for beginning in mutant.caught_by
        if not any(test.startswith(beginning) for test in everything)
    ]
    if problems:
        raise SystemExit("\n".join(problems))


def uncaught(mutant: Mutant, folder: Path, everything: Sequence[str]) -> list[str]:
    """Those of `caught_by` of which no test fails with the fault."""
    file = folder / "megatron_fipo" / mutant.file
    original = file.read_text()
    file.write_text(original.replace(mutant.old, mutant.new))
    try:
        failed = failed_tests(folder, tests_of(mutant, everything))
    finally:
        file.write_text(original)
    return [b for b in mutant.caught_by if not any(test.startswith(b) for test in failed)]


def main() -> int:
    words = sys.argv[1:]
    everyone = MUTANTS + KERNEL_MUTANTS
    mutants = [m for m in everyone if not words or any(word in m.name for word in words)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in COPIED:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        everything = collect(folder)
        check_table(mutants, everything)
        tests = sorted({test for mutant in mutants for test in tests_of(mutant, everything)})
        if failed := failed_tests(folder, tests):
            print("fails without any fault:", *failed, sep="\n  ")
            return 1
        print("| fault | caught by |\n|---|---|", flush=True)
        escaped = 0
        for mutant in mutants:
            missed = uncaught(mutant, folder, everything)
            escaped += bool(missed)
            cells = [
                f"{'**not** ' if b in missed else ''}`{b.split('::')[1]}{'…]' if '[' in b else ''}`"
                for b in mutant.caught_by
            ]
            print(f"| {mutant.name} | {', '.join(cells)} |", flush=True)
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
