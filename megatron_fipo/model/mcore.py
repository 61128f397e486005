"""The one place that knows how Megatron-Core 0.16 to 0.19 differ. Everything else is written for all of them."""

import inspect
from importlib.metadata import version
from importlib.util import find_spec

from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

SUPPORTED = ((0, 16), (0, 20))
"""First supported release, and the first that is not known to work."""

VERSION = tuple(int(part) for part in version("megatron-core").split(".")[:2])

if not SUPPORTED[0] <= VERSION < SUPPORTED[1]:
    raise RuntimeError(f"megatron-core {version('megatron-core')} is not supported; install 0.16 to 0.19")

HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters
"""Whether `GPTModel.forward` takes a function for the hidden states behind the final norm (0.18 and later)."""

ASYNC_SAVE = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
"""Keywords by which `dist_checkpointing.save` uses its own background writer (newer releases prefer another package's)."""


def has_transformer_engine() -> bool:
    """Whether NVIDIA's Transformer Engine is installed (looked up, not imported)."""
    return find_spec("transformer_engine") is not None
