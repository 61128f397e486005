"""The driver: the process of `megatron-fipo train`. Importing it loads neither torch nor Megatron-Core."""
