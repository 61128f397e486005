import sys
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from megatron_fipo.cli import doctor
from megatron_fipo.cli.doctor import (
    COMPONENTS,
    NO_ACCELERATORS,
    EnvironmentFacts,
    check_components,
    inspect_environment,
    main,
)
from megatron_fipo.environment import Card, Driver

BARE = EnvironmentFacts(
    python="3.11.7",
    versions={component.name: None for component in COMPONENTS},
    apex_is_nvidia=False,
    accelerators=NO_ACCELERATORS,
)


def status_of(facts: EnvironmentFacts, name: str):
    return next(status for status in check_components(facts) if status.name == name)


def test_everything_absent_says_what_is_lost():
    found = check_components(BARE)
    assert [status.name for status in found] == [
        "Python",
        "CUDA",
        *(component.name for component in COMPONENTS),
    ]
    assert all(status.note for status in found[1:])
    assert {status.name for status in found if status.severity == "missing"} == {
        component.name for component in COMPONENTS if component.required
    }


def test_present_packages_show_their_version():
    found = status_of(replace(BARE, versions=BARE.versions | {"vllm": "0.32.1"}), "vllm")
    assert (found.state, found.severity) == ("0.32.1", "ok")
    assert "rollout.engine=vllm" in found.note


@pytest.mark.parametrize("version", ["0.28.1", "0.33.0", "unknown version"])
def test_a_vllm_that_cannot_be_used(version):
    found = status_of(replace(BARE, versions=BARE.versions | {"vllm": version}), "vllm")
    assert (found.state, found.severity) == (version, "optional")
    assert ">=0.32,<0.33" in found.note


@pytest.mark.parametrize(
    ("cuda", "devices", "state", "severity"),
    [
        (None, (), "absent", "optional"),
        ("12.8", (), "no device", "optional"),
        ("12.8", ("H100", "H100", "L4"), "12.8", "ok"),
    ],
)
def test_cuda(cuda, devices, state, severity):
    cards = tuple(Card(name, (9, 0), 80 * 2**30) for name in devices)
    found = status_of(replace(BARE, accelerators=replace(NO_ACCELERATORS, cuda=cuda, cards=cards)), "CUDA")
    assert (found.state, found.severity) == (state, severity)
    if devices:
        assert found.note == "2 x H100, 1 x L4"


@pytest.mark.parametrize(
    ("capability", "cuda", "version", "note"),
    [
        ((9, 0), "13.0", "2.9.0", "FP8 with model.fp8_recipe=delayed or tensorwise or blockwise"),
        ((9, 0), "12.8", "2.9.0", "FP8 with model.fp8_recipe=delayed or tensorwise"),
        ((8, 9), "13.0", "2.9.0", "FP8 with model.fp8_recipe=delayed or tensorwise"),
        ((8, 0), "13.0", "2.9.0", "no FP8: the GPU has compute capability 8.0 and FP8 needs 8.9"),
        ((9, 0), "13.0", "2.3.0", "no FP8: Transformer Engine 2.3.0 is installed and it needs 2.4"),
        (None, None, "2.9.0", "no FP8: it needs a GPU"),
    ],
)
def test_transformer_engine_says_which_fp8_these_gpus_have(capability, cuda, version, note):
    facts = replace(
        BARE,
        versions=BARE.versions | {"transformer-engine": version},
        accelerators=replace(NO_ACCELERATORS, cuda=cuda, capability=capability),
    )
    found = status_of(facts, "transformer-engine")
    assert (found.state, found.severity) == (version, "ok")
    assert found.note.startswith("fused layers and Adam on GPUs; ")
    assert note in found.note


def test_the_notes_name_what_each_package_does_here():
    assert (
        "kernels of head, loss and SwiGLU"
        in status_of(replace(BARE, versions=BARE.versions | {"triton": "3.6.0"}), "triton").note
    )
    assert "the same numbers" in status_of(BARE, "triton").note
    assert "training on GPUs needs it or apex" in status_of(BARE, "transformer-engine").note
    assert "training on GPUs needs one of them" in status_of(BARE, "apex").note
    assert "through cuDNN alone" in status_of(BARE, "flash-attn").note
    apex = replace(BARE, versions=BARE.versions | {"apex": "0.1"}, apex_is_nvidia=True)
    assert "have RMSNorm" in status_of(apex, "apex").note


def test_the_apex_of_pypi_does_not_count():
    with_apex = replace(BARE, versions=BARE.versions | {"apex": "0.9.10.dev0"})
    found = status_of(with_apex, "apex")
    assert found.severity == "optional"
    assert "not NVIDIA's" in found.note
    assert status_of(replace(with_apex, apex_is_nvidia=True), "apex").severity == "ok"


@pytest.mark.parametrize("nvidia", [False, True])
def test_apex_is_told_apart_on_disk(nvidia, tmp_path, monkeypatch):
    (tmp_path / "apex" / ("multi_tensor_apply" if nvidia else "templates")).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text(
        "raise RuntimeError('doctor must not import apex')", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    facts = inspect_environment()
    assert facts.versions["apex"] == "unknown version"
    assert facts.apex_is_nvidia == nvidia


def test_this_environment():
    facts = inspect_environment()
    assert facts.versions["torch"]
    assert facts.versions["megatron-core"]
    output = StringIO()
    console = Console(file=output, width=120)
    assert main(console) == 0
    assert "megatron-core" in output.getvalue()


@pytest.mark.parametrize(("cuda", "code"), [("13.0", 1), (None, 0)])
def test_a_driver_that_torch_cannot_use_is_reported_and_is_an_error_if_torch_is_for_gpus(
    cuda, code, monkeypatch
):
    driver = Driver("535.104.05", 2)
    facts = replace(
        inspect_environment(), accelerators=replace(NO_ACCELERATORS, cuda=cuda, unused_driver=driver)
    )
    monkeypatch.setattr(doctor, "inspect_environment", lambda: facts)
    output = StringIO()
    assert main(Console(file=output, width=120)) == code
    assert "this machine has 2 GPUs with driver 535.104.05, but torch" in output.getvalue()
