"""Countdown: reach a target with three numbers. Problems, a tokenizer, and the scorer."""
