"""Measures the rates of the machine at hand for the planner: `megatron-fipo calibrate`.

`run.py` starts `measure.py` in child processes, one after another, each with a time limit. They measure at the shapes of
`shapes.py` and print points; `fitting.py` turns points into figures, and `machine.py` the figures into a `plan.machine.Machine`.
A figure that could not be measured is that of another machine, with the reason.
"""
