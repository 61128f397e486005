"""A run directory on disk: checkpoints, settings, metrics, samples."""

CONFIG_FILE = "config.yaml"
"""The resolved configuration, in a run directory and in each of its checkpoints."""
