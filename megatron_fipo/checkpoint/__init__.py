"""Weights on disk: Hugging Face folders in and out, and Megatron-Core's distributed checkpoints.

Modules that import Megatron-Core import `megatron_fipo.model` first, for the CPU platform; the others (manifest, writers,
random weights) need no Megatron-Core, and the driver uses them.
"""
