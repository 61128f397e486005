"""What runs on every node of a job, before and beside training."""
