"""The report of a run: `write_report(run_dir)` makes `run_dir/report.html` from its metrics and samples.

Needs neither torch nor the trainer.
"""

from megatron_fipo.report.write import write_report

__all__ = ["write_report"]
