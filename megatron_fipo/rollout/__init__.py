"""Rollouts: engines that sample responses, the pool that spreads requests over them, weight sync, dynamic sampling."""
