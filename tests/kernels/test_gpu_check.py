"""The GPU check, rehearsed on a CPU: every section, cases that fail, hang or crash, and the table.

The rehearsal runs as on a machine that has torch, Triton, Megatron-Core and pytest and little else: importing anything in
ABSENT fails.
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

from tests.gpu import head_inputs, loss_inputs, test_head, test_loss
from tests.gpu.compare import within
from tools.bench.gpu_models import TOY
from tools.bench.gpu_step import step_flops
from tools.bench.harness import Bench
from tools.bench.report import FAILED, FIGURE, MET, MISSED, OK, SKIPPED, Report, Row, duration, render
from tools.check.children import run_section
from tools.check.sections import PYTEST, SECTIONS, Section

ROOT = Path(__file__).parents[2]
ABSENT = [
    "ray",
    "wandb",
    "vllm",
    "transformer_engine",
    "apex",
    "flash_attn",
    "liger_kernel",
    "cut_cross_entropy",
    "hypothesis",
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
NOT_ON_A_CPU = {
    *(
        f"{name} is not installed"
        for name in ("liger_kernel", "cut_cross_entropy", "transformer_engine", "ray")
    ),
    *(
        f"optimizer.cpu_offload={fraction} needs a GPU and Transformer Engine 2.4 or later (pip install 'megatron-fipo[gpu]'); "
        "set it to 0"
        for fraction in (0.5, 1.0)
    ),
    "functions are fused by torch.compile on a GPU only",
    "the host waits for a device on a GPU only",
}
"""All reasons for which a rehearsal leaves something out."""


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
    assert list(dict.fromkeys(row["section"] for row in rows)) == [section.name for section in SECTIONS]
    skipped = {row["figures"]["reason"] for row in rows if row["verdict"] == SKIPPED}
    assert skipped == NOT_ON_A_CPU
    checked = [row["name"] for row in rows if row["verdict"] == OK]
    assert sum("triton" in name for name in checked) == sum("torch" in name for name in checked) >= 8
    for what in ("first mini step", "after a resume", "cpu_offload=0 ", "with and without fused kernels"):
        assert any(what in name for name in checked)
    assert sum("profile of 1.5B BF16, 1 x 20,480: " in row["name"] for row in rows) >= 6
    assert sorted(path.name for path in folder.iterdir()) == [
        "gpu_check.json",
        "log.txt",
        "step_profile.txt",
        "table.md",
    ]


@pytest.mark.timeout(900)
def test_the_json_has_every_figure_and_the_table_stands_last(rehearsal):
    _, printed, folder = rehearsal
    saved = json.loads((folder / "gpu_check.json").read_text())
    assert saved["finished"]
    assert saved["rehearsal"]
    assert saved["machine"]["torch"] == version("torch")
    by_name = {row["name"]: row for row in saved["rows"]}
    named = {name: row["figures"] for name, row in by_name.items()}
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
    shown = [name.partition(" [")[0] if row["verdict"] == OK else name for name, row in by_name.items()]
    assert all(f"| {name}" in table for name in shown)
    assert "4 x 5,120" in (folder / "step_profile.txt").read_text()


FAULTY_CASES = """
import os, time
from tools.bench.harness import run_cases
from tools.bench.report import OK, Row

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

CASES = {"fine": fine, "raises": raises, "dies": dies, "fine again": fine, "hangs": hangs, "last": fine}
run_cases(None, "s", CASES)
"""


def _run(
    tmp_path: Path, command: tuple[str, ...], budget_s: float, case_s: float, one_each: tuple[str, ...] = ()
) -> list[Row]:
    rows: list[Row] = []
    section = Section("s", command, 0.0, budget_s, case_s, correctness=True, one_each=one_each)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    run_section(section, environment, tmp_path / "log.txt", time.monotonic() + 600, rows.append)
    return rows


@pytest.fixture
def faulty_cases(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "faulty_cases.py").write_text(FAULTY_CASES)
    return ("faulty_cases",)


@pytest.mark.timeout(600)
def test_a_case_that_raises_dies_or_hangs_costs_its_own_rows_only(tmp_path, faulty_cases):
    rows = _run(tmp_path, faulty_cases, budget_s=300.0, case_s=20.0)
    assert [(row.name, row.verdict) for row in rows] == [
        ("fine", OK),
        ("half", OK),
        ("raises", FAILED),
        ("before death", OK),
        ("dies", FAILED),
        ("fine", OK),
        ("before silence", OK),
        ("hangs", FAILED),
        ("fine", OK),
    ]
    assert "ValueError: no such thing" in rows[2].result
    assert "-6" in rows[4].result
    assert "it took more than 20 s" in rows[7].result


@pytest.mark.timeout(600)
def test_a_section_that_is_ended_takes_its_own_processes_with_it(tmp_path):
    """As the complete command does, whose run must not keep the GPU."""
    script = (
        "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, file=open(sys.argv[1], 'w')); "
    )
    script += "import time; time.sleep(600)"
    (tmp_path / "parent.py").write_text(
        f"import sys; sys.argv.append({str(tmp_path / 'pid')!r}); exec({script!r})"
    )
    (row,) = _run(tmp_path, ("parent",), budget_s=15.0, case_s=15.0)
    assert row.verdict == FAILED
    pid = int((tmp_path / "pid").read_text())
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


@pytest.mark.timeout(600)
def test_a_section_without_time_left_names_what_did_not_run(tmp_path, faulty_cases):
    rows = _run(tmp_path, faulty_cases, budget_s=25.0, case_s=600.0, one_each=("fine", "hangs", "last"))
    assert [(row.name, row.verdict) for row in rows] == [
        ("fine", OK),
        ("before silence", OK),
        ("hangs and the following", FAILED),
    ]


@pytest.mark.timeout(600)
def test_a_test_that_fails_dies_or_breaks_the_device_costs_its_own_row_only(tmp_path):
    rows = _run(tmp_path, (*PYTEST, "tests/gpu/faulty.py"), budget_s=300.0, case_s=60.0)
    assert [(row.name, row.verdict) for row in rows] == [
        ("fine", OK),
        ("wrong [a little]", FAILED),
        ("wrong [a lot]", FAILED),
        ("left out", SKIPPED),
        ("breaks the device", OK),
        ("breaks the device", FAILED),
        ("after the break", OK),
        ("dies", FAILED),
        ("last", OK),
    ]
    assert rows[0].figures == {"error": 0.5}
    assert rows[1].result == "FAILED: error is off by 1.5 (at most 1e+00)"
    assert rows[3].figures == {"reason": "it needs more"}
    assert "illegal memory access" in rows[5].result


def test_a_section_that_cannot_start_says_why(tmp_path):
    (row,) = _run(tmp_path, ("no_such_module",), budget_s=60.0, case_s=60.0)
    assert row.verdict == FAILED
    assert "No module named no_such_module" in row.result


def test_the_table_of_all_verdicts():
    verdicts = (OK, MET, MISSED, FAILED, SKIPPED, FIGURE)
    rows = [Row("s", f"name {verdict}", verdict, "a | b") for verdict in verdicts]
    complete = Report(
        {"GPU check of": "2026-01-31", "on": "a GPU"}, rows, 12.4, finished=False, rehearsal=False
    )
    lines = render(complete).splitlines()
    assert lines[0] == "GPU check of 2026-01-31, on a GPU"
    assert lines[2:5] == [
        "| section | what | result | verdict |",
        "|---|---|---|---|",
        "| s | name ok | a \\| b | ok |",
    ]
    assert "NOT finished after 12 s: 1 ok, 1 met, 1 NOT MET, 1 FAILED, 1 skipped, 1 measured" in lines
    assert lines[-2:] == ["FAILED: s: name FAILED", "NOT MET: s: name NOT MET"]
    assert complete.correct  # what failed was no correctness check
    assert not replace(complete, rows=[replace(rows[3], correctness=True)]).correct


def test_passed_cases_of_a_test_are_one_line_of_the_table():
    rows = [Row("s", f"t [{n}]", OK, "", {"error": n, "note": "x"}, True) for n in (1e-3, 5e-3, 2e-3)]
    rows.insert(2, replace(rows[0], name="t [wrong]", verdict=FAILED, result="bad"))
    table = render(Report({}, rows, 1.0, finished=True, rehearsal=False)).splitlines()
    assert table[4:7] == [
        "| s | t | 2 x error 5e-03 | ok |",
        "| s | t [wrong] | bad | FAILED |",
        "| s | t [0.002] |  | ok |",
    ]
    assert "3 ok, 1 FAILED" in table[8]


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.567e-6, "4.57 µs"), (0.0123456, "12.35 ms"), (1.5, "1500 ms")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


BENCH = Bench(torch.device("cpu"))


def _record(errors: dict[str, float], tolerances: dict[str, float]) -> None:
    within(errors, tolerances)


def test_the_loss_check_notices_another_half_life(monkeypatch):
    real = loss_inputs.policy_loss

    def wrong(log_probs, entropy, rows, objective, group, kernels):
        if log_probs.dtype == torch.float32:
            objective = replace(objective, half_life=32.01)
        return real(log_probs, entropy, rows, objective, group, kernels="torch")

    test_loss.test_nan_and_infinity_exclude_their_own_response(BENCH, _record, "torch")
    monkeypatch.setattr(loss_inputs, "policy_loss", wrong)
    with pytest.raises(AssertionError):
        test_loss.test_nan_and_infinity_exclude_their_own_response(BENCH, _record, "torch")


def test_the_loss_check_notices_moving_bits(monkeypatch):
    real = loss_inputs.policy_loss
    launches = iter(range(100))

    def racing(log_probs, *args, **kwargs):
        loss = real(log_probs, *args, **kwargs)
        loss.future_kl[0] += 1e-7 * (next(launches) == 2)
        return loss

    monkeypatch.setattr(loss_inputs, "policy_loss", racing)
    with pytest.raises(AssertionError, match="F differ between launch 1 and launch 3"):
        test_loss.test_same_bits_at_every_launch(BENCH, "torch")


def test_the_head_check_notices_a_missing_temperature(monkeypatch):
    real = head_inputs.response_log_probs

    def wrong(hidden, weight, request, group, sequence_parallel):
        return real(hidden, weight, replace(request, temperature=1.0), group, sequence_parallel)

    test_head.test_every_setting(BENCH, _record, "torch", "bf16, bonus")
    monkeypatch.setattr(head_inputs, "response_log_probs", wrong)
    with pytest.raises(AssertionError, match="log-prob is off"):
        test_head.test_every_setting(BENCH, _record, "torch", "bf16, bonus")


def test_flops_are_those_of_every_product_written_out():
    shape = replace(TOY, layers=3)
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
    assert step_flops(shape, lengths, rows) == 3 * forward


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_hopper_without_spilling():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.compile_kernels", "--arch", "90"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    compiled = set(re.findall(r"^\| (\w+_kernel) \|", done.stdout, re.MULTILINE))
    sources = (ROOT / "megatron_fipo").rglob("*.py")
    assert compiled == {
        name
        for source in sources
        for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.MULTILINE)
    }
    assert done.returncode == 0, done.stdout + done.stderr
