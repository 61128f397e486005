"""From trajectories to what one rank computes: micro-batches (`packing`) and a context-parallel rank's part (`shard`)."""
