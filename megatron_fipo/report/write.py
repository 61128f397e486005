"""From the run's folder to `report.html` in it."""

from pathlib import Path

from megatron_fipo.report.page import render_page
from megatron_fipo.report.run_data import read_run

REPORT_FILE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the metrics, samples and configuration in `run_dir` and return its path.

    May be called at any time, also while the run goes on; the page appears whole or not at all. Raises `UserError` where the folder
    holds no metrics.
    """
    page = render_page(read_run(run_dir))
    path = run_dir / REPORT_FILE
    temporary = path.with_name(REPORT_FILE + ".tmp")
    temporary.write_bytes(page.encode("utf-8", errors="replace"))  # a token may be half of a character
    temporary.replace(path)
    return path
