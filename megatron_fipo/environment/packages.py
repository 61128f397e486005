"""Which packages are installed, looked up without importing them."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


def installed_version(module: str, package: str) -> str | None:
    """Version of the installed package, "unknown version" where it carries none, None where `module` cannot be imported."""
    try:
        if find_spec(module) is None:
            return None
    except (ImportError, ValueError):
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown version"


def has_nvidia_apex() -> bool:
    """Whether apex is NVIDIA's: it has `multi_tensor_apply`; the web toolkit of the same name on PyPI has not."""
    spec = find_spec("apex")
    return spec is not None and any(
        (Path(p) / "multi_tensor_apply").is_dir() for p in spec.submodule_search_locations or ()
    )
