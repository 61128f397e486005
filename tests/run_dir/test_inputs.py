"""A run is identified by what its paths contain, not by how they are written."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.checkpoint.companions import copy_companions
from megatron_fipo.checkpoint.manifest import hash_files, list_files, write_manifest
from megatron_fipo.config import load_config
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir import CONFIG_FILE
from megatron_fipo.run_dir.inputs import INPUTS_FILE, RunInputs, input_changes, model_files
from megatron_fipo.run_dir.run_directory import RunDirectory
from tests.run_dir.claimed_run import INPUTS, MODEL, claimed, config, save

PATHS = ("data.train_path=train.parquet", "evaluation.sets.one=test.parquet")


def saved(run_dir: Path) -> RunDirectory:
    directory = claimed(run_dir, *PATHS)
    save(directory, 1)
    return directory


def copied_model(folder: Path) -> Path:
    return shutil.copytree(MODEL, folder)


def inputs_of(model: Path) -> RunInputs:
    return replace(INPUTS, model=model_files(model))


def test_the_same_content_under_other_paths_is_the_same_run(tmp_path):
    directory = saved(tmp_path / "run")
    model = copied_model(tmp_path / "moved")
    for path in (model, os.path.relpath(model), f"{model}/"):
        changed = config(
            tmp_path / "run",
            "data.train_path=/data/t.parquet",
            "evaluation.sets.one=/data/e.parquet",
            f"model.path={path}",
        )
        assert directory.claim(changed, inputs_of(Path(path))) == []


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", lambda text: text.replace("0", "1", 1)),
        ("tokenizer_config.json", lambda text: text + " "),
        ("chat_template.jinja", lambda text: "{{ messages[0].content }}"),
        ("generation_config.json", lambda text: '{"eos_token_id": 7}'),
        ("config.json", lambda text: text.replace("1", "2", 1)),
        ("tokenizer.model", lambda text: "pieces"),
        ("config.json", None),
    ],
)
def test_other_content_under_the_same_path_is_another_run(tmp_path, file, change):
    directory = saved(tmp_path / "run")
    model = copied_model(tmp_path / "model")
    path = model / file
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text() if path.exists() else ""))
    with pytest.raises(
        UserError, match=rf"model.path has other content than the run in {file}.*--allow-change model.path"
    ):
        directory.claim(config(tmp_path / "run", *PATHS), inputs_of(model))
    assert directory.claim(config(tmp_path / "run", *PATHS), inputs_of(model), ["model.path"]) == [
        f"model.path has other content than the run in {file}"
    ]


def test_weights_and_licences_do_not_identify_a_model(tmp_path):
    directory = saved(tmp_path / "run")
    model = copied_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "LICENSE").write_text("other")
    assert directory.claim(config(tmp_path / "run", *PATHS), inputs_of(model)) == []


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json.bak",
        "tokenizer.json~",
        "tokenizer_config.json.orig",
        "vocab.old",
        ".hidden.model",
        ".#tokenizer.json",
        "chat_template.jinja~",
        "additional_chat_templates/.tool.jinja.swp",
        "additional_chat_templates/tool.jinja~",
    ],
)
def test_backups_do_not_identify_a_model_and_are_not_copied(tmp_path, name):
    directory = saved(tmp_path / "run")
    model = copied_model(tmp_path / "model")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("other")
    inputs = inputs_of(model)
    assert directory.claim(config(tmp_path / "run", *PATHS), inputs) == []
    recorded = replace(inputs, model={**inputs.model, name: "digest"})
    assert input_changes(recorded, inputs)["model.path"] is None, "as earlier versions recorded it"
    (tmp_path / "copy").mkdir()
    copy_companions(model, tmp_path / "copy")
    assert not (tmp_path / "copy" / name).exists()
    assert (tmp_path / "copy/tokenizer.json").exists()


def test_the_tokens_of_tekken_identify_a_model(tmp_path):
    model = copied_model(tmp_path / "model")
    (model / "tekken.json").write_text("{}")
    assert "tekken.json" in model_files(model)


def test_other_training_problems_under_the_same_path_are_another_run(tmp_path):
    directory = saved(tmp_path)
    settings = config(tmp_path, *PATHS)
    with pytest.raises(
        UserError, match=r"data\.train_path has other training problems than the run"
    ) as error:
        directory.claim(settings, replace(INPUTS, train="other"), ["data.train_path"])
    assert str(error.value).endswith("than the run): restore them, or choose another run_dir")


@pytest.mark.parametrize(
    ("sets", "change"),
    [
        ({"one": "held-out"}, None),
        ({"one": "other"}, "one has other problems"),
        ({"one": "held-out", "two": "x"}, "two is new"),
        ({"two": "held-out"}, "one is gone, two is new"),
        ({}, "one is gone"),
    ],
)
def test_other_evaluation_sets_are_accepted_and_reported(tmp_path, sets, change):
    directory = saved(tmp_path)
    lines = directory.claim(config(tmp_path, "data.train_path=train.parquet"), replace(INPUTS, held_out=sets))
    assert lines == ([] if change is None else [lines[0]])
    if change is not None:
        assert lines[0].startswith(f"the evaluation sets changed ({change}), so evaluation/avg_at_k")


def test_a_run_of_an_earlier_version_is_resumed(tmp_path):
    """It had one held-out file, `data.evaluation_path`, and one fingerprint for it."""
    directory = saved(tmp_path)
    checkpoint = directory.latest()
    stored = (checkpoint / CONFIG_FILE).read_text()
    sets = re.search(r"evaluation:\n(  sets:\n(?:    .*\n)+)", stored)
    assert sets is not None
    stored = stored.replace(sets[1], "")
    stored = stored.replace("data:\n", "data:\n  evaluation_path: test.parquet\n")
    (checkpoint / CONFIG_FILE).write_text(stored)
    record = json.loads((checkpoint / INPUTS_FILE).read_text())
    (checkpoint / INPUTS_FILE).write_text(json.dumps(record | {"held_out": "digest"}))
    write_manifest(checkpoint, hash_files(checkpoint, list_files(checkpoint)), {})
    assert directory.claim(config(tmp_path, *PATHS), INPUTS) == []
    with pytest.raises(UserError, match=r"line \d+: data.evaluation_path is now evaluation.sets"):
        load_config(checkpoint / CONFIG_FILE, [])


def test_prompts_keep_the_time_of_the_first_start(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.prompt_time() is None
    directory = claimed(tmp_path)
    assert directory.prompt_time() is None  # nothing to resume: the next start is the first
    save(directory, 1)
    assert RunDirectory(tmp_path).prompt_time().isoformat() == INPUTS.prompt_time


def test_a_run_before_the_record_is_compared_by_its_copied_files_and_its_paths(tmp_path):
    directory = saved(tmp_path / "run")
    checkpoint = directory.latest()
    (checkpoint / INPUTS_FILE).unlink()
    write_manifest(checkpoint, hash_files(checkpoint, list_files(checkpoint)), {})
    assert directory.prompt_time() is None
    assert directory.claim(config(tmp_path / "run", *PATHS, f"model.path={MODEL}/"), INPUTS) == []
    with pytest.raises(UserError, match=r"data\.train_path was train\.parquet and is other\.parquet"):
        directory.claim(config(tmp_path / "run", PATHS[1], "data.train_path=other.parquet"), INPUTS)
    model = copied_model(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"other content than the run in tokenizer\.json"):
        directory.claim(config(tmp_path / "run", *PATHS), inputs_of(model))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"model": {}}', json.dumps(INPUTS.__dict__ | {"prompt_time": "x"})]
)
def test_a_damaged_record_is_named(tmp_path, content):
    directory = saved(tmp_path)
    record = directory.latest() / INPUTS_FILE
    record.write_text(content)
    with pytest.raises(UserError, match=r"iteration_000001 is damaged: .*inputs\.json"):
        directory.claim(config(tmp_path, *PATHS), INPUTS)
    checkpoint = directory.latest()
    write_manifest(checkpoint, hash_files(checkpoint, list_files(checkpoint)), {})
    with pytest.raises(UserError, match=r"inputs\.json is not a record of a run's inputs"):
        directory.claim(config(tmp_path, *PATHS), INPUTS)
