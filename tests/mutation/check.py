#!/usr/bin/env python3
"""Break the loss path on purpose, one fault at a time in a scratch copy, and see that the named tests notice.

    python tools/mutation_check.py              # all faults, some minutes on an idle machine; prints the table of docs/testing.md
    python tools/mutation_check.py carry drop   # those whose name contains one of the words

Every test named beside a fault has to fail on it (and pass on the unbroken copy). Exits 1 if one does not.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kernel_mutants import FOLDER, KERNEL_MUTANTS
from mutants import GRID, MUTANTS

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in the copy, with Triton and its interpreter for the kernels' tests alone; `make venv-triton` installs it."""
    kernels = any(argument.startswith(f"tests/{FOLDER}") for argument in arguments)
    paths = [str(folder), str(ROOT / ".venv" / "triton")] if kernels else [str(folder)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "COLUMNS": "1000",
        "TRITON_INTERPRET": str(int(kernels)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def pytest(folder: Path, tests: list[str]) -> list[str]:
    """Ids of failed tests, below `tests/`. RuntimeError where pytest could not run them."""
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


def chosen(everything: list[str], beginnings: tuple[str, ...]) -> list[str]:
    for beginning in beginnings:
        if not any(test.startswith(beginning) for test in everything):
            raise SystemExit(f"no test is called {beginning}; bring the tables up to date")
    # Every case of a named function, but only a few of the costly grid.
    picked = [next(t for t in everything if t.startswith(b)) if b.startswith(GRID) else b for b in beginnings]
    return sorted({test for p in picked for test in everything if test.startswith(p)})


def main() -> int:
    words = sys.argv[1:]
    mutants = [
        mutant
        for mutant in MUTANTS + KERNEL_MUTANTS
        if not words or any(word in mutant.name for word in words)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("megatron_fipo", "tests", "tools", "docs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        everything = collect(folder)
        unbroken = pytest(
            folder, sorted({test for mutant in mutants for test in chosen(everything, mutant.caught_by)})
        )
        if unbroken:
            print("fails without any fault:", *unbroken, sep="\n  ")
            return 1
        print("| fault | caught by |\n|---|---|", flush=True)
        escaped = 0
        for mutant in mutants:
            file = folder / "megatron_fipo" / mutant.file
            original = file.read_text()
            if original.count(mutant.old) != 1:
                raise SystemExit(
                    f"{mutant.name}: {mutant.file} has the text to replace {original.count(mutant.old)} times, not once"
                )
            file.write_text(original.replace(mutant.old, mutant.new))
            failed = pytest(folder, chosen(everything, mutant.caught_by))
            file.write_text(original)
            blind = [b for b in mutant.caught_by if not any(test.startswith(b) for test in failed)]
            escaped += bool(blind)
            cells = [
                f"{'**not** ' if b in blind else ''}`{b.split('::')[1]}{'…]' if '[' in b else ''}`"
                for b in mutant.caught_by
            ]
            print(f"| {mutant.name} | {', '.join(cells)} |", flush=True)
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
