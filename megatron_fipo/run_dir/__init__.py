"""A run directory on disk: checkpoints, settings, metrics, samples."""
