"""The page a run leaves behind: `write_report(run_dir)` turns its metrics and samples into `run_dir/report.html`."""

from megatron_fipo.report.write import write_report

__all__ = ["write_report"]
