"""The training loop, the ranks behind it, and what they leave: metrics, tracking, report. Importing the package imports nothing."""
