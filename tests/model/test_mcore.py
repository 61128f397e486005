"""The version of Megatron-Core is that of its package, also from a source tree without metadata."""

import subprocess
import sys

from megatron_fipo.model.mcore import VERSION

PROGRAM = """
import importlib.metadata

version = importlib.metadata.version


def without_megatron(name):
    if name.startswith("megatron"):
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)


importlib.metadata.version = without_megatron
import megatron_fipo.model
from megatron_fipo.model.mcore import VERSION

print(VERSION)
"""


def test_a_source_tree_without_metadata_is_enough():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [str(VERSION)], done.stderr[-2000:]
