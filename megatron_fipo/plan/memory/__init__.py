"""Bytes of a trainer rank, of a rollout engine and of a node's host memory, by part."""
