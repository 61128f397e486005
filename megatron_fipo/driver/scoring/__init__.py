"""Scoring of finished groups by a pool of scorer processes."""
