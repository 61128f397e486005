"""Pools of processes with limits of time and memory: requests in, answers or failures out."""
