"""Responses that the reward `code` scores per minute, against a fresh interpreter for each test, in turn in one process.

python -m tools.bench.code_scores [--responses 20] [--tests 5]
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import psutil

from megatron_fipo.config import RewardConfig
from megatron_fipo.tasks.code.reward import CodeTests, last_python_block
from megatron_fipo.tasks.task import Completion, Problem
from tools.bench.harness import heading, parser, table

PROGRAM = "import sys\nfrom collections import Counter\ndata = sys.stdin.read().split()\nprint(sum(map(int, data)), len(Counter(data)))"


def completion(tests: int) -> Completion:
    """A right response to a problem with so many tests of 100 numbers."""
    inputs = [" ".join(str(number * scale % 97) for number in range(100)) for scale in range(1, tests + 1)]
    outputs = [f"{sum(map(int, text.split()))} {len(set(text.split()))}" for text in inputs]
    problem = Problem("p", (1,), "sum", json.dumps({"inputs": inputs, "outputs": outputs}), "bench")
    return Completion(problem, f"```python\n{PROGRAM}\n```", np.zeros(1, np.int32), "stop")


def fresh_interpreter(given: Completion) -> float:
    """The score by `python -c` for each test, without any protection."""
    truth = json.loads(given.problem.ground_truth)
    command = [sys.executable, "-c", str(last_python_block(given.text))]
    for text, expected in zip(truth["inputs"], truth["outputs"], strict=True):
        if (
            subprocess.run(command, input=text, capture_output=True, text=True).stdout.split()
            != expected.split()
        ):
            return 0.0
    return 1.0


def measured(
    score: Callable[[], float], processor_s: Callable[[], float], responses: int
) -> tuple[float, float]:
    """Seconds of wall-clock time and of processor time per response."""
    start, used = time.perf_counter(), processor_s()
    assert all(score() == 1.0 for _ in range(responses))
    return (time.perf_counter() - start) / responses, (processor_s() - used) / responses


def processor_seconds(process: psutil.Process | None) -> float:
    """Of this process, of those that it has waited for, and of another with those."""
    times = [psutil.Process().cpu_times(), *([process.cpu_times()] if process else [])]
    return sum(part.user + part.system + part.children_user + part.children_system for part in times)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--responses", type=int, default=20, help="responses per turn (20)")
    options.add_argument("--tests", type=int, default=5, help="tests of the problem (5)")
    options.add_argument("--turns", type=int, default=3, help="turns, of which the best counts (3)")
    arguments = options.parse_args()
    given = completion(arguments.tests)
    tests = CodeTests(RewardConfig(timeout_s=600.0))
    start = time.perf_counter()
    tests.check()
    ready = time.perf_counter() - start
    sandbox = psutil.Process(tests.process_id)
    methods: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "reward `code`, one scorer": (lambda: tests.score(given).reward, lambda: processor_seconds(sandbox)),
        "`python -c` for each test": (lambda: fresh_interpreter(given), lambda: processor_seconds(None)),
    }
    best = dict.fromkeys(methods, (math.inf, math.inf))
    for _ in range(arguments.turns):
        for name, (score, processor_s) in methods.items():
            best[name] = min(best[name], measured(score, processor_s, arguments.responses))
    tests.close()
    print(heading(f"{arguments.tests} tests per response", f"sandbox ready in {ready:.1f} s"))
    rows = [
        (name, f"{60 / wall:,.0f}", f"{1e3 * used / arguments.tests:.1f} ms", f"{60 / used:,.0f}")
        for name, (wall, used) in best.items()
    ]
    print(
        table(
            ("method", "responses per minute", "processor time per test", "responses per minute of a core"),
            rows,
        )
    )


if __name__ == "__main__":
    main()
