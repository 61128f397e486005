"""slurm/constraints.txt pins what pyproject.toml asks for."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
GPU_MACHINE = {"python_version": "3.12", "platform_system": "Linux", "extra": ""}


def pins() -> dict[str, str]:
    lines = (ROOT / "slurm/constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert len({name for name, _ in pairs}) == len(pairs), "a package is pinned twice"
    return dict(pairs)


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["gpu"]
    parsed = [Requirement(text) for text in texts]
    return [each for each in parsed if each.marker is None or each.marker.evaluate(GPU_MACHINE)]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda each: each.name)
def test_each_requirement_of_a_gpu_machine_is_pinned_to_a_version_that_it_accepts(requirement):
    assert requirement.specifier.contains(pins()[requirement.name.lower()])


def test_the_image_installs_with_the_constraints_and_the_python_that_they_are_for():
    steps = (ROOT / "slurm/Containerfile").read_text()
    installs = [line for line in steps.splitlines() if "pip install" in line and not line.startswith("#")]
    assert installs
    assert all("-c /tmp/constraints.txt" in line for line in installs)
    assert "python3.12 -m venv" in steps
