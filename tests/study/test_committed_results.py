"""The pages of docs/results quote estimates; what they quote is in the tables that the commands wrote beside them."""

import json
import re
from pathlib import Path

import pytest

RESULTS = Path("docs/results")
PAGES = [*sorted(RESULTS.glob("*.md")), Path("README.md"), Path("docs/studies.md"), Path("docs/ablations.md")]
STUDIES = sorted(path.parent for path in RESULTS.glob("*/results.json"))
QUOTED = re.compile(r"[+−]?\d[\d.,]*(?: %| points)? \[[+−]?[\d.]+, [+−]?[\d.]+\]")
"""An estimate with its interval, as `table.text_of` writes it; `tools.future_kl` writes it with a hyphen as minus."""


def test_every_estimate_with_an_interval_is_from_a_committed_table() -> None:
    written = "".join(path.read_text().replace("-", "−") for path in RESULTS.glob("*/*.md"))
    quoted = {(page, match) for page in PAGES for match in QUOTED.findall(" ".join(page.read_text().split()))}
    assert len(quoted) > 10
    assert not {(str(page), match) for page, match in quoted if match not in written}


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_committed_study_is_complete_and_of_one_version(study: Path) -> None:
    runs = json.loads((study / "results.json").read_text())["runs"]
    assert {run["status"] for run in runs} == {"complete"}
    for package in [column for column in runs[0] if column.startswith("version.")]:
        assert len({run[package] for run in runs}) == 1
    arms = {run["arm"] for run in runs}
    assert len(runs) == len(arms) * len({run["seed"] for run in runs})  # every arm with every seed
