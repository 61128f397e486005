"""The GPU check's choice of sections, and where it cannot run. The rehearsal is in `tests/kernels/test_gpu_check.py`."""

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_fipo.objective.kernels import OLDEST_CAPABILITY
from tools.check import machine
from tools.check.machine import Gpu, check_packages, describe_machine, usable_gpu
from tools.check.sections import PART_LIMIT_S, PARTS, SECTIONS, choose

ROOT = Path(__file__).parents[2]
H200 = Gpu("13.0", "NVIDIA H200", (9, 0))


def names(part: str | None = None, only: str | None = None) -> list[str]:
    return [section.name for section in choose(part, only)[0]]


def test_parts_are_complete_and_all_of_it():
    assert set(names("correctness")).isdisjoint(names("speed"))
    assert names() == names("correctness") + names("speed")
    assert names(only="scan, loss,scan") == ["scan", "loss"]
    assert choose("speed", None)[1] == PART_LIMIT_S
    assert choose(None, None)[1] == 2 * PART_LIMIT_S


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_expected_to_end_before_its_limit_and_that_before_seven_minutes(part):
    assert sum(section.expected_s for section in PARTS[part]) <= PART_LIMIT_S < 420
    for section in PARTS[part]:
        assert section.expected_s < section.budget_s
        assert section.case_s <= section.budget_s


def test_every_section_has_its_file():
    for section in SECTIONS:
        name = section.command[-1]
        file = ROOT / name if name.endswith(".py") else ROOT / (name.replace(".", "/") + ".py")
        assert file.is_file(), section.name


@pytest.mark.parametrize(
    ("part", "only", "message"),
    [
        ("fast", None, "no part 'fast'; there are correctness and speed"),
        (None, "loss,lost", "no section 'lost'; there are loss, head, "),
        ("speed", "loss", "give --part or --only, not both"),
    ],
)
def test_an_unknown_choice_names_what_there_is(part, only, message):
    with pytest.raises(ValueError, match=message):
        choose(part, only)


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (Gpu(None, None, None), "built without CUDA"),
        (Gpu("13.0", None, None), "finds no GPU here; --rehearse"),
        (
            replace(H200, name="Tesla T4", capability=(7, 5)),
            r"Tesla T4 has compute capability 7.5 and .* 8.0",
        ),
    ],
)
def test_a_gpu_that_is_absent_or_too_old_is_refused(gpu, message):
    with pytest.raises(ValueError, match=message):
        usable_gpu(gpu)


def test_a_gpu_from_ampere_on_is_taken():
    assert machine.OLDEST_CAPABILITY == OLDEST_CAPABILITY
    assert usable_gpu(replace(H200, capability=(8, 0))).capability == (8, 0)
    assert usable_gpu(H200) is H200


def test_a_missing_package_is_named_with_its_fix(monkeypatch):
    monkeypatch.setattr(machine, "NEEDED", {"torch": "pip install torch", "megatron.core": "pip install it"})
    check_packages()
    monkeypatch.setitem(machine.NEEDED, "no_such_module", "pip install it")
    with pytest.raises(ValueError, match="no_such_module is not installed; pip install it"):
        check_packages()
    monkeypatch.setattr(machine, "NEEDED", {"no_such_parent.module": "pip install it"})
    with pytest.raises(ValueError, match=r"no_such_parent\.module is not installed"):
        check_packages()


def test_the_line_above_the_table_names_the_part():
    line = describe_machine(None, "speed")
    assert (line["part"], line["on"]) == ("speed", "CPU")
    assert "part" not in describe_machine(None, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--rehearse" if find_spec("triton") else "triton is not installed; pip install triton"),
        (["--part", "slow"], "no part 'slow'"),
        (["--rehearse", "--only", "x"], "no section 'x'"),
    ],
)
def test_the_command_ends_with_one_sentence_where_it_cannot_run(tmp_path, arguments, message):
    command = [
        sys.executable,
        str(ROOT / "tools" / "gpu_check.py"),
        *arguments,
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
