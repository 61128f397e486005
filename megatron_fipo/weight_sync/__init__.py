"""Weights from trainer ranks to rollout engines: through the object store, shared memory or NCCL."""
