"""Rewards: pure functions from a response to a `Score`, by name in `registry`."""
