"""The complete command on one GPU: `megatron-fipo train examples/countdown/fipo.yaml`, engine and trainer on the same one.

    python -m tools.bench.gpu_train

Needs Ray. The run uses the loop, scorers and checkpoints of any other run; its folder is temporary.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from megatron_fipo.run_dir.metrics_log import Record, read_metrics
from tools.bench.harness import REHEARSAL, ROOT, Bench, Cases, run_cases
from tools.bench.report import FAILED, FIGURE, OK, Row, reason

SECTION = "train"
CONFIG = "examples/countdown/fipo.yaml"
ITERATIONS = 4
OVERRIDES = ("tracking.wandb=disabled", "tracking.tensorboard=false")
ON_A_GPU = ("rollout.placement=colocated", f"iterations={ITERATIONS}", f"evaluation.every={ITERATIONS}")
"""One GPU for the trainer's rank and the engine."""
PER_PROMPT, REHEARSED_PER_PROMPT = 16, 4
"""Responses to a prompt; the first is that of the configuration."""
REHEARSED = (
    "iterations=1",
    "evaluation.every=1",
    "batch.prompts_per_iteration=4",
    f"batch.responses_per_prompt={REHEARSED_PER_PROMPT}",
    "batch.mini_batch_prompts=2",
    "rollout.prompts_in_flight=8",
    "rollout.max_response_length=64",
    "data.evaluation_size=4",
)
LIMIT_S = 140.0
REHEARSAL_LIMIT_S = 500.0
SIGMA = "policy/sigma_log_ratio"


def arguments(run_dir: Path, on_gpu: bool) -> list[str]:
    """Of `python`."""
    changed = ON_A_GPU if on_gpu else REHEARSED
    return ["-m", "megatron_fipo.cli", "train", CONFIG, *OVERRIDES, *changed, f"run_dir={run_dir}"]


def complete_run(bench: Bench) -> Iterator[Row]:
    if find_spec("ray") is None:
        raise ModuleNotFoundError("the driver", name="ray")
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        # Triton's interpreter is for the checks of kernels; a run without a GPU uses plain torch.
        environment = {name: value for name, value in os.environ.items() if name != REHEARSAL}
        try:
            done = subprocess.run(
                [sys.executable, *arguments(run_dir, bench.on_gpu)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT_S if bench.on_gpu else REHEARSAL_LIMIT_S,
            )
        except subprocess.TimeoutExpired as error:
            print(error.stdout)
            why = f"it took more than {error.timeout:.0f} s"
            yield reason(FAILED, SECTION, f"train {CONFIG}", why, True)
            return
        print(done.stdout)
        if done.returncode:
            last = ([line for line in done.stdout.splitlines() if line.strip()] or ["no output"])[-1]
            why = f"it ended with {done.returncode}: {last}"
            yield reason(FAILED, SECTION, f"train {CONFIG}", why, True)
            return
        yield from rows_of(read_metrics(run_dir), bench.pick(PER_PROMPT, REHEARSED_PER_PROMPT))


def rows_of(records: Sequence[Record], per_prompt: int) -> Iterator[Row]:
    """First mini-step, times and accuracy of a run that ended."""
    iterations = [record.values for record in records if record.kind == "iteration"]
    evaluations = [record.values for record in records if record.kind == "evaluation"]
    sigma = max(abs(values[SIGMA]) for values in iterations)
    name = f"first mini-step of train {CONFIG}"
    result = f"largest spread {sigma:.1e} in {len(iterations)} iterations (at most 0)"
    correct = sigma == 0.0
    yield Row(SECTION, name, OK if correct else FAILED, result, {"sigma": sigma}, True)
    seconds = [values["time/total"] for values in iterations]
    rollouts = [values["time/rollout"] for values in iterations]
    responses = median(per_prompt * values["rollout/prompts"] for values in iterations)
    result = (
        f"{median(seconds):.1f} s per iteration (first {seconds[0]:.1f} s), of it {median(rollouts):.1f} s "
        f"of rollout for {responses:,.0f} responses"
    )
    figures: dict[str, float | str] = {
        "iteration_seconds": median(seconds),
        "first_iteration_seconds": seconds[0],
        "rollout_seconds": median(rollouts),
        "responses": responses,
    }
    yield Row(SECTION, f"iterations of train {CONFIG}", FIGURE, result, figures)
    before, after = evaluations[0]["evaluation/avg_at_k"], evaluations[-1]["evaluation/avg_at_k"]
    result = f"{before:.3f} before, {after:.3f} after {len(iterations)} iterations"
    yield Row(
        SECTION,
        f"accuracy of train {CONFIG}",
        FIGURE,
        result,
        {"accuracy_before": before, "accuracy_after": after},
    )


CASES: Cases = {"complete command": complete_run}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
