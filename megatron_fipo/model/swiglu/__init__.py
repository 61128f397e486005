"""SwiGLU, SiLU(gate) · up, in one pass over memory each way and for packs of any length: plain torch, and Triton on GPUs."""

from megatron_fipo.model.swiglu.module import SwiGLU as SwiGLU
