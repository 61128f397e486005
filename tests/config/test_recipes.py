"""The recipes beside each other: baselines, small clusters, ablations, and every command that a page or a comment shows."""

from pathlib import Path

import pytest

import megatron_fipo.cli.main as cli
from megatron_fipo.config import Config, differences, load_config, validate
from megatron_fipo.config.load import leaves
from megatron_fipo.errors import UserError
from megatron_fipo.families.registry import read_architecture
from megatron_fipo.launch.needs import Allocation, check_allocation
from megatron_fipo.run_dir.settings_change import refuse_changes
from tests.pages import ROOT, shown_commands

SOURCES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("examples/*/*.yaml")),
]
TRAIN, LAUNCH, STUDY = (
    [(path, words) for path in SOURCES for words in shown_commands(path.read_text(encoding="utf-8"), command)]
    for command in ("train", "launch slurm", "study")
)
ABLATIONS = [words for path, words in TRAIN if path.name == "ablations.md"]
LAPTOP = "examples/countdown/fipo.yaml"
ONLY_FIPO = {
    f"objective.{name}"
    for name in ("half_life", "influence_clip", "safety_threshold", "filter_future_kl", "drop_dual_clipped")
}
"""Settings that other objectives do not read."""
SMALL = {
    "qwen2.5-32b/fipo.yaml": "qwen2.5-32b/fipo-32gpu.yaml",
    "qwen2.5-7b-math/fipo.yaml": "qwen2.5-7b-math/fipo-8gpu.yaml",
}
"""The file for a small cluster beside each recipe."""


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def load(file: str, *overrides: str) -> Config:
    return load_config(ROOT / "examples" / file, list(overrides))


def other_mathematics(before: Config, after: Config) -> list[str]:
    """Keys by which the second configuration is another run than the first: those that a resumed run may not change."""
    keys = [key for key, _ in leaves(Config)]
    allowed = refuse_changes(Path("run"), before, after, keys, {})
    return [line.split(" was ")[0] for line in allowed]


def changed(words: list[str]) -> dict[str, str]:
    """The overrides of a command by key, without its folder."""
    pairs = (word.split("=", 1) for word in words[1:] if "=" in word)
    return {key: value for key, value in pairs if key != "run_dir"}


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=f"{path.name}: {' '.join(words)}") for path, words in TRAIN]
)
def test_a_shown_command_dry_runs(words, capsys):
    assert cli.main(["train", *words, *(() if "--dry-run" in words else ("--dry-run",))]) == 0
    assert "Nothing was started" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=" ".join(words)) for _, words in STUDY if "smollm-math" not in words[0]]
)
def test_a_shown_study_dry_runs(words, capsys):
    """But that of SmolLM, whose model is made first."""
    assert cli.main(["study", *words, *(() if "--dry-run" in words else ("--dry-run",))]) == 0
    assert " runs in runs/studies/" in capsys.readouterr().out


def test_commands_are_found():
    """In code blocks, in text, in comments, and over several lines."""
    for path, words in (
        ("README.md", "examples/countdown/fipo.yaml run_dir=runs/cp2 parallel.context_parallel_size=2"),
        ("examples/countdown/fipo.yaml", "examples/countdown/fipo.yaml"),
        (
            "examples/qwen2.5-32b/fipo.yaml",
            "examples/qwen2.5-32b/fipo.yaml model.fp8=hybrid objective.correction=tis "
            "run_dir=runs/qwen2.5-32b-fipo-fp8",
        ),
    ):
        assert (ROOT / path, words.split()) in TRAIN
    placeholders = "`megatron-fipo train CONFIG --dry-run`, `megatron-fipo train mine.yaml`"
    assert shown_commands(placeholders, "train") == []


@pytest.mark.parametrize("words", [pytest.param(words, id=path.name) for path, words in LAUNCH])
def test_a_shown_job_has_the_nodes_that_its_run_needs(words):
    config = load_config(words[0], [])
    nodes = int(words[words.index("--nodes") + 1])
    check_allocation(config, Allocation(nodes, gpus_per_node=8, cpus_per_node=None))
    with pytest.raises(UserError, match=f"use at least {nodes} nodes"):
        check_allocation(config, Allocation(nodes - 1, gpus_per_node=8, cpus_per_node=None))


@pytest.mark.parametrize(
    ("fipo", "name", "expected"),
    [
        ("countdown/fipo.yaml", "dapo", set()),
        ("countdown/fipo.yaml", "grpo", set()),
        ("method_choice/fipo.yaml", "dapo", set()),
        ("method_choice/fipo.yaml", "grpo", set()),
        ("qwen2.5-32b/fipo.yaml", "dapo", {"batch.mini_batch_prompts", "rollout.max_prompts"}),
        ("qwen2.5-32b/fipo.yaml", "grpo", set()),
        (
            "qwen2.5-7b-math/fipo.yaml",
            "dapo",
            {
                "batch.mini_batch_prompts",
                "batch.responses_per_prompt",
                "rollout.max_response_length",
                "reward.overlong_buffer",
            },
        ),
        ("qwen2.5-7b-math/fipo.yaml", "grpo", set()),
        ("qwen3-30b-a3b/fipo.yaml", "dapo", {"batch.mini_batch_prompts", "rollout.max_prompts"}),
    ],
)
def test_a_baseline_differs_in_the_objective_and_what_the_paper_changes(fipo, name, expected):
    recipe, baseline = load(fipo), load(fipo.replace("fipo.yaml", f"{name}.yaml"))
    keys = {key for key in differences(recipe, baseline) if not key.startswith("objective.")}
    assert keys == expected | {"run_dir"}
    assert baseline.objective.name == name
    read = {key for key in differences(recipe, baseline) if key.startswith("objective.")}
    assert read - ONLY_FIPO == {"objective.name"}


def test_the_mixture_of_experts_is_trained_as_the_dense_model():
    keys = set(differences(load("qwen2.5-32b/fipo.yaml"), load("qwen3-30b-a3b/fipo.yaml")))
    sections = {key.split(".")[0] for key in keys}
    assert sections == {"model", "parallel", "rollout", "run_dir"}
    assert {key for key in keys if key.startswith("rollout.")} == {"rollout.num_engines"}


@pytest.mark.parametrize("name", ["fipo", "dapo"])
def test_the_mixture_of_experts_needs_four_nodes(name):
    config = load(f"qwen3-30b-a3b/{name}.yaml")
    check_allocation(config, Allocation(4, gpus_per_node=8, cpus_per_node=None))
    assert not config.model.router.trainable
    assert config.parallel.expert_model_parallel_size == 8


@pytest.mark.parametrize(("recipe", "small"), SMALL.items())
def test_a_small_cluster_trains_the_same(recipe, small):
    assert other_mathematics(load(recipe), load(small)) == []


@pytest.mark.parametrize(
    ("small", "gpus"), [(SMALL["qwen2.5-32b/fipo.yaml"], 32), (SMALL["qwen2.5-7b-math/fipo.yaml"], 8)]
)
def test_a_small_cluster_is_as_large_as_its_name_says(small, gpus):
    assert small.endswith(f"-{gpus}gpu.yaml")
    check_allocation(load(small), Allocation(gpus // 8, gpus_per_node=8, cpus_per_node=None))


@pytest.mark.parametrize(("recipe", "small"), SMALL.items())
@pytest.mark.parametrize("name", ["dapo", "grpo"])
def test_a_small_cluster_has_the_baselines_as_commands(recipe, small, name):
    """The command in the head of the file trains what the baseline's file trains."""
    text = (ROOT / "examples" / small).read_text(encoding="utf-8")
    (words,) = [words for words in shown_commands(text, "train") if f"objective.name={name}" in words]
    assert words[0] == f"examples/{small}"
    baseline = load(recipe.replace("fipo.yaml", f"{name}.yaml"))
    other = load(small, *words[1:])
    assert set(other_mathematics(baseline, other)) <= ONLY_FIPO
    assert other.run_dir == baseline.run_dir


class TestAblations:
    def test_each_has_a_folder_of_its_own_and_changes_something(self):
        folders = [load_config(words[0], words[1:]).run_dir for words in ABLATIONS]
        assert len(set(folders)) == len(folders)
        for words in ABLATIONS:
            recipe = load_config(words[0], [])
            keys = differences(recipe, load_config(words[0], words[1:]))
            assert set(keys) == {*changed(words), "run_dir"}, words

    def test_each_has_an_equivalent_for_a_laptop(self):
        """The same settings are changed; lengths and batches to the demo's own sizes."""
        changes = [(words[0] == LAPTOP, set(changed(words))) for words in ABLATIONS]
        large = sorted(sorted(keys) for laptop, keys in changes if not laptop)
        assert large == sorted(sorted(keys) for laptop, keys in changes if laptop)
        assert len(large) >= 12

    @pytest.mark.parametrize("file", [*SMALL, *SMALL.values()])
    @pytest.mark.parametrize(
        "words",
        [pytest.param(w, id=" ".join(w[1:])) for w in ABLATIONS if w[0] != LAPTOP],
    )
    def test_each_fits_every_recipe(self, file, words):
        """The page says so: models and cluster sizes share their ablations."""
        config = load(file, *words[1:])
        validate(config, read_architecture(config.model.path))
