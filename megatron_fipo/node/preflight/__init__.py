"""Checks of all nodes of a job before anything is started on them: `megatron-fipo preflight`.

`run.py` runs on every node. It starts `measure.py`, `canary.py` and `network.py` in child processes that can be killed, and the
head collects what they measured over a store (`rendezvous.py`). `judge.py` decides, `render.py` prints.
"""
