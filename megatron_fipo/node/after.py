"""The last step of a job's attempt: whether the job is requeued, and without which nodes.

    python -m megatron_fipo.node.after --logs FOLDER --retries N --code CODE

Prints variables for the batch script, and the reason on stderr.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.node import attempts
from megatron_fipo.node.nodes import bad_nodes
from megatron_fipo.node.requeue import end
from megatron_fipo.node.shell import answer, exit_code
from megatron_fipo.node.slurm_variables import text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_fipo.node.after")
    parser.add_argument("--logs", type=Path, required=True, help="log folder of the attempt")
    parser.add_argument("--retries", type=int, required=True)
    parser.add_argument("--code", type=int, required=True, help="exit code of the attempt")
    arguments = parser.parse_args(argv)
    job, logs = text(os.environ, "SLURM_JOB_ID"), arguments.logs.parent
    history = attempts.read_history(logs, job)
    decision = end(history, arguments.code, attempts.progress(logs.parent), arguments.retries)
    attempts.write_history(logs, job, decision.history)
    print(f"megatron-fipo: {decision.reason}", file=sys.stderr)
    answer(requeue=decision.requeue or None, code=decision.code, exclude=",".join(bad_nodes(arguments.logs)))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
