"""The trackers record what they are given, continue after a resume, and never stop a run."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.config import TrackingConfig
from megatron_fipo.driver.tracking import WANDB_RUN_ID_FILE, Trackers


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb_cache"))


def _scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_tensorboard_records_and_a_resume_replaces_what_came_later(tmp_path: Path) -> None:
    config = TrackingConfig(wandb="disabled")
    first = Trackers(config, tmp_path, {}, "run")
    for iteration in range(1, 5):
        first.log("iteration", iteration, {"reward/mean": iteration / 4})
    first.close()
    resumed = Trackers(config, tmp_path, {}, "run")
    resumed.log("iteration", 3, {"reward/mean": -1.0})
    resumed.close()
    assert _scalars(tmp_path / "tensorboard", "reward/mean") == [(1, 0.25), (2, 0.5), (3, -1.0)]


def test_wandb_offline_keeps_its_run_over_a_resume(tmp_path: Path) -> None:
    lines: list[str] = []
    config = TrackingConfig(wandb="offline", tensorboard=False)
    ids = []
    for iteration in (1, 2):
        trackers = Trackers(config, tmp_path, {"objective": {"name": "fipo"}}, "run", lines.append)
        trackers.log("iteration", iteration, {"reward/mean": 0.5})
        trackers.close()
        ids.append((tmp_path / WANDB_RUN_ID_FILE).read_text())
    assert ids[0] == ids[1]
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{ids[0].strip()}.wandb"))
    assert files
    assert b"reward/mean" in b"".join(path.read_bytes() for path in files)
    assert lines == []


def test_wandb_online_without_a_key_is_said_once_and_recorded_offline(tmp_path: Path) -> None:
    lines: list[str] = []
    trackers = Trackers(TrackingConfig(wandb="online", tensorboard=False), tmp_path, {}, "run", lines.append)
    trackers.log("iteration", 1, {"reward/mean": 0.5})
    trackers.close()
    assert len(lines) == 1
    assert "no API key" in lines[0]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_online_without_a_network_is_said_once_and_recorded_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("megatron_fipo.driver.tracking._ONLINE_TIMEOUT_S", 1)
    lines: list[str] = []
    trackers = Trackers(TrackingConfig(wandb="online", tensorboard=False), tmp_path, {}, "run", lines.append)
    trackers.log("iteration", 1, {"reward/mean": 0.5})
    trackers.close()
    assert len(lines) == 1
    assert "cannot be reached" in lines[0]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_broken_tracker_is_said_once_and_the_other_goes_on(tmp_path: Path) -> None:
    lines: list[str] = []
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    trackers = Trackers(TrackingConfig(wandb="offline", tensorboard=True), tmp_path, {}, "run", lines.append)
    for iteration in range(1, 4):
        trackers.log("iteration", iteration, {"reward/mean": 0.5})
    trackers.close()
    assert len(lines) == 1
    assert lines[0].startswith("TensorBoard does not work")
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_neither_is_imported_unless_asked_for(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from megatron_fipo.config import TrackingConfig
from megatron_fipo.driver.tracking import Trackers
trackers = Trackers(TrackingConfig(wandb="disabled", tensorboard=False), Path({str(tmp_path)!r}), {{}}, "run")
trackers.log("iteration", 1, {{"a": 1.0}})
trackers.close()
assert not {{"torch", "wandb", "tensorboard"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
