"""From trajectories to the input of one rank. Host arithmetic, no Megatron-Core.

The driver plans micro-batches (`iteration_batch`, `packing`); each trainer rank builds its context-parallel
shard of them (`shard`).
"""
