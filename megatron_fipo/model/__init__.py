"""The model: a Hugging Face config as a Megatron-Core model, its layers and its log-prob head.

Runs in a trainer rank.

Importing this package installs the CPU platform if CUDA is unavailable (`cpu.install`). This must happen
before the first import of `megatron.core`. Import order within a file cannot guarantee it (sorted imports put
`megatron` first), so every package whose modules import Megatron-Core imports this one first.
"""

from megatron_fipo.model import cpu

cpu.install()
