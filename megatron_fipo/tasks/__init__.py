"""What a run trains on: problems, prompts, rewards. `countdown/` is the built-in demo task."""
