"""Answers that attack the sandbox, and what must be as before after each. Run as a script, it scores all of them and prints
JSON; it imports little, so that a user without rights can run it with another Python.
"""

import json
import os
import sys
from pathlib import Path

from megatron_fipo.tasks.code.sandbox import Limits, Run, Sandbox

LIMITS = Limits(cpu_s=0.3, wall_s=0.6, memory_mb=256, output_bytes=10)
SECRET = "a-secret-of-the-scorer"

HOSTILE = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb, errors ignored": "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
    "processes by other ways": """
import ctypes, multiprocessing, os, subprocess
library = ctypes.CDLL(None)
for action in (
    lambda: subprocess.Popen(["/bin/sh", "-c", "sleep 600"]),
    lambda: multiprocessing.Process(target=print).start(),
    lambda: os.posix_spawn("/bin/sleep", ["sleep", "600"], {}),
    lambda: os.execv("/bin/sleep", ["sleep", "600"]),
    lambda: library.syscall(56, 0, 0, 0, 0, 0) == 0 and os.execv("/bin/sleep", ["sleep", "600"]),
    lambda: library.vfork(),
    lambda: os.system("sleep 600"),
):
    try: action()
    except Exception: pass
""",
    "memory": "x = bytearray(10**10)\nprint('held')",
    "memory in parts": "x = []\nwhile True: x.append(bytearray(10**6))",
    "endless loop": "while True: pass",
    "endless loop that ignores signals": """
import signal
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "sleep": "import time\ntime.sleep(10**6)",
    "closed output and sleep": "import os, time\nfor n in (0, 1, 2): os.close(n)\ntime.sleep(10**6)",
    "written file": "open({folder!r} + '/written', 'w').write('x')",
    "changed files": """
import os
for action in (
    lambda: os.unlink({folder!r} + '/kept'),
    lambda: os.rename({folder!r} + '/kept', {folder!r} + '/moved'),
    lambda: os.truncate({folder!r} + '/kept', 0),
    lambda: os.chmod({folder!r} + '/kept', 0),
    lambda: os.mkdir({folder!r} + '/made'),
    lambda: os.symlink('/etc', {folder!r} + '/link'),
    lambda: os.open({folder!r} + '/kept', os.O_WRONLY | os.O_TRUNC),
    lambda: os.utime({folder!r} + '/kept', (0, 0)),
):
    try: action()
    except Exception: pass
""",
    "symbolic link in its folder": "import os\nos.symlink('/etc/passwd', 'answer.txt')\nprint(open('answer.txt').read())",
    "huge file": "f = open('/tmp/huge', 'wb')\nwhile True: f.write(bytes(10**6))",
    "huge file in memory": "import os\nn = os.memfd_create('x')\nwhile True: os.write(n, bytes(10**6))",
    "password file": "print(open('/etc/shadow').read())",
    "environment of the scorer": """
import os
for process in [os.getppid(), {scorer}]:
    print(open(f'/proc/{{process}}/environ').read())""",
    "own environment": "import os\nprint(os.environ['JUDGE_SECRET'])",
    "memory of the scorer": """
maps = open('/proc/{scorer}/maps').read()
print(open('/proc/{scorer}/mem', 'rb').read(1))""",
    "memory of the scorer by a system call": """
import ctypes
library, data = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(8)
class Part(ctypes.Structure): _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))
local, remote = Part(ctypes.addressof(data), 8), Part({address}, 8)
assert library.process_vm_readv({scorer}, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) == 8
print(data.raw)""",
    "open files of the scorer": """
import os
for number in range(3, 1024):
    try: os.write(number, b'finished'); print(os.read(number, 100))
    except OSError: pass""",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1).send(b'x')",
    "network by a system call": """
import ctypes
library = ctypes.CDLL(None)
numbers = [library.syscall(41, family, kind, 0) for family in range(1, 45) for kind in (1, 2, 3, 5)]
assert max(numbers) < 0
numbers = [library.syscall(425, 8, ctypes.create_string_buffer(200))]
assert max(numbers) < 0
raise SystemExit(1)""",
    "signals to the scorer": """
import os, signal
for action in (
    lambda: os.kill(os.getppid(), 9), lambda: os.kill({scorer}, 9), lambda: os.kill(-1, 9), lambda: os.kill(0, 9),
    lambda: os.killpg({group}, 9), lambda: signal.pidfd_send_signal({scorer}, 9), lambda: os.kill(1, 15),
):
    try: action()
    except OSError: pass""",
    "signals by an owned file": """
import fcntl
for command, value in ((8, {scorer}), (8, -{group}), (10, 9)):
    try: fcntl.fcntl(0, command, value); print('owner')
    except OSError: pass""",
    "limits of the scorer": "import resource\nresource.prlimit({scorer}, resource.RLIMIT_NOFILE, (0, 0))\nprint('set')",
    "higher limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "daemon by two forks": "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  time.sleep(600)",
    "flood": "while True: print('x' * 1000)",
    "flood without a line": "import os\nwhile True: os.write(1, bytes(65536))",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "recursion in compiled code": "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    "exit without output": "import os\nos._exit(0)",
    "success by changes of the checker": """
import builtins, io, json, os, sys
import values
values.plain = lambda _: 'right'
json.dump = lambda value, file: file.write('"right"')
builtins.print = lambda *_: None
class Equal(str):
    def __eq__(self, other): return True
    def __hash__(self): return 0
sys.stdout = io.StringIO('right')
sys.exit = os._exit = lambda _=0: None
sys.modules.clear()
""",
    "trace": """
import sys, threading
def trace(frame, event, argument):
    frame.f_trace_lines = True
    print(frame.f_locals)
    return trace
sys.settrace(trace); threading.settrace(trace)
sys._getframe().f_back.f_trace = trace""",
    "zombies": "import os\nfor _ in range(1000):\n if os.fork() == 0: os._exit(0)",
    "threads": """
import threading, time
threading.stack_size(32768)
started = 0
try:
    while True: threading.Thread(target=time.sleep, args=(600,), daemon=True).start(); started += 1
except RuntimeError:
    print(started)
    if started > 5000: time.sleep(600)""",
    "threads that stay": "import threading, time\nthreading.Thread(target=time.sleep, args=(10**6,)).start()",
    "ptrace": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, {scorer}, 0, 0) == 0\nprint('attached')",
    "user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\nprint('unshared')",
    "system clock and modules": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "syntax": "def f(:",
    "null bytes": "\0",
    "surrogates": "print('\\ud800' * 3)",
    "end of its input's pipe": "import os, signal\nos.close(0)\nos.kill(os.getpid(), 9)",
}


def attack(sandbox: Sandbox, name: str, folder: str, port: int = 9) -> Run:
    """Run one of them."""
    values = {
        "folder": folder,
        "scorer": str(os.getpid()),
        "group": str(os.getpgrp()),
        "port": str(port),
        "address": hex(id(SECRET)),
    }
    source = HOSTILE[name]
    for key, value in values.items():
        source = source.replace(f"{{{key}!r}}", repr(value)).replace(f"{{{key}}}", value)
    source = source.replace("{{", "{").replace("}}", "}")
    return sandbox.run(source, None, b"input\n" * 20_000, LIMITS)


def processes(sandbox: Sandbox) -> list[int]:
    """Processes that the sandbox's main process has left, zombies too: all descendants, and all in sessions of such users."""
    main = sandbox.process_id
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [main]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    users = [number for number in parents if _user(number) >= 2**30]
    return sorted({*found[1:], *users})


def _user(process: int) -> int:
    try:
        return os.stat(f"/proc/{process}").st_uid
    except OSError:
        return 0


def main(folder: str) -> None:
    """Every attack, and what it left: `[[name, end, output, what is left], ...]` as JSON."""
    os.environ["JUDGE_SECRET"] = SECRET
    sandbox = Sandbox([])
    sandbox.check()
    first = sandbox.process_id
    results = []
    for name in HOSTILE:
        run = attack(sandbox, name, folder)
        left = [] if sandbox.process_id == first else ["another sandbox"]
        results.append([name, run.end, run.output.decode(errors="replace"), left + processes(sandbox)])
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
