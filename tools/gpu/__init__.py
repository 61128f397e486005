"""What `tools/gpu_check.py` runs: its sections, the stop-watch and the table."""
