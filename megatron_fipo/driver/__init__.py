"""The driver: the process of `megatron-fipo train`. It holds no tensors and imports neither Megatron-Core nor torch.distributed."""
