"""A run on one machine is reachable from this machine alone, and there only with its token."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sockets import LOOPBACK, Listener, listeners_of
from tests.system.runs import ROOT, check, ended, train_arguments
from tests.system.test_own_cluster import Driver

JOIN = """
import sys, ray
from megatron_fipo.driver.ray_access import loopback_as_written
with loopback_as_written():
    ray.init(address=sys.argv[1], log_to_driver=False)
print("joined")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def driver(home: Path) -> Iterator[Driver]:
    driver = Driver(RAY_AUTH_MODE="token", HOME=str(home))
    yield driver.started()
    driver.end()


def join(address: str, **environment: str) -> subprocess.CompletedProcess:
    """Without Ray's variables of this process: runs of other tests leave their token in it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", JOIN, address],
        cwd=ROOT,
        env={**inherited, "RAY_AUTH_MODE": "token", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return ended(process)


SECRET = "s3cr3t-of-this-test"
SECRETS = {
    "WANDB_API_KEY": SECRET.ljust(40, "0"),
    "HF_TOKEN": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "HTTPS_PROXY": f"http://user:{SECRET}@127.0.0.1:9",
    "MY_OWN": SECRET,
}


@dataclass(frozen=True)
class FinishedRun:
    listeners: set[Listener]
    output: str
    folder: Path
    ray_logs: dict[Path, bytes]
    """The content that each file of Ray's logs had at last."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[FinishedRun]:
    """With trackers, and with secrets in its environment."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    logs: dict[Path, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="f") as temporary:

        def read_logs() -> None:
            for path in Path(temporary).glob("fipo-*/**/*.*"):
                with contextlib.suppress(OSError):
                    logs[path] = path.read_bytes() if path.is_file() else b""

        settings = ["iterations=1", "parallel.data_parallel_size=2", "tracking.wandb=offline"]
        arguments = train_arguments(folder, *settings, "tracking.tensorboard=true")
        found, output = listeners_of(*arguments, meanwhile=read_logs, TMPDIR=temporary, **SECRETS)
        yield FinishedRun(found, output, folder, logs)


def test_no_secret_of_the_environment_is_written_anywhere(run):
    assert SECRET not in run.output
    files = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert any("wandb" in str(path) for path in files)
    assert any(path.name.startswith("worker-") for path in run.ray_logs)
    for path, content in (*files.items(), *run.ray_logs.items()):
        assert SECRET.encode() not in content, path


def test_a_run_listens_on_loopback_alone(run):
    found = run.listeners
    names = {listener.process for listener in found}
    assert {"gcs_server", "raylet"} <= names
    assert any(name.startswith("ray::RankActor") for name in names)
    assert [listener for listener in found if listener.address not in LOOPBACK] == []


def test_only_a_process_with_the_run_s_token_joins_its_cluster(driver, home):
    token = driver.folder / "token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert not (home / ".ray").exists()  # Ray's own place, which all clusters of a user share
    address = driver.facts["address"]
    assert check(join(address, RAY_AUTH_TOKEN_PATH=str(token))).stdout == "joined\n"
    # One attempt: Ray takes a refusal for a server that is not ready yet.
    other = check(join(address, RAY_AUTH_TOKEN="0" * 64, RAY_NUM_REDIS_GET_RETRIES="1"), 1)
    assert "InvalidAuthToken" in other.stderr
    assert "joined" not in other.stdout


def test_the_token_is_in_no_environment_and_no_command_line(driver):
    token = (driver.folder / "token").read_text()
    family = driver.alive()
    assert len(family) > 3
    for process in family:
        assert token not in " ".join([*process.environ().values(), *process.cmdline()])


def test_nothing_is_kept_where_other_users_may_write(driver):
    paths = {
        path
        for process in driver.alive()
        for path in (
            *(file.path for file in process.open_files()),
            *(str(connection.laddr) for connection in process.net_connections("unix") if connection.laddr),
        )
    }
    assert any(path.startswith(str(driver.folder)) for path in paths)
    assert not [path for path in paths if path.startswith("/tmp/ray")]
