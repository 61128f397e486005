"""The GPU check, rehearsed on a CPU: every section, what becomes of a case that fails, hangs or dies, and the table.

The rehearsal runs as on a machine that has torch, Triton and Megatron-Core and little else: importing anything in ABSENT fails.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from gpu import head_check, loss_check, report, step_bench  # noqa: E402
from gpu.measure import Bench  # noqa: E402
from gpu.report import FAILED, FIGURE, MET, MISSED, OK, SKIPPED, Report, Row, render  # noqa: E402
from gpu.runner import Section, run_section  # noqa: E402

ABSENT = [
    "omegaconf",
    "ray",
    "wandb",
    "vllm",
    "transformer_engine",
    "apex",
    "flash_attn",
    "liger_kernel",
    "cut_cross_entropy",
]
BLOCKER = f"""
import importlib.util, sys

def absent(name):
    return name.partition(".")[0] in {ABSENT}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if absent(name):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if absent(name) else find_spec(name, package)
sys.meta_path.insert(0, Absent())
"""
SECTIONS = ["loss", "head", "model", "ceilings", "scan", "head-speed", "step"]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(exit code, what was printed, the output folder) of one rehearsal without the absent packages."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    }
    command = [
        sys.executable,
        str(ROOT / "tools" / "gpu_check.py"),
        "--rehearse",
        "--output",
        str(folder / "out"),
    ]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout, folder / "out"


def _rows(folder: Path) -> list[dict]:
    return json.loads((folder / "gpu_check.json").read_text())["rows"]


@pytest.mark.timeout(900)
def test_every_check_passes_and_only_what_is_absent_is_skipped(rehearsal):
    code, _, folder = rehearsal
    rows = _rows(folder)
    assert [row for row in rows if row["verdict"] == FAILED] == []
    assert code == 0
    assert list(dict.fromkeys(row["section"] for row in rows)) == SECTIONS
    skipped = {row["figures"]["reason"] for row in rows if row["verdict"] == SKIPPED}
    assert skipped == {
        f"{name} is not installed" for name in ("liger_kernel", "cut_cross_entropy", "transformer_engine")
    }
    checked = [row["name"] for row in rows if row["verdict"] == OK]
    assert sum("triton" in name for name in checked) == sum("torch" in name for name in checked) >= 8


@pytest.mark.timeout(900)
def test_the_json_has_every_figure_and_the_table_stands_last(rehearsal):
    _, printed, folder = rehearsal
    saved = json.loads((folder / "gpu_check.json").read_text())
    assert saved["finished"]
    assert saved["rehearsal"]
    assert saved["machine"]["torch"] == version("torch")
    named = {row["name"]: row["figures"] for row in saved["rows"]}
    assert all(
        seconds > 0
        for figures in named.values()
        for name, seconds in figures.items()
        if name.endswith("_seconds")
    )
    step = next(figures for name, figures in named.items() if "0.5B BF16, 1 x 20,480" in name)
    assert step["tokens_per_second"] == pytest.approx(step["tokens"] / step["step_seconds"])
    table = (folder / "table.md").read_text()
    assert printed.endswith(table)
    assert all(f"| {row['name']} | " in table for row in saved["rows"])
    assert "4 x 5,120" in (folder / "step_profile.txt").read_text()


FAULTY_CASES = """
import os, time
from gpu.report import OK, Row

def fine(bench):
    yield Row("s", "fine", OK, "")

def raises(bench):
    yield Row("s", "half", OK, "")
    raise ValueError("no such thing")

def dies(bench):
    yield Row("s", "before death", OK, "")
    os.abort()

def hangs(bench):
    yield Row("s", "before silence", OK, "")
    time.sleep(600)

CASES = {"fine": fine, "raises": raises, "dies": dies, "fine again": fine, "hangs": hangs, "never": fine}
"""
CHILD = """
import argparse, sys
from pathlib import Path
sys.path.insert(0, {tools!r})
import torch
from gpu.measure import Bench
from gpu.runner import Section, run_cases

parser = argparse.ArgumentParser()
parser.add_argument("--rows", type=Path)
parser.add_argument("--from-case", type=int)
arguments = parser.parse_args()
section = Section("s", {module!r}, 0, True)
sys.exit(run_cases(section, arguments.from_case, arguments.rows, lambda: Bench(torch.device("cpu"), True, Path())))
"""


def _run(tmp_path: Path, module: str, budget_s: float) -> list[Row]:
    (tmp_path / "faulty_cases.py").write_text(FAULTY_CASES)
    (tmp_path / "child.py").write_text(CHILD.format(tools=str(ROOT / "tools"), module=module))
    rows: list[Row] = []
    section = Section("s", module, budget_s, correctness=True)
    log = tmp_path / "log.txt"
    run_section(
        section,
        [sys.executable, str(tmp_path / "child.py")],
        dict(os.environ),
        log,
        time.monotonic() + 600,
        rows.append,
    )
    return rows


def test_a_case_that_raises_dies_or_hangs_costs_its_own_rows_only(tmp_path):
    rows = _run(tmp_path, "faulty_cases", budget_s=20.0)
    assert [(row.name, row.verdict) for row in rows] == [
        ("fine", OK),
        ("half", OK),
        ("raises", FAILED),
        ("before death", OK),
        ("dies", FAILED),
        ("fine", OK),
        ("before silence", OK),
        ("hangs and what follows", FAILED),
    ]
    assert "ValueError: no such thing" in rows[2].result
    assert "-6" in rows[4].result


def test_a_section_that_cannot_start_says_why(tmp_path):
    (row,) = _run(tmp_path, "no_such_module", budget_s=60.0)
    assert row.verdict == FAILED
    assert "No module named 'no_such_module'" in row.result


def test_the_table_of_all_verdicts():
    verdicts = (OK, MET, MISSED, FAILED, SKIPPED, FIGURE)
    rows = [Row("s", f"name {verdict}", verdict, "a | b") for verdict in verdicts]
    whole = Report({"GPU check of": "2026-01-31", "on": "a GPU"}, rows, 12.4, finished=False, rehearsal=False)
    lines = render(whole).splitlines()
    assert lines[0] == "GPU check of 2026-01-31, on a GPU"
    assert lines[2:5] == [
        "| section | what | result | verdict |",
        "|---|---|---|---|",
        "| s | name ok | a \\| b | ok |",
    ]
    assert "NOT finished after 12 s: 1 ok, 1 met, 1 NOT MET, 1 FAILED, 1 skipped, 1 measured" in lines
    assert lines[-2:] == ["FAILED: s: name FAILED", "NOT MET: s: name NOT MET"]
    assert whole.correct  # what failed was no correctness check
    assert not replace(whole, rows=[replace(rows[3], correctness=True)]).correct


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.567e-6, "4.57 µs"), (0.0123456, "12.35 ms"), (1.5, "1500 ms")]
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


BENCH = Bench(torch.device("cpu"), True, Path())


def test_the_loss_check_notices_another_half_life(monkeypatch):
    real = loss_check.policy_loss

    def wrong(log_probs, entropy, rows, objective, group, kernels):
        if log_probs.dtype == torch.float32:
            objective = replace(objective, settings=replace(objective.settings, half_life=32.01))
        return real(log_probs, entropy, rows, objective, group, kernels="torch")

    monkeypatch.setattr(loss_check, "KERNELS", ("torch",))
    assert [row.verdict for row in loss_check.non_finite(BENCH)] == [OK]
    monkeypatch.setattr(loss_check, "policy_loss", wrong)
    assert [row.verdict for row in loss_check.non_finite(BENCH)] == [FAILED]


def test_the_loss_check_notices_moving_bits(monkeypatch):
    real = loss_check.policy_loss
    launches = iter(range(100))

    def racing(log_probs, *args, **kwargs):
        loss = real(log_probs, *args, **kwargs)
        loss.future_kl[0] += 1e-7 * (next(launches) == 2)
        return loss

    monkeypatch.setattr(loss_check, "KERNELS", ("torch",))
    monkeypatch.setattr(loss_check, "policy_loss", racing)
    (row,) = loss_check.same_bits(BENCH)
    assert row.verdict == FAILED
    assert "F differ between launch 1 and launch 3" in row.result


def test_the_head_check_notices_a_missing_temperature(monkeypatch):
    real = head_check.response_log_probs

    def wrong(hidden, weight, request, group, sequence_parallel):
        return real(hidden, weight, replace(request, temperature=1.0), group, sequence_parallel)

    monkeypatch.setattr(head_check, "KERNELS", ("torch",))
    assert [row.verdict for row in head_check.every_setting(BENCH)] == [OK]
    monkeypatch.setattr(head_check, "response_log_probs", wrong)
    (row,) = head_check.every_setting(BENCH)
    assert row.verdict == FAILED
    assert "bf16, bonus: log-prob is off" in row.result


def test_flops_are_those_of_every_product_written_out():
    shape = replace(step_bench.TOY, layers=3)
    lengths, rows = [7, 2], 5
    query, key = shape.heads * shape.head_size, shape.groups * shape.head_size
    forward = 2 * rows * shape.hidden * shape.vocabulary
    for _ in range(shape.layers):
        for length in lengths:
            for outputs, inputs in (
                (query + 2 * key, shape.hidden),
                (shape.hidden, query),
                (2 * shape.ffn, shape.hidden),
                (shape.hidden, shape.ffn),
            ):
                forward += 2 * length * outputs * inputs
            for seen in range(1, length + 1):
                forward += 2 * (2 * seen * query)  # scores, and the weighted sum of values
    assert step_bench.step_flops(shape, lengths, rows) == 3 * forward


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_hopper_without_spilling():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools" / "compile_kernels.py"), "--arch", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    compiled = set(re.findall(r"^\| (\w+_kernel) \|", done.stdout, re.MULTILINE))
    sources = [
        ROOT / "megatron_fipo" / "objective" / "triton_kernels.py",
        ROOT / "megatron_fipo" / "model" / "head_kernels.py",
    ]
    assert compiled == {
        name
        for source in sources
        for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.MULTILINE)
    }
    assert done.returncode == 0, done.stdout + done.stderr
