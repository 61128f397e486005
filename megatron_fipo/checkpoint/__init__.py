"""Weights on disk: Hugging Face folders in and out, and Megatron-Core's distributed checkpoints."""

import megatron_fipo.model  # noqa: F401  (the CPU platform, before this package's modules import Megatron-Core)
