"""Offline conversion between Hugging Face folders and Megatron checkpoints, in the command's process."""
