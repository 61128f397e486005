"""The model: a Hugging Face config as a Megatron-Core model, its layers and its log-prob head.

Trainer ranks run it.

Importing this package installs the CPU platform if CUDA is unavailable (`cpu.install`). This must happen
before the first import of `megatron.core`. Sorted imports put `megatron` first, so modules outside this
package that use Megatron-Core import this package before it explicitly.
"""

from megatron_fipo.model import cpu

cpu.install()
