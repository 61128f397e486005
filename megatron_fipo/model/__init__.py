"""The model: a Hugging Face config as a Megatron-Core model, its layers, its log-prob head.

Importing this package installs the CPU platform where there is no CUDA (`cpu.install`), and that has to happen before the
first import of `megatron.core`. Import order within a file cannot promise it (sorted imports put `megatron` first), so every
package whose modules import Megatron-Core imports this one in its `__init__.py`.
"""

from megatron_fipo.model import cpu

cpu.install()
