"""Outputs that cannot be written are found before the work starts, and checks leave and change nothing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import megatron_fipo.cli.main as cli
from megatron_fipo.errors import UserError
from megatron_fipo.outputs import check_new_folder, check_output_file, write_output
from tests.report.synthetic_run import write_synthetic_run
from tests.run_dir.claimed_run import MODEL as MODEL_WITH_WEIGHTS
from tests.run_dir.claimed_run import claimed

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/countdown/model-config"


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(params=["full", "read-only"])
def bad_disk(request, tmp_path) -> Iterator[Path]:
    """A disk that is full or read-only, with an old file `kept` on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount).returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        (disk / "kept").write_text("old")
        if request.param == "full":
            with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
        else:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


BAD = [
    "file/table",
    "file/a/b",
    "n" * 300,
    "n" * 300 + "/table",
    "dangling",
    "/proc/table",
    "/dev/null/x",
]
"""Paths that can be neither a new file nor a new folder: relative to `places`."""


@pytest.fixture
def places(tmp_path) -> Path:
    folder = tmp_path / "places"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text("old")
    (folder / "dangling").symlink_to(folder / "file" / "x")
    return folder


@pytest.mark.parametrize("name", [*BAD, "folder", ".", "/"])
def test_a_file_that_cannot_be_written(name, places):
    before = tree(places)
    with pytest.raises(UserError) as error:
        check_output_file(places / name, "--output")
    assert str(error.value).startswith(f"--output {places / name} ")
    assert len(str(error.value).splitlines()) == 1
    assert tree(places) == before


@pytest.mark.parametrize("name", [*BAD, "folder", "file", "."])
def test_a_folder_that_cannot_be_made(name, places):
    before = tree(places)
    with pytest.raises(UserError) as error:
        check_new_folder(places / name, "output_dir")
    assert str(error.value).startswith(f"output_dir {places / name} ")
    assert len(str(error.value).splitlines()) == 1
    assert tree(places) == before


@pytest.mark.parametrize("name", ["kept", "new", "a/b/new"])
def test_a_full_or_read_only_disk(name, bad_disk):
    before = tree(bad_disk)
    with pytest.raises(UserError, match=r"--output .* (No space left on device|Read-only file system)"):
        check_output_file(bad_disk / name, "--output")
    assert tree(bad_disk) == before
    if name != "kept":
        with pytest.raises(UserError, match="output_dir"):
            check_new_folder(bad_disk / name, "output_dir")
    assert tree(bad_disk) == before
    with pytest.raises(UserError, match="cannot write"):
        write_output(bad_disk / name, "x" * 10_000)
    assert (bad_disk / "kept").read_text() == "old"
    assert not [
        path for path in bad_disk.rglob("*") if path.is_file() and path.name not in ("kept", "filler")
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
@pytest.mark.parametrize("name", ["file", "folder/new"])
def test_no_permission(name, places):
    (places / "file").chmod(0o400)
    (places / "folder").chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        check_output_file(places / name, "--output")


@pytest.mark.parametrize("name", ["new", "file", "a/b/c/new", "folder/new", "link", "folder/../new"])
def test_a_file_that_can_be_written(name, places):
    (places / "link").symlink_to("file")
    before = tree(places)
    check_output_file(places / name, "--output")
    assert tree(places) == before
    write_output(places / name, "é\n")
    assert (places / name).read_text(encoding="utf-8") == "é\n"
    assert (places / "link").is_symlink()
    assert not list(places.rglob("*.partial"))


@pytest.mark.parametrize("name", ["new", "a/b/c/new", "folder/new"])
def test_a_folder_that_can_be_made(name, places):
    before = tree(places)
    check_new_folder(places / name, "output_dir")
    assert tree(places) == before


def test_a_device_is_written_in_place():
    check_output_file(Path("/dev/null"), "--output")
    write_output(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from megatron_fipo.outputs import *; write_output(Path('/dev/stdout'), 'table')",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("table", "")


def commands(target: Path) -> dict[str, list[str]]:
    countdown = str(ROOT / "examples/countdown/fipo.yaml")
    return {
        "evaluate": ["evaluate", str(MODEL), countdown, "--output", str(target)],
        "sft": [
            "sft",
            str(ROOT / "examples/countdown/sft.yaml"),
            f"model_config_path={MODEL}",
            f"output_dir={target}",
        ],
        "to-megatron": ["convert", "to-megatron", "absent", str(target)],
        "to-hf": ["convert", "to-hf", "absent", str(target)],
    }


@pytest.mark.parametrize("name", ["file/table", "/proc/table"])
@pytest.mark.parametrize("command", ["evaluate", "sft", "to-megatron", "to-hf"])
def test_a_command_looks_at_its_output_first(command, name, places, capsys, monkeypatch):
    monkeypatch.setattr("megatron_fipo.driver.evaluate.checked_tokenizer", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr("megatron_fipo.driver.sft.load_tokenizer", lambda *_: pytest.fail("too late"))
    before = tree(places)
    assert cli.main(commands(places / name)[command]) == 2
    assert f"{places / name} cannot be written: " in capsys.readouterr().err
    assert tree(places) == before


@pytest.mark.parametrize("command", ["evaluate", "sft", "to-megatron", "to-hf"])
def test_a_name_that_is_too_long_is_refused(command, places, capsys):
    before = tree(places)
    try:
        code = cli.main(commands(places / ("n" * 300))[command])
    except SystemExit as error:  # of an option
        code = error.code
    assert code == 2
    assert "must have names of at most 255 bytes" in capsys.readouterr().err
    assert tree(places) == before


@pytest.mark.parametrize("command", ["sft", "to-megatron", "to-hf"])
def test_a_new_folder_replaces_nothing(command, places, capsys):
    assert cli.main(commands(places / "file")[command]) == 2
    assert f"{places / 'file'} already exists" in capsys.readouterr().err
    assert (places / "file").read_text() == "old"


@pytest.mark.parametrize("kind", ["a file", "a link"])
def test_a_run_whose_model_could_not_be_written_does_not_start(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_fipo.driver.train.run_cluster", lambda *_: pytest.fail("too late"))
    claimed(tmp_path)
    model = tmp_path / "model"
    model.write_text("old") if kind == "a file" else model.symlink_to("elsewhere")
    words = [
        "train",
        str(ROOT / "examples/countdown/fipo.yaml"),
        f"model.path={MODEL_WITH_WEIGHTS}",
        f"run_dir={tmp_path}",
    ]
    assert cli.main(words) == 2
    assert f"{model} is {kind}, but the trained model is written there" in capsys.readouterr().err
    assert os.path.lexists(model)


def test_a_report_that_cannot_be_written(tmp_path, capsys):
    run = write_synthetic_run(tmp_path / "run", iterations=2)
    (run / "report.html").mkdir()
    assert cli.main(["report", str(run)]) == 2
    assert f"cannot write {run / 'report.html'}: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["train", "examples/countdown/fipo.yaml", "run_dir=LOOP"], ["convert", "to-hf", "LOOP", "OUT"]]
)
def test_a_link_to_itself_is_one_sentence(tmp_path, capsys, words):
    (tmp_path / "loop").symlink_to("loop")
    names = {"LOOP": f"{tmp_path}/loop", "OUT": f"{tmp_path}/out"}
    for name, path in names.items():
        words = [word.replace(name, path) for word in words]
    assert cli.main(words) == 2
    assert f"{tmp_path}/loop" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]
