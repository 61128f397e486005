"""Write `report.html` into a run's folder."""

from pathlib import Path

from megatron_fipo.errors import writing
from megatron_fipo.report.page import render_page
from megatron_fipo.report.run_data import read_run

REPORT_FILE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the run's metrics, samples and configuration, and return its path.

    May be called at any time, also while the run is in progress; the page is replaced atomically. Raises
    `UserError` if the folder has no metrics or cannot be written.
    """
    page = render_page(read_run(run_dir))
    path = run_dir / REPORT_FILE
    temporary = path.with_name(REPORT_FILE + ".tmp")
    with writing(path):
        temporary.write_bytes(page.encode("utf-8", errors="replace"))  # a token may be a part of a character
        temporary.replace(path)
    return path
