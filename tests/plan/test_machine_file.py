"""Machine files: what is written is read back equal, and each kind of damage gives one sentence with the place and the fix."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.errors import UserError
from megatron_fipo.plan import machine_file
from megatron_fipo.plan.machine import PRECISIONS, Figure, Products
from megatron_fipo.plan.machine_file import (
    LARGEST_FILE,
    LEAST,
    MOST,
    load_machine,
    machine_names,
    save_machine,
)
from tests.plan.machines import MACHINE

MEMORY = f"memory:\n  value: {MACHINE.memory.value}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_machine(MACHINE, tmp_path / "machine.yaml")
    return tmp_path / "machine.yaml"


def refusal(name: str | Path) -> str:
    """The sentence of the error, which must be one line and not end with a full stop."""
    with pytest.raises(UserError) as caught:
        load_machine(str(name))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert not sentence.endswith(".")
    return sentence


def changed(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return file


POSITIVE = st.floats(min_value=LEAST, max_value=MOST)
TEXTS = st.text(min_size=1).filter(str.strip)


@st.composite
def figures(draw: Callable) -> Figure:
    low, value, high = sorted((draw(POSITIVE), draw(POSITIVE), draw(POSITIVE)))
    return Figure(value, low, high, draw(TEXTS), draw(st.booleans()))


@settings(max_examples=30)
@given(TEXTS, figures(), st.dictionaries(st.sampled_from(PRECISIONS), figures(), min_size=1), POSITIVE)
def test_a_written_machine_is_read_back_equal(tmp_path_factory, name, figure, rates, half):
    products = {precision: Products(rate, half) for precision, rate in rates.items()}
    machine = replace(MACHINE, name=name, device=name, memory=figure, products=products, peak=half)
    path = tmp_path_factory.getbasetemp() / "read-back.yaml"
    save_machine(machine, path)
    assert load_machine(str(path)) == machine


def test_shipped_machines_load_and_have_the_name_of_their_file():
    for name in machine_names():
        assert load_machine(name).name == name


def test_an_unknown_machine_is_refused_with_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_file, "FOLDER", tmp_path)
    save_machine(MACHINE, tmp_path / "h100-80gb.yaml")
    save_machine(MACHINE, tmp_path / "a100.yaml")
    assert load_machine("a100") == MACHINE
    assert "did you mean h100-80gb?" in refusal("h100-80bg")
    assert "choose a100, h100-80gb" in refusal("tpu")
    assert "there is no machine 'runs/mine.yaml'" in refusal("runs/mine.yaml")


def test_numbers_may_be_written_as_in_a_configuration(file):
    short = f"{MACHINE.memory.value:g}".replace("e+", "e")
    assert load_machine(str(changed(file, f"{MACHINE.memory.value}", short))) == MACHINE


def test_calibrated_is_true_if_it_is_not_given(file):
    assert load_machine(str(changed(file, "      calibrated: true\n", ""))) == MACHINE


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "must have the keys name, device"),
        (b"- 1\n- 2\n", "must have the keys name, device"),
        (b"a machine", "must have the keys name, device"),
        (b"name: [", "line 1 is not valid YAML"),
        (b"name: \xff\xfe\x00", "is not a text file"),
        (bytes(range(256)), "is not a text file"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{}", "no value for name, device, devices_per_node"),
        (b"? [a]\n: 1\n", "unknown key 'a list or a section'"),
        (b"a: &a [1]\nb: [*a, *a]\n", "unknown key 'a'"),
        (b"#" * (LARGEST_FILE + 1), "is larger than 1,048,576 bytes"),
        (b"x" * 10_000_000, "is larger than 1,048,576 bytes"),
    ],
)
def test_what_is_no_machine_file_is_refused(tmp_path, content, part):
    path = tmp_path / "machine.yaml"
    path.write_bytes(content)
    sentence = refusal(path)
    assert part in sentence
    assert str(path) in sentence
    assert len(sentence) < 700


def test_places_that_are_no_file_are_refused(tmp_path):
    assert "Is a directory" in refusal(tmp_path)
    assert "Not a directory" in refusal("/dev/null/machine.yaml")
    assert "is larger than" in refusal("/dev/zero")
    assert "null byte" in refusal("a\0b")
    assert "File name too long" in refusal("n" * 300)


def test_a_pipe_without_a_writer_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe; give the path of a file" in refusal(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_refused(file):
    file.chmod(0)
    assert "Permission denied" in refusal(file)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("peak: 989000000000000.0\n", "", "machine.yaml: no value for peak; `megatron-fipo calibrate`"),
        ("      source: a test\n", "", "products.bfloat16: rate: no value for source"),
        (MEMORY, MEMORY.replace("memory", "memroy"), "unknown key 'memroy'; did you mean memory?"),
        ("  high:", "  hihg:", "unknown key 'hihg'; did you mean high?"),
        ("peak:", "colour: red\npeak:", "unknown key 'colour'; the keys are name, device"),
        ("  bfloat16:", "  bflaot16:", "products: unknown key 'bflaot16'; did you mean bfloat16?"),
        ("peak:", "device: cpu\npeak:", "device is given twice"),
        (MEMORY, "memory:\n  value: -1\n", "memory: value must be a positive number, not -1"),
        (MEMORY, "memory:\n  value: 0\n", "memory: value must be a positive number, not 0"),
        (MEMORY, "memory:\n  value: .nan\n", "memory: value must be a positive number, not nan"),
        (MEMORY, "memory:\n  value: .inf\n", "memory: value must be a positive number, not inf"),
        (MEMORY, "memory:\n  value: 1e-300\n", "memory: value must be between 1e-12 and 1e+21, not 1e-300"),
        (MEMORY, "memory:\n  value: 1e300\n", "memory: value must be between 1e-12 and 1e+21, not 1e+300"),
        (MEMORY, "memory:\n  value: fast\n", "memory: value must be a number, not 'fast'"),
        (MEMORY, "memory:\n  value: true\n", "memory: value must be a number"),
        (MEMORY, "memory:\n  value: null\n", "memory: value must be a number, not null"),
        (MEMORY, "memory:\n  value: [1]\n", "memory: value must be a number, not a list"),
        (MEMORY, "memory:\n  value: 1.0\n", "memory needs low <= value <= high"),
        (MEMORY, "memory:\n  value: 9.0e+12\n", "memory needs low <= value <= high"),
        ("devices_per_node: 8", "devices_per_node: 2.5", "devices_per_node must be an integer"),
        ("devices_per_node: 8", "devices_per_node: 0", "devices_per_node must be a positive number"),
        ("    half: 400.0", "    half: 0.0", "products.bfloat16: half must be a positive number"),
        ("  source: a test", "  source: ''", "source must not be empty"),
        ("  source: a test", "  source: '  '", "source must not be empty"),
        ("  source: a test", "  source: [a]", "source must be text"),
        ("  calibrated: true", "  calibrated: maybe", "calibrated must be true or false"),
        ("name: test", "name: ''", "name must not be empty"),
    ],
)
def test_an_impossible_value_is_refused_with_its_place(file, old, new, part):
    sentence = refusal(changed(file, old, new))
    assert part in sentence
    assert str(file) in sentence


def test_a_machine_without_products_is_refused(file):
    text = file.read_text()
    begin, end = text.index("products:"), text.index("attention_forward:")
    file.write_text(f"{text[:begin]}products: {{}}\n{text[end:]}")
    assert "products has no entry; give at least one of bfloat16" in refusal(file)


def test_a_figure_that_is_a_number_is_refused(file):
    text = file.read_text()
    begin, end = text.index("disk:"), text.index("decode_weights:")
    file.write_text(f"{text[:begin]}disk: 2e9\n{text[end:]}")
    assert "disk must have the keys value, low, high, source, calibrated" in refusal(file)
