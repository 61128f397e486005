"""The page shows every run and arm in one self-contained file, also if runs are missing or of other versions."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_fipo.study.compare import Variant
from megatron_fipo.study.curves import COLORS, PANELS, styles
from megatron_fipo.study.outcome import Outcome
from megatron_fipo.study.write import write_results
from tests.study.synthetic_study import VERSIONS, write_study

_VOID = {"meta", "br"}


class _Page(HTMLParser):
    """Checks that tags nest; collects texts, attributes and the number of paths of each figure."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str]] = []
        self.figures: dict[str, int] = {}
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "svg":
            self.figures[dict(attrs)["aria-label"] or ""] = 0
        if tag == "path":
            self.figures[list(self.figures)[-1]] += 1
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(study: Path, output: Path, *, allow: bool = False) -> _Page:
    write_results([study], output, allow_mixed_versions=allow)
    return _Page(output / "results.html")


def test_a_complete_study(tmp_path: Path) -> None:
    page = _page(write_study(tmp_path / "study").path, tmp_path)
    assert [panel.title for panel in PANELS if panel.title not in page.figures] == []
    assert "Accuracy over length" in page.figures
    assert all(page.figures.values())
    assert "3 arms · 9 runs · 9 complete" in page.text
    assert all(f"countdown-{arm}-seed3" in page.text for arm in ("fipo", "dapo", "grpo"))
    assert re.search(r"fipo − dapo[+−]\d+\.\d points\n\[[+−]\d+\.\d, [+−]\d+\.\d\]", page.text)
    assert "Settings in which runs differ" in page.text
    assert "objective.name" in page.text
    assert VERSIONS["commit"] in page.text


def test_a_run_adds_a_line(tmp_path: Path) -> None:
    paths = [
        _page(
            write_study(tmp_path / f"{seeds}", seeds=range(1, seeds + 1)).path, tmp_path / f"out{seeds}"
        ).figures["Entropy"]
        for seeds in (2, 3)
    ]
    assert paths[1] - paths[0] == 3  # a run of each of three arms


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    page = _page(write_study(tmp_path / "study").path, tmp_path)
    assert [value for name, value in page.attributes if name in ("src", "href")] == []
    text = (tmp_path / "results.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "url(" not in text.replace("url(#", "")


def test_failed_runs_and_their_reasons_are_shown(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", ("fipo", "dapo"), (1, 2))
    folder.save_outcome("countdown-dapo-seed1", Outcome("failed", "<no> space"))
    page = _page(folder.path, tmp_path)
    assert "4 runs · 3 complete" in page.text
    assert "countdown-dapo-seed1 failed: <no> space" in page.text


def test_a_study_without_complete_runs(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", ("fipo", "dapo"), (1,))
    for arm in ("fipo", "dapo"):
        folder.save_outcome(f"countdown-{arm}-seed1", Outcome("stopped", "the study was stopped"))
    page = _page(folder.path, tmp_path)
    assert page.figures == {}
    assert "No run is complete." in page.text
    assert "No two arms that differ in one thing have complete runs of the same seed." in page.text


def test_mixed_versions_are_shown_by_run(tmp_path: Path) -> None:
    versions = {"countdown-fipo-seed1": {**VERSIONS, "torch": "2.12.0"}}
    folder = write_study(tmp_path / "study", ("fipo", "dapo"), (1,), versions=versions)
    page = _page(folder.path, tmp_path, allow=True)
    assert "The runs were made by different versions: torch 2.12.0 and 2.13.0." in page.text


@pytest.mark.parametrize("count", [1, len(COLORS), 2 * len(COLORS)])
def test_arms_are_drawn_differently(count: int) -> None:
    looks = styles([Variant("", (("arm", str(number)),), []) for number in range(count)])
    assert len(set(looks)) == count
