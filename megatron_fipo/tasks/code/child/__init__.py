"""The sandbox's process, run as `python -I FOLDER` with the standard library alone. Its modules import each other by their
short names. `frames` and `values` are also imported by the scorer.
"""
