"""Hostile answers cost a failed test and nothing else: the scorer, its files and the machine's processes are as before."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.code import sandbox as sandbox_module
from megatron_fipo.tasks.code.sandbox import Limits, Sandbox
from tests.tasks.code.hostile import HOSTILE, SECRET, attack, processes

ROOT = Path(__file__).parents[3]
SYSTEM_PYTHON = "/usr/bin/python3"
LIMITS = Limits(cpu_s=5.0, wall_s=60.0, memory_mb=512, output_bytes=10)


@pytest.fixture(scope="module")
def sandbox():
    os.environ["JUDGE_SECRET"] = SECRET
    opened = Sandbox(["numpy"])
    opened.check()
    yield opened
    opened.close()
    del os.environ["JUDGE_SECRET"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_fails_and_leaves_nothing(sandbox, name, tmp_path):
    (tmp_path / "kept").write_text("kept", encoding="utf-8")
    limits = [resource.getrlimit(kind) for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)]
    main = sandbox.process_id
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        run = attack(sandbox, name, str(tmp_path), server.getsockname()[1])
        with pytest.raises(BlockingIOError):
            server.accept()
    assert run.end != "finished" or b"right" not in run.output
    assert SECRET.encode() not in run.output
    assert sandbox.process_id == main
    assert processes(sandbox) == []
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text(encoding="utf-8") == "kept"
    assert [resource.getrlimit(kind) for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)] == limits
    assert sandbox.run("print(input())", None, b"works\n", LIMITS).output == b"works\n"


@pytest.mark.parametrize(
    ("name", "end"),
    [
        *(
            (name, "failed")
            for name in ("fork bomb", "memory", "written file", "password file", "network", "ptrace")
        ),
        *(
            (name, "time")
            for name in ("endless loop", "sleep", "closed output and sleep", "threads that stay")
        ),
        ("flood", "output"),
        ("signals to the scorer", "finished"),
    ],
)
def test_how_a_hostile_answer_ends(sandbox, name, end, tmp_path):
    assert attack(sandbox, name, str(tmp_path)).end == end


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path(SYSTEM_PYTHON).exists(), reason="needs root and a Python for all"
)
def test_a_user_without_rights_has_the_same_protection(tmp_path):
    tmp_path.chmod(0o755)
    for folder in list(tmp_path.parents)[:3]:
        folder.chmod(
            folder.stat().st_mode | 0o055
        ) if folder.owner() == "root" and folder.stat().st_uid == 0 else None
    shutil.copytree(
        ROOT / "megatron_fipo", tmp_path / "megatron_fipo", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "megatron_fipo/tasks/__init__.py").write_text("", encoding="utf-8")  # it imports numpy
    for name in ("tests", "tests/tasks", "tests/tasks/code"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "tests/tasks/code/hostile.py", tmp_path / "tests/tasks/code")
    (tmp_path / "own").mkdir()
    os.chown(tmp_path / "own", 65534, 65534)
    (tmp_path / "own/kept").write_text("kept", encoding="utf-8")
    os.chown(tmp_path / "own/kept", 65534, 65534)
    done = subprocess.run(
        [SYSTEM_PYTHON, "tests/tasks/code/hostile.py", str(tmp_path / "own")],
        user=65534,
        group=65534,
        extra_groups=[],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    results = json.loads(done.stdout)
    assert [name for name, *_ in results] == list(HOSTILE)
    for name, end, output, left in results:
        assert end != "finished" or "right" not in output, name
        assert SECRET not in output, name
        assert left == [], name
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["kept"]
    assert (tmp_path / "own/kept").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize(
    ("source", "given", "output"),
    [
        ("print(open(0).read().upper())", b"ab", b"AB\n"),
        ("import sys\nsys.stdout.write(sys.stdin.readline())\nsys.exit()", b"1\n2\n", b"1\n"),
        ("import sys\nprint(len(sys.stdin.buffer.read()))", b"x" * 3_000_000, b"3000000\n"),
        (
            "import numpy as np\nprint(int(np.linalg.det(np.eye(2))), np.random.rand(2).shape)",
            b"",
            b"1 (2,)\n",
        ),
        ("import heapq, decimal, datetime\nprint(datetime.datetime.strptime('2', '%d').day)", b"", b"2\n"),
        (
            "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
            "def f(n): return n and 1 + f(n - 1)\nt = threading.Thread(target=lambda: print(f(50_000)))\nt.start()",
            b"",
            b"50000\n",
        ),
        (
            "import atexit\natexit.register(print, 'end')\nif __name__ == '__main__': print('main')",
            b"",
            b"main\nend\n",
        ),
        ("x = bytearray(200 * 2**20)\nprint(len(x))", b"", b"209715200\n"),
    ],
)
def test_usual_programs_run(sandbox, source, given, output):
    run = sandbox.run(source, None, given, LIMITS)
    assert (run.end, run.output) == ("finished", output)


@pytest.mark.parametrize(
    ("source", "call", "given", "value"),
    [
        ("def f(a, b):\n print(a)\n return (a, {b})", {"function": "f"}, b"[1, 2]", [1, {"set": [2]}]),
        (
            "class Solution:\n def f(self, a: List[int]) -> int: return reduce(lambda x, y: x + y, a)",
            {"function": "f"},
            b"[[1, 2]]",
            3,
        ),
        ("def f(x): return x / 2", {"expression": "f(3) + 1"}, b"[]", 2.5),
        (
            "import numpy as np\ndef f(): return np.arange(3), np.float64(2)",
            {"function": "f"},
            b"[]",
            [[0, 1, 2], 2.0],
        ),
    ],
)
def test_functions_are_called(sandbox, source, call, given, value):
    assert json.loads(sandbox.run(source, call, given, LIMITS).output) == value


def test_a_function_that_is_missing_raises_or_returns_an_object_fails(sandbox):
    for source in (
        "def g(): return 1",
        "def f(): raise ValueError",
        "def f(): return object()",
        "def f(): exit()",
    ):
        assert sandbox.run(source, {"function": "f"}, b"[]", LIMITS).end == "failed"


def test_a_lost_sandbox_starts_again():
    opened = Sandbox([])
    opened.check()
    first = opened.process_id
    os.kill(first, 9)
    with pytest.raises((EOFError, OSError)):
        opened.run("print(1)", None, b"", LIMITS)
    assert opened.run("print(1)", None, b"", LIMITS).output == b"1\n"
    assert opened.process_id != first
    opened.close()


def test_a_machine_without_a_filter_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox_module, "supported", lambda: False)
    with pytest.raises(
        UserError, match="cannot confine answers on this machine: there is no filter of system calls"
    ):
        Sandbox([]).check()


def test_a_filter_that_does_not_hold_is_found(monkeypatch, tmp_path):
    shutil.copytree(sandbox_module.FOLDER, tmp_path / "child")
    file = tmp_path / "child/lockdown.py"
    line = "        self._control(_PR_SET_SECCOMP, _FILTER_MODE, ctypes.addressof(self._program))\n"
    text = file.read_text(encoding="utf-8")
    assert line in text
    file.write_text(text.replace(line, ""), encoding="utf-8")
    monkeypatch.setattr(sandbox_module, "FOLDER", tmp_path / "child")
    with pytest.raises(UserError, match="they could open files, start processes, use the network"):
        Sandbox([]).check()


def test_the_sandbox_ends_with_its_scorer(tmp_path):
    script = (
        "import os, sys\nfrom megatron_fipo.tasks.code.sandbox import Sandbox, Limits\ns = Sandbox([])\ns.check()\n"
        "print(s.process_id, flush=True)\ns.run('import time\\ntime.sleep(600)', None, b'', Limits(600, 600, 256, 1))\n"
    )
    scorer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert scorer.stdout is not None
    main = int(scorer.stdout.readline())
    descriptor = os.pidfd_open(main)
    scorer.kill()
    scorer.wait()
    import select

    assert select.select([descriptor], [], [], 60)[0]
    os.close(descriptor)
