"""`megatron-fipo data`: downloads from a hub, says what to do without one, and stays within its memory."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow
import pyarrow.parquet
import pytest

from megatron_fipo.cli.data import NAMES
from megatron_fipo.tasks.published.files import SCHEMA
from megatron_fipo.tasks.published.sets import SETS
from tests.tasks.test_published import FORMS, dapo_row

_, _, ROWS = FORMS["math-ai/aime25"]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that serves one file of a data set."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(b"")

    def do_GET(self):
        self._answer(CONTENT)

    def _answer(self, body):
        found = (
            self.path == "/datasets/math-ai/aime25/resolve/main/test.jsonl"
            or "/resolve/" + "a" * 40 in self.path
        )
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(CONTENT).hexdigest()}"')
        self.send_header("Content-Length", str(len(CONTENT) if found else 0))
        self.end_headers()
        self.wfile.write(body if found else b"")

    def log_message(self, *arguments):
        pass


def run(tmp_path, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "megatron_fipo.cli", "data", *arguments],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.getcwd(),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",  # `train`, run by another test in this process, sets it
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_offers_every_set():
    assert tuple(SETS) == NAMES


def test_a_set_is_downloaded_from_the_hub(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ended = run(tmp_path, "aime25", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert ended.returncode == 0, ended.stderr
    rows = pyarrow.parquet.read_table(tmp_path / "data/aime25.parquet").to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in rows] == [row["answer"] for row in ROWS]
    assert f"sha256 {hashlib.sha256(CONTENT).hexdigest()}" in ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("wrote 30 problems to data/aime25.parquet  sha256 ")


@pytest.mark.parametrize("option", ["--from=", "--output="])
def test_an_empty_path_is_not_the_current_folder(tmp_path, option):
    ended = run(tmp_path, "aime25", option)
    assert ended.returncode == 2
    assert f"argument {option[:-1]}: must be the path of a file or folder, not ''" in ended.stderr


def test_without_a_network_one_sentence_names_the_file_to_copy(tmp_path):
    ended = run(tmp_path, "dapo", HF_HUB_OFFLINE="1")
    assert ended.returncode == 2
    address = "https://huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k/resolve/main/data/dapo-math-17k.parquet"
    downloading, refusal = ended.stderr.splitlines()
    assert downloading == f"megatron-fipo: downloading {address}"
    assert refusal.startswith(
        "megatron-fipo: cannot download BytedTsinghua-SIA/DAPO-Math-17k from the Hugging Face hub ("
    )
    assert refusal.endswith(
        f"on a machine with a network download {address}, copy it here and give it as --from FILE"
    )
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_the_published_size_costs_less_than_two_gib(tmp_path):
    """1,791,700 rows of 17,398 prompts, in row groups of a million rows as pandas writes them."""
    text = "word " * 80
    prompts = [dapo_row(f"{n} {text}", str(n)) for n in range(17_398)]
    table = pyarrow.Table.from_pylist(prompts, SCHEMA)
    rows = pyarrow.concat_tables([table] * 103).slice(0, 1_791_700)
    pyarrow.parquet.write_table(rows, tmp_path / "dapo.parquet", row_group_size=2**20)
    program = (
        "import resource, sys\n"
        "from megatron_fipo.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "sys.exit(code)"
    )
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "data",
            "dapo",
            "--from",
            str(tmp_path / "dapo.parquet"),
            "--output",
            "o",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "dropped 1,774,302 rows that repeat a prompt with its answer" in ended.stdout
    assert int(ended.stdout.splitlines()[-1]) * 1024 < 2 * 2**30
