import resource
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from megatron_fipo.node.preflight import canary
from megatron_fipo.node.preflight.children import Check
from megatron_fipo.node.preflight.facts import ProcessLimits, from_json
from megatron_fipo.node.preflight.judge import bad_nodes, judge
from megatron_fipo.node.preflight.limits import PreflightLimits
from megatron_fipo.node.preflight.measure import (
    count_wrong,
    measure_node,
    measure_space,
    multiply,
    multiply_on,
    source_hash,
)
from tests.node.measured import healthy, with_node

MEASURE = "megatron_fipo.node.preflight.measure"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of source code that a check can run."""

    def make(source: str) -> str:
        (tmp_path / "planted.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        return "planted"

    return make


class TestChecks:
    def test_results_of_one_that_ends(self, module):
        check = Check(module("import json, sys; print(1); print(json.dumps([sys.argv[1]]))"), "x")
        assert check.results(time.monotonic() + 60) == ([1, ["x"]], None)

    def test_one_that_hangs_is_killed_and_leaves_what_it_had(self, module, tmp_path):
        source = "import os, time; print(1, flush=True); print('{', end='', flush=True); os.mkdir('printed'); time.sleep(1000)"
        check = Check(module(f"import os; os.chdir({str(tmp_path)!r}); {source}"))
        while not (tmp_path / "printed").exists():
            time.sleep(0.02)
        assert check.results(time.monotonic() + 0.5) == ([1], "it did not end in time")
        assert check._process.wait(60) == -9

    def test_output_of_libraries_is_no_result(self, module):
        source = """
import os
from megatron_fipo.node.preflight.children import result_printer
report = result_printer()
os.write(1, b"NCCL version 2.30.4")
print("hello", flush=True)
report({"a": 1.5})
"""
        assert Check(module(source)).results(time.monotonic() + 60) == ([{"a": 1.5}], None)

    def test_the_last_line_of_an_error_is_the_reason(self, module):
        check = Check(module("print(1); raise OSError('stale file handle')"))
        assert check.results(time.monotonic() + 60) == ([1], "OSError: stale file handle")

    def test_a_crash_without_a_word(self, module):
        check = Check(module("import os; os.kill(os.getpid(), 9)"))
        assert check.results(time.monotonic() + 60) == ([], "it ended with exit code -9")


def test_all_checks_of_this_machine():
    facts = measure_node("bfloat16", 120.0)
    assert not facts.failures
    assert facts.versions
    assert facts.versions["torch"] == version("torch")
    assert facts.products
    assert (facts.products[0].nan, facts.products[0].wrong) == (0, 0)
    assert [space.path for space in facts.space or ()] == ["/tmp", "/dev/shm"]


def test_checks_out_of_time_are_named():
    facts = measure_node("bfloat16", 0.0)
    assert set(facts.failures) == {"gpus", "products", "space", "limits", "versions"}
    assert set(facts.failures.values()) == {"it did not end in time"}


def test_a_low_limit_of_open_files_is_found():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))  # the check inherits it
    try:
        check = Check(MEASURE, "limits")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    values, failure = check.results(time.monotonic() + 60)
    assert failure is None
    found = with_node(healthy(2), "n1", limits=from_json(ProcessLimits, values[0]))
    (fault,) = judge(found, PreflightLimits())
    assert fault.sentence.startswith("n1: a process may open 512 files (ulimit -n), 65535 are needed")


def test_a_folder_with_less_space_than_needed_is_found():
    space = measure_space()
    found = with_node(healthy(2), "n1", space=space)
    limits = PreflightLimits(min_tmp_gib=space[0].free_gib + 1, min_shm_gib=0)
    faults = judge(found, limits)
    assert [fault.sentence.split(" has ")[0] for fault in faults if "n1" in fault.nodes] == ["n1: /tmp"]
    assert "n1" in bad_nodes(faults, found.names)


class TestProduct:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_a_healthy_device_is_exact(self, dtype):
        (product,) = multiply(dtype)
        assert (product.device, product.wrong, product.nan) == ("cpu", 0, 0)
        assert product.tflop_per_s > 0

    def test_wrong_elements_and_nan_are_counted(self):
        exact = torch.arange(12.0).reshape(3, 4)
        product = exact.bfloat16()
        product[0, 1] = float("nan")
        product[2, 3] += 1
        assert [int(count) for count in count_wrong(product, exact)] == [2, 1]

    def test_an_error_in_any_repetition_counts(self):
        left = torch.ones(4, 4)
        left[1, 2] = float("nan")  # as a broken memory cell would give it
        product = multiply_on("cpu", left, torch.ones(4, 4), torch.full((4, 4), 4.0), repeats=3)
        assert (product.elements, product.wrong, product.nan) == (48, 12, 12)

    def test_bfloat16_holds_every_sum_of_the_large_product(self):
        generator = torch.Generator().manual_seed(0)
        left, right = (
            torch.randint(-1, 2, shape, generator=generator) * torch.randint(0, 2, shape, generator=generator)
            for shape in ((4096, 2048), (2048, 4096))
        )
        assert (left.float() @ right.float()).abs().max() <= 256


class TestSourceHash:
    def test_it_depends_on_names_and_contents_of_python_files_alone(self, tmp_path: Path):
        file = tmp_path / "package" / "module.py"
        file.parent.mkdir()
        file.write_text("a = 1\n")
        first = source_hash(tmp_path)
        (tmp_path / "notes.txt").write_text("x")
        assert source_hash(tmp_path) == first
        file.write_text("a = 2\n")
        changed = source_hash(tmp_path)
        file.rename(file.with_name("other.py"))
        assert len({first, changed, source_hash(tmp_path)}) == 3


class TestCanary:
    def test_a_shared_folder(self, tmp_path: Path):
        run = tmp_path / "run"
        assert canary.step("place", run, "t", 30.0) == ([], None)
        assert canary.step("answer", run, "t", 30.0, "1") == ([], None)
        assert canary.step("collect", run, "t", 0.1, "1", "2") == (["2"], None)
        assert list(run.iterdir()) == []

    def test_a_folder_where_the_token_does_not_appear(self, tmp_path: Path):
        _, failure = canary.step("answer", tmp_path, "t", 0.2, "1")
        assert failure == "the head's file did not appear there in 0.2 s"

    def test_another_file_of_that_name_is_not_the_token(self, tmp_path: Path):
        canary.place(tmp_path, "t")
        (tmp_path / ".preflight-t" / canary.HEAD_FILE).write_text("of another job")
        with pytest.raises(TimeoutError):
            canary.answer(tmp_path, "t", 0.1, "1")

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path):
        (tmp_path / "file").write_text("")
        _, failure = canary.step("place", tmp_path / "file" / "run", "t", 30.0)
        assert failure is not None
        assert "Not a directory" in failure
