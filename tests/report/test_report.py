"""The report shows what the run's files contain, in one self-contained file, also if some of them are
missing.
"""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_fipo.driver.evaluation_metrics import over_sets
from megatron_fipo.errors import UserError
from megatron_fipo.objective.metrics import METRICS
from megatron_fipo.report import write_report
from megatron_fipo.report.chart import draw
from megatron_fipo.report.cost_figures import WHERE_THE_TIME_WENT
from megatron_fipo.report.figures import reward_terms, sections
from megatron_fipo.report.panel import Line, Panel
from megatron_fipo.report.run_data import Run
from megatron_fipo.report.samples import choose_samples, color_reach, render_samples
from megatron_fipo.run_dir.metrics_log import MetricsLog, Record, Sample, SampleLog
from tests.report.synthetic_run import write_synthetic_run

_VOID = {"meta", "link", "br", "hr", "img", "input"}
_PANELS = [panel for section in sections(["countdown"]) for panel in section.panels]


class _Page(HTMLParser):
    """Checks that tags nest, and collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.figures: dict[str, int] = {}
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "svg":
            self.figures[dict(attrs)["aria-label"] or ""] = 0
        if tag == "path" and self.figures:
            self.figures[list(self.figures)[-1]] += 1
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _report(run_dir: Path) -> tuple[str, _Page]:
    text = write_report(run_dir).read_text(encoding="utf-8")
    return text, _Page(text)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that has everything."""
    return write_report(write_synthetic_run(tmp_path_factory.mktemp("full") / "run"))


def test_a_full_run_has_every_figure(full: Path) -> None:
    text = full.read_text(encoding="utf-8")
    page = _Page(text)
    assert list(page.figures) == [panel.title for panel in _PANELS]
    assert all(paths > 0 for paths in page.figures.values())
    assert "Left out, because" not in page.text
    assert "FIPO" in page.text
    assert "influence_clip: [0.8, 1.2]" in page.text
    assert sorted(path.name for path in full.parent.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "samples.jsonl",
    ]
    assert "var(--blue)" in text
    assert "#0101" not in text, "a placeholder color remains in a figure"


def test_the_page_needs_nothing_from_outside(full: Path) -> None:
    text = full.read_text(encoding="utf-8")
    page = _Page(text)
    assert {tag for tag, _, _ in page.attributes} & {"script", "link", "img", "iframe"} == set()
    references = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(value.startswith("#") for value in references)
    assert not re.search(r"@import|url\((?!#)", text)


def test_every_reference_inside_a_figure_has_its_target(full: Path) -> None:
    page = _Page(full.read_text(encoding="utf-8"))
    targets = {value for _, name, value in page.attributes if name == "id"}
    used = {value[1:] for _, name, value in page.attributes if name == "xlink:href"}
    used |= {match for _, _, value in page.attributes for match in re.findall(r"url\(#(.*?)\)", value)}
    assert used
    assert used <= targets


def test_the_headline_compares_first_and_last_evaluation(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for iteration, accuracy, length in ((0, 0.25, 30.0), (5, 0.9, 1.0), (10, 0.5, 60.0)):
        log.log(
            "evaluation",
            iteration,
            {"evaluation/avg_at_k": accuracy, "evaluation/length_mean": length, "evaluation/k": 4},
        )
    text, _ = _report(tmp_path)
    rows = [re.sub(r"<[^>]*>", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    cells = [[cell for cell in row.split("|") if cell] for row in rows]
    assert cells == [
        ["before training", "iteration 10", "change"],
        ["Accuracy, avg@4", "25.0 %", "50.0 %", "+25.0 points"],
        ["Response length, mean", "30.0", "60.0", "+30.0 tokens"],
    ]


def test_each_evaluation_set_has_its_figures_and_its_rows(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for iteration, accuracy in ((0, 0.25), (5, 0.5)):
        values = {
            "avg_at_k": accuracy,
            "cons_at_k": 0.4,
            "pass_at_k": 0.6,
            "length_mean": 30.0,
            "truncated": 0.0,
        }
        values |= {"k": 4.0, "problems": 30.0, "failed": 0.0, "length_median": 28.0}
        sets = {"aime24": values, "aime25": {**values, "avg_at_k": 0.0}}
        log.log("evaluation", iteration, over_sets(sets))
    text, page = _report(tmp_path)
    assert list(page.figures)[:5] == [
        "Held-out accuracy, mean of 2 sets",
        "Held-out accuracy, aime24",
        "Held-out response length, aime24",
        "Held-out accuracy, aime25",
        "Held-out response length, aime25",
    ]
    assert all(paths > 0 for paths in page.figures.values())
    rows = [re.sub(r"<[^>]*>", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    cells = [[cell for cell in row.split("|") if cell] for row in rows]
    assert [row for row in cells if "Accuracy, avg@4" in row] == [
        ["mean of 2 sets", "Accuracy, avg@4", "12.5 %", "25.0 %", "+12.5 points"],
        ["aime24", "Accuracy, avg@4", "25.0 %", "50.0 %", "+25.0 points"],
        ["aime25", "Accuracy, avg@4", "0.0 %", "0.0 %", "+0.0 points"],
    ]
    assert "Measured on 60 held-out problems, with 4 responses each" in page.text


@pytest.mark.parametrize("objective", ["dapo", "grpo"])
def test_a_run_without_influence_weights_says_what_is_left_out(tmp_path: Path, objective: str) -> None:
    _, page = _report(write_synthetic_run(tmp_path / "run", objective))
    assert "Influence weight, mean" not in page.figures
    assert "Held-out accuracy, countdown" in page.figures
    assert re.search(
        r"Left out, because this run has no such data: Influence weight, mean, .*Mean of exp F", page.text
    )
    assert "tokens have no color" in page.text


def test_what_a_run_lost_is_in_its_header(tmp_path: Path, full: Path) -> None:
    assert "trained again" not in full.read_text()
    log = MetricsLog(tmp_path / "run")
    log.log("iteration", 1, {"recovery/restarts": 0, "recovery/lost_iterations": 0})
    log.log("iteration", 2, {"recovery/restarts": 2, "recovery/lost_iterations": 1})
    page = write_report(tmp_path / "run").read_text()
    assert "the trainer was started again 2 times, 1 iteration was trained again" in page


def test_a_run_that_has_just_begun_is_reported(tmp_path: Path) -> None:
    MetricsLog(tmp_path).log(
        "iteration", 1, {"reward/mean": 0.5, "policy/kl": float("nan"), "time/rollout": 3.0}
    )
    _, page = _report(tmp_path)
    assert list(page.figures) == ["Training reward and accuracy", WHERE_THE_TIME_WENT.title]
    assert "never evaluated" in page.text
    assert "no sample responses" in page.text
    assert "saved no config.yaml" in page.text


def test_numbers_that_rewards_name_are_one_panel_whatever_their_names_are(tmp_path: Path) -> None:
    names = [f"term{number:02}" for number in range(14)]
    log = MetricsLog(tmp_path)
    for iteration in (1, 2):
        log.log("iteration", iteration, {"reward/mean": 0.5} | {f"reward/{name}": 0.1 for name in names})
    _, page = _report(tmp_path)
    assert list(page.figures) == ["Training reward and accuracy", "Reward terms"]
    assert all(name in page.text for name in names)
    panel = reward_terms([f"reward/{name}" for name in names])
    assert len({(line.color, line.dashed) for line in panel.lines}) == len(names)


def test_only_an_evaluation_and_only_zeros_are_drawn(tmp_path: Path) -> None:
    MetricsLog(tmp_path).log("evaluation", 0, {"evaluation/avg_at_k": 0.0, "evaluation/truncated": 0.0})
    _, page = _report(tmp_path)
    assert list(page.figures) == ["Held-out accuracy", "Truncated responses"]


def test_gaps_and_wild_values_are_drawn(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for iteration in range(1, 80):
        raw = float("inf") if iteration % 7 == 0 else 10.0 ** (iteration % 9)
        log.log(
            "iteration",
            iteration,
            {"influence/raw_mean": raw, "length/mean": 1e6, "time/rollout": float("nan"), "time/update": 1.0},
        )
    _, page = _report(tmp_path)
    assert {"Mean of exp F before clipping", "Training response length", WHERE_THE_TIME_WENT.title} <= set(
        page.figures
    )


def test_headings_and_legends_have_units_and_captions_only_what_is_drawn(tmp_path: Path, full: Path) -> None:
    """The local engine reports neither its KV cache nor preemptions, and a CPU has no device memory."""
    values = {"engine_mean/prefix_hits": 0.4, "engine_mean/running": 3.0, "memory/host_gib": 2.5}
    MetricsLog(tmp_path).log("iteration", 1, values | {"time/rollout": 12.34, "time/plan": 0.004})
    page, complete = _report(tmp_path)[1].text, _Page(full.read_text(encoding="utf-8")).text
    for sentence in ("Use of the KV cache", "Preemptions:", "Device memory:"):
        assert sentence not in page
        assert sentence in complete
    assert "Prefix hits:" in page
    assert "Host memory:" in page
    assert "Peak memory, GiB" in page
    assert "Where the time went, srollout 12.3 splan 0.0 s" in page  # tags omitted


def test_phases_and_overheads_have_the_names_of_their_metrics() -> None:
    lines = [line for panel in _PANELS for line in panel.lines]
    named = [line for line in lines if line.metric.startswith(("time/", "overhead/"))]
    assert len(named) > len(WHERE_THE_TIME_WENT.lines)
    for line in named:
        assert line.label.replace("-", "_").replace(" ", "_") == line.metric.partition("/")[2]


@pytest.mark.parametrize(("missing", "pieces"), [((), 1), ((4,), 2), ((1, 8), 1)])
def test_a_line_ends_where_a_value_is_missing(missing: tuple[int, ...], pieces: int) -> None:
    """An evaluation at every second iteration leaves its line in one piece."""
    records = [
        Record("iteration", i, 0.0, {"length/mean": 9.0} | ({} if i in missing else {"reward/mean": i / 8}))
        for i in range(1, 9)
    ]
    records += [Record("evaluation", i, 0.0, {"evaluation/avg_at_k": i / 8}) for i in range(0, 9, 2)]
    panel = Panel("t", "c", (Line("reward/mean", "reward"),))
    assert _pieces(panel, Run("run", records)) == pieces
    assert _pieces(Panel("t", "c", (Line("evaluation/avg_at_k", "a"),)), Run("run", records)) == 1


def _pieces(panel: Panel, run: Run) -> int:
    """How many times the pen is set down to draw the only line of a panel."""
    (path,) = re.findall(
        r'd="([^"]*)"[^>]*stroke: var\(--blue\)[^>]*stroke-width: 1.5', draw(panel, run) or ""
    )
    return path.count("M")


def test_a_run_without_metrics_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no metrics"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_keeps_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = write_synthetic_run(tmp_path / "run", iterations=2)
    before = write_report(run_dir).read_bytes()

    def full_disk(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*report\.html: No space"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before


def test_the_same_run_gives_the_same_report(full: Path) -> None:
    before = full.read_bytes()
    assert write_report(full.parent).read_bytes() == before


def _sample(iteration: int, accuracy: float, tokens: list[str], weights: list[float] | None) -> Sample:
    return Sample(iteration, "<script>alert(1)</script>", tokens, weights, accuracy, accuracy, 0.5, "stop")


def test_text_of_responses_prompts_and_names_can_not_break_the_page(tmp_path: Path) -> None:
    run_dir = tmp_path / "<b>run"
    run_dir.mkdir()
    MetricsLog(run_dir).log("iteration", 1, {"reward/mean": 0.5})
    SampleLog(run_dir).log(
        _sample(
            1, 1.0, ["</pre>", "<img src=x onerror=alert(1)>", "\ud800", '"'], [1.2, 0.8, 1.0, float("nan")]
        )
    )
    (run_dir / "config.yaml").write_text("model:\n  path: '</details><script>x</script>'\n")
    text, page = _report(run_dir)
    assert "<script" not in text
    assert "onerror" not in {name for _, name, _ in page.attributes}
    assert "</pre><img src=x onerror=alert(1)>?" in page.text


def test_a_config_that_can_not_be_parsed_is_still_shown(tmp_path: Path) -> None:
    run_dir = write_synthetic_run(tmp_path / "run", iterations=2)
    (run_dir / "config.yaml").write_text("objective: [unfinished\n")
    _, page = _report(run_dir)
    assert "objective: [unfinished" in page.text


def test_tokens_are_colored_by_direction_and_strength() -> None:
    samples = [_sample(1, 1.0, list("abcd"), [1.2, 1.1, 1.0, 0.8])]
    assert color_reach(samples) == pytest.approx(0.2)
    spans = re.findall(
        r"<span (?:style=\"background:rgba\(var\(--(\w+)\),([\d.]+)\)\" )?title=\"(.*?)\">(.)</span>",
        render_samples(samples),
    )
    assert spans == [
        ("up", "0.75", "1.200", "a"),
        ("up", "0.38", "1.100", "b"),
        ("", "", "1.000", "c"),
        ("down", "0.75", "0.800", "d"),
    ]


def test_weights_that_are_all_one_stay_without_color() -> None:
    page = render_samples([_sample(1, 1.0, list("abc"), [1.0, 1.0 + 1e-5, 1.0 - 1e-5])])
    assert "style=" not in page


def test_a_long_response_shows_its_two_ends() -> None:
    tokens = [f"t{number} " for number in range(5000)]
    page = render_samples([_sample(1, 1.0, tokens, [1.1] * 5000)])
    assert "t599 <" in page
    assert "t600 <" not in page
    assert "t4799 <" not in page
    assert "t4800 <" in page
    assert "4,200 tokens not shown" in page


def test_samples_of_the_beginning_the_middle_and_the_end_are_chosen(tmp_path: Path) -> None:
    log = SampleLog(tmp_path)
    for iteration in range(1, 6):
        for number, accuracy in enumerate((0.0, 1.0, 1.0, 0.0)):
            log.log(_sample(iteration, accuracy, [str(number)], None))
    chosen = [(sample.iteration, sample.accuracy, sample.tokens) for sample in choose_samples(tmp_path)]
    assert chosen == [
        (i, accuracy, [token]) for i in (1, 3, 5) for accuracy, token in ((1.0, "1"), (0.0, "0"))
    ]


def test_importing_the_report_brings_no_torch() -> None:
    program = (
        "import sys; import megatron_fipo.report as r; assert 'torch' not in sys.modules; r.write_report"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_every_metric_of_the_loss_that_names_a_panel_is_drawn_there() -> None:
    panels = {panel.title: panel.metrics for section in sections(["countdown"]) for panel in section.panels}
    for metric in METRICS:
        if metric.panel:
            assert metric.name in panels[metric.panel]
            assert metric.label
