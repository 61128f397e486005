"""The reward `http` against a real server in a process of its own, which dies, hangs and gives invalid answers."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_fipo.config import HttpReward, RewardConfig
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.http.reward import Judge
from megatron_fipo.tasks.rewards import load_terms
from megatron_fipo.tasks.task import Completion, Problem, Score, UnavailableError
from tests.pages import code_blocks
from tests.tasks.http.judge_server import TOKEN

SERVER = Path(__file__).parent / "judge_server.py"


def start(port: int = 0) -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen([sys.executable, str(SERVER), str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.fixture(scope="module")
def port():
    process, number = start()
    yield number
    process.kill()
    process.wait()


def judge_of(port: int, **settings) -> Judge:
    http = HttpReward(
        **{"url": f"http://127.0.0.1:{port}/score", "timeout_s": 5.0, "backoff_s": 0.01, **settings}
    )
    judge = Judge(RewardConfig(timeout_s=60.0, http=http))
    judge.prepare()
    return judge


_number = iter(range(10**6))


def group(behaviours: str, *texts: str, **columns) -> list[Completion]:
    problem = Problem(f"p{next(_number)}", (1,), "prompt", behaviours, "source", columns=columns)
    return [Completion(problem, text, np.zeros(1, np.int32), "stop") for text in texts or ("a", "bb")]


@pytest.mark.parametrize("batch", [True, False])
def test_scores_come_in_order(port, batch):
    judge = judge_of(port, batch=batch, concurrency=3)
    texts = ["x" * length for length in (5, 3, 9, 1, 7)]
    assert judge.score_group(group("good", *texts)) == [5, 3, 9, 1, 7]
    assert judge.score_group(group("full", "b")) == [Score(0.5, 1.0, "b", {"length": 1})]
    assert judge.take_retries() == 0
    judge.close()


def test_what_a_judge_gets(port):
    judge = judge_of(port)
    completions = group("echo", "é", level=3, tags=["a"], gap=math.nan, made=date(2026, 1, 2))
    (score,) = judge.score_group(completions)
    assert isinstance(score, Score)
    problem = completions[0].problem
    assert score.extra == {
        "problem": {
            "id": problem.problem_id,
            "prompt": "prompt",
            "ground_truth": "echo",
            "data_source": "source",
            "columns": {"level": 3, "tags": ["a"], "gap": None, "made": "2026-01-02"},
        },
        "responses": [{"text": "é", "finish_reason": "stop"}],
    }
    judge.close()


@pytest.mark.parametrize("fault", ["500", "429", "close", "text", "nan", "few"])
def test_a_fault_is_asked_again_and_counted(port, fault):
    judge = judge_of(port)
    assert judge.score_group(group(f"{fault},{fault},good")) == [1, 2]
    assert judge.take_retries() == 2
    assert judge.take_retries() == 0
    judge.close()


@pytest.mark.parametrize("fault", ["hang", "drip", "headers"])
def test_a_slow_answer_is_asked_again(port, fault):
    judge = judge_of(port, timeout_s=0.5)
    assert judge.score_group(group(f"{fault},good")) == [1, 2]
    assert judge.take_retries() == 1
    judge.close()


@pytest.mark.parametrize(
    ("behaviours", "message", "retries"),
    [
        ("500", "the judge was asked 4 times: it answers with status 500$", 3),
        ("text", "asked 4 times: its answer is not JSON", 3),
        ("few", "its answer has 3 scores for 2 responses", 3),
        ("nan", "its answer has no finite reward in its score 1", 3),
        ("close", "it closed the connection", 3),
        ("404", "asked once: it answers with status 404", 0),
        ("later", "asked once: it answers with status 429; it asks to wait 3600 s", 0),
        ("large", "asked once: its answer has more than 16 MiB", 0),
        ("redirect", "it redirects to elsewhere.example, which is not followed; set reward.http.url", 0),
        ("token", r"it refuses the token \(status 401\); check reward.http.token_variable", 0),
    ],
)
@pytest.mark.parametrize("batch", [True, False])
def test_a_group_without_scores_is_unavailable(port, behaviours, message, retries, batch):
    judge = judge_of(port, batch=batch, concurrency=1)
    if not batch:
        message = message.replace("3 scores for 2", "2 scores for 1")
    with pytest.raises(UnavailableError, match=message):
        judge.score_group(group(behaviours))
    assert judge.take_retries() in (retries, 2 * retries)
    judge.close()


def test_the_token_is_sent_and_shown_nowhere(port, monkeypatch, caplog, capfd):
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    judge = judge_of(port, token_variable="JUDGE_TOKEN")
    assert judge.score_group(group("token")) == [1, 2]
    shown = [repr(judge), repr(judge._settings)]
    for token, message in (("", "is not set in the environment of a scorer"), ("a\nsecret", "is no token")):
        monkeypatch.setenv("JUDGE_TOKEN", token)
        with pytest.raises(UserError, match=message) as error:
            judge_of(port, token_variable="JUDGE_TOKEN")
        shown.append(str(error.value))
    monkeypatch.setenv("JUDGE_TOKEN", "another-secret")
    with pytest.raises(UnavailableError) as refused:
        judge_of(port, token_variable="JUDGE_TOKEN").score_group(group("token"))
    text = " ".join([*shown, str(refused.value), caplog.text, *capfd.readouterr()])
    assert TOKEN not in text
    assert "secret" not in text
    judge.close()


def test_a_connection_is_used_again_and_may_be_closed_between(port):
    def counts() -> dict[str, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/counts") as answer:
            return json.load(answer)

    judge = judge_of(port)
    before = counts()
    for _ in range(20):
        judge.score_group(group("good"))
    after = counts()
    assert after["requests"] - before["requests"] == 20
    assert after["connections"] - before["connections"] == 2  # one, and one for the counts
    for _ in range(3):
        assert judge.score_group(group("afterwards")) == [1, 2]
    assert judge.take_retries() == 0
    judge.close()


def test_a_server_that_dies_and_comes_back():
    process, port = start()
    judge = judge_of(port, max_retries=1)
    assert judge.score_group(group("good")) == [1, 2]
    process.kill()
    process.wait()
    with pytest.raises(UnavailableError, match="asked 2 times: ConnectionRefusedError: Connection refused"):
        judge.score_group(group("good"))
    process, _ = start(port)
    assert judge.score_group(group("good")) == [1, 2]
    process.kill()
    process.wait()
    judge.close()


def test_waits_grow_at_random_up_to_the_limit_of_time(port, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("megatron_fipo.tasks.http.reward.time.sleep", waits.append)
    shares = iter([0.5, 1.0, 0.25, 0.0])
    http = HttpReward(url=f"http://127.0.0.1:{port}/", backoff_s=1.0, max_retries=4, timeout_s=5.0)
    judge = Judge(RewardConfig(timeout_s=60.0, http=http), lambda: next(shares))
    judge.prepare()
    assert judge.score_group(group("500,500,500,500,good")) == [1, 2]
    assert waits == [0.5, 2.0, 1.0, 0.0]
    short = Judge(RewardConfig(timeout_s=2.0, http=replace(http, backoff_s=100.0)), lambda: 1.0)
    short.prepare()
    with pytest.raises(UnavailableError, match="asked once"):
        short.score_group(group("500"))
    assert len(waits) == 4


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_an_invalid_certificate_is_refused(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -days 2 -addext subjectAltName=DNS:localhost"
    made = subprocess.run(
        [*command.split(), "-keyout", str(key), "-out", str(certificate)], capture_output=True
    )
    assert made.returncode == 0, made.stderr
    script = (
        "import ssl, sys\nsys.argv = ['x']\nfrom tests.tasks.http.judge_server import Handler, Server\n"
        "context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n"
        f"context.load_cert_chain({str(certificate)!r}, {str(key)!r})\n"
        "server = Server(('127.0.0.1', 0), Handler)\nserver.socket = context.wrap_socket(server.socket, server_side=True)\n"
        "print(server.server_address[1], flush=True)\nserver.serve_forever()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=SERVER.parents[3],
    )
    assert process.stdout is not None
    url = f"https://localhost:{int(process.stdout.readline())}/"
    with pytest.raises(UnavailableError, match="asked once: its certificate is not valid"):
        judge_of(0, url=url).score_group(group("good"))
    os.environ["SSL_CERT_FILE"] = str(certificate)
    try:
        trusting = judge_of(0, url=url)
    finally:
        del os.environ["SSL_CERT_FILE"]
    assert trusting.score_group(group("good")) == [1, 2]
    process.kill()
    process.wait()


@pytest.mark.parametrize("scores", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_scores_leave_nothing(port, scores):
    judge = judge_of(port, batch=False, concurrency=4)
    process = psutil.Process()
    texts = ["x" * 2000] * 8
    judge.score_group(group("good", *texts))
    files, memory, threads = process.num_fds(), process.memory_info().rss, threading.active_count()
    for number in range(scores // 8):
        judge.score_group(group("500,good" if number % 25 == 0 else "good", *texts))
    assert threading.active_count() == threads
    assert process.num_fds() <= files + 4  # up to `concurrency` connections stay open
    assert process.memory_info().rss - memory < 20 * 2**20
    judge.close()
    assert process.num_fds() <= files


def test_the_judge_of_the_documentation():
    (code,) = code_blocks("judges.md")
    assert len(code.splitlines()) <= 20
    free = code.replace("8100), Judge).serve_forever()", "0), Judge)").replace(
        "ThreadingHTTPServer((", "server = ThreadingHTTPServer(("
    )
    process = subprocess.Popen(
        [sys.executable, "-c", free + "print(server.server_address[1], flush=True)\nserver.serve_forever()"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    judge = judge_of(int(process.stdout.readline()))
    assert judge.score_group(group("34", "Answer: 34", "Answer: 35")) == [1.0, 0.0]
    judge.close()
    process.kill()
    process.wait()


def test_the_reward_by_its_name(port):
    settings = RewardConfig(timeout_s=60.0, http=HttpReward(url=f"http://127.0.0.1:{port}/", timeout_s=5.0))
    (term,) = load_terms("http", ".", settings)
    term.reward.prepare()
    assert term.reward.score is None
    assert term.reward.score_group is not None
    assert term.reward.score_group(group("good")) == [1, 2]
