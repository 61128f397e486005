"""A leading ~ in the settings that name a file or folder."""

import getpass
import os

import pytest

from megatron_fipo.config import SftConfig, differences, load_config, save_config
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir.run_directory import RunDirectory
from tests.run_dir.claimed_run import MODEL, claim, save

PATHS = ["model.path", "data.train_path", "evaluation.sets.one", "run_dir"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def values(config) -> list[str]:
    return [config.model.path, config.data.train_path, config.evaluation.sets["one"].path, config.run_dir]


@pytest.mark.parametrize("rest", ["", "/x", "/x/../y", "/a b/é", "/~/x", "/x/"])
def test_the_home_folder_in_overrides_and_files(home, rest, tmp_path):
    notes: list[str] = []
    path = tmp_path / "c.yaml"
    path.write_text(
        f'model: {{path: "~{rest}"}}\nrun_dir: "~{rest}"\ndata:\n  train_path: "~{rest}"\n'
        f'evaluation: {{sets: {{one: "~{rest}"}}}}',
        encoding="utf-8",
    )
    from_file = load_config(path, [], note=notes.append)
    assert values(from_file) == [f"{home}{rest}"] * 4
    keys = ["model.path", "data.train_path", "evaluation.sets.one.path", "run_dir"]
    assert notes == [f"~ is the home folder: {', '.join(f'{key}={home}{rest}' for key in keys)}"]
    if rest:  # `key=~` is null
        assert load_config(None, [f"{key}=~{rest}" for key in PATHS]) == from_file
    sft = load_config(None, ["model_config_path=~/m", "output_dir=~/o"], SftConfig, notes.append)
    assert (sft.model_config_path, sft.output_dir) == (f"{home}/m", f"{home}/o")
    assert len(notes) == 2


@pytest.mark.parametrize("text", ["./~/x", "a/~/x", "x~", " ~/x", "/~", "a:~/x"])
def test_another_tilde_stays(text):
    notes: list[str] = []
    assert values(load_config(None, [f"{key}={text}" for key in PATHS], note=notes.append)) == [text] * 4
    assert notes == []


@pytest.mark.parametrize("text", ["~/x", "~x", "~"])
def test_text_that_is_no_path_keeps_its_tilde(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f"tracking: {{wandb_project: '{text}'}}", encoding="utf-8")
    assert load_config(tmp_path / "c.yaml", ["model.path=m", "run_dir=r"]).tracking.wandb_project == text


def test_only_the_value_that_counts_is_expanded(home):
    notes: list[str] = []
    config = load_config(
        None,
        ["model.path=m", "run_dir=~nobody-of-this-name/x", "run_dir=~/x", "run_dir=r"],
        note=notes.append,
    )
    assert (config.run_dir, notes) == ("r", [])


def test_the_home_folder_of_a_named_user(home):
    name = getpass.getuser()
    config = load_config(None, ["model.path=m", f"run_dir=~{name}/x"])
    assert config.run_dir == os.path.expanduser(f"~{name}/x")
    assert config.run_dir.startswith("/")


@pytest.mark.parametrize(
    "text", ["~nobody-of-this-name", "~nobody-of-this-name/x", "~~", "~ /x", "~2026-11-28"]
)
def test_a_user_who_does_not_exist_is_no_folder_name(text):
    with pytest.raises(UserError) as error:
        load_config(None, ["model.path=m", f"run_dir={text}"])
    user = text.partition("/")[0]
    assert (
        str(error.value)
        == f"run_dir: there is no home folder {user}; write ./{text} for a folder of that name"
    )


@pytest.mark.parametrize("first", ["~/{}", "{home}/{}"])
@pytest.mark.parametrize("then", ["~/{}", "{home}/{}"])
def test_the_same_folder_is_no_change_of_settings(first, then, home):
    def config(path: str, *more: str):
        folders = [f"{key}={path.format(name, home=home)}" for key, name in zip(PATHS, "mter", strict=True)]
        return load_config(None, [*folders, *more])

    (home / "m").symlink_to(MODEL)
    assert differences(config(first), config(then)) == []
    directory = RunDirectory(home / "r")
    claim(directory, config(first))
    save(directory, 1)
    assert claim(directory, config(then)) == []
    with pytest.raises(UserError, match="seed was 1 and is 2"):
        claim(directory, config(then, "seed=2"))


def test_a_saved_configuration_needs_no_home(home, monkeypatch, tmp_path):
    config = load_config(None, ["model.path=~/m", "run_dir=~/r"])
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.setenv("HOME", "/elsewhere")
    assert differences(load_config(tmp_path / "config.yaml", []), config) == []
