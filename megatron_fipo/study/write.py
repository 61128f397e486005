"""The results of a study or of any runs, from their folders to files."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from megatron_fipo.config import load_config
from megatron_fipo.errors import UserError
from megatron_fipo.outputs import write_output
from megatron_fipo.study.compare import Comparison, compare, variants_of_runs, variants_of_study
from megatron_fipo.study.evaluations import Response, read_evaluation
from megatron_fipo.study.grid import combinations
from megatron_fipo.study.outcome import Outcome, StudyFolder
from megatron_fipo.study.page import render_page
from megatron_fipo.study.problems import ProblemValues, problem_values
from megatron_fipo.study.results import Result, confirmed, read_result, refuse_mixed
from megatron_fipo.study.samples import choose_samples, samples_markdown
from megatron_fipo.study.schema import StudyConfig
from megatron_fipo.study.table import to_csv, to_json, to_markdown

PAGE = "results.html"


def write_results(folders: Sequence[Path], output: Path, *, allow_mixed_versions: bool) -> Comparison:
    """Compare a study, or any runs, and write results.csv, .json, .md and .html, and samples.md, into `output`.

    Raises UserError.
    """
    comparison = read_comparison(folders, allow_mixed_versions=allow_mixed_versions)
    for name, content in (
        ("results.csv", to_csv(comparison)),
        ("results.json", to_json(comparison)),
        ("results.md", to_markdown(comparison)),
        ("samples.md", samples_markdown(choose_samples(comparison.variants, _responses))),
        (PAGE, render_page(comparison)),
    ):
        write_output(output / name, content)
    return comparison


def read_comparison(folders: Sequence[Path], *, allow_mixed_versions: bool) -> Comparison:
    """One study's folder gives its arms. Otherwise all runs, also those of several studies, are grouped by their settings.

    Raises UserError for a folder without metrics, and for runs of different versions unless they are allowed.
    """
    if len(folders) == 1 and is_study(folders[0]):
        name, results = _of_study(folders[0])
        variants = variants_of_study(results)
    else:
        results = [result for folder in folders for result in _of_runs(folder)]
        variants = variants_of_runs(results)
        name = f"{len(results)} runs"
    if not allow_mixed_versions:
        refuse_mixed(results)
    for variant in variants:
        repeated = [seed for seed in variant.seeds if variant.seeds.count(seed) > 1]
        if repeated:
            raise UserError(f"seed {repeated[0]} of {variant.label} is there twice; leave one of the two out")
    tables = cache(_values)  # each is used by several pairs
    return compare(name, results, variants, lambda result, iteration: tables(result.run_dir, iteration))


def _values(run_dir: Path, iteration: int) -> ProblemValues:
    return problem_values(read_evaluation(run_dir, iteration))


def _responses(result: Result, iteration: int) -> Iterator[Response]:
    return read_evaluation(result.run_dir, iteration)


def is_study(folder: Path) -> bool:
    """Whether it is the output_dir of a study."""
    return StudyFolder(folder).settings.is_file()


def _of_study(path: Path) -> tuple[str, list[Result]]:
    """The title of a study, and all its runs, by combination and seed."""
    folder = StudyFolder(path)
    study = load_config(folder.settings, [], StudyConfig)
    results = []
    for combination in combinations(study, quick=False):
        for seed in study.seeds:
            name = combination.run_name(seed)
            run_dir, outcome = folder.run_dir(name), folder.outcome(name)
            found = read_result(
                run_dir,
                outcome,
                name=name,
                task=combination.task,
                arm=combination.arm,
                grid=combination.grid,
                seed=seed,
            )
            results.append(confirmed(found))
    return study.name, results


def _of_runs(path: Path) -> list[Result]:
    if is_study(path):
        return [result for result in _of_study(path)[1] if result.run is not None]
    return [read_result(path, Outcome("complete"), name=path.resolve().name)]
