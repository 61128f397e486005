"""What FutureKL is made of in a finished run: its spread, what it goes together with, and how much noise would cover it.

    megatron-fipo train examples/countdown/fipo.yaml rollout.dump_every=1 checkpoint.every=1 checkpoint.keep_last=20
    python -m tools.future_kl runs/countdown-fipo --output future-kl                     # every iteration
    python -m tools.future_kl runs/countdown-fipo --output future-kl --iterations 2 10 20

Each chosen iteration i is trained again in this process: weights and optimizer of the checkpoint of iteration i − 1 (the
model's folder for the first), the dump of iteration i, the run's mini-batches, old log-probs, then per mini-step the
log-probs and the entropy of its tokens under the current weights, and the real update. The run's loss, gradient norm, KL,
entropy and mean influence weight must come out again (table Replay); else the command refuses. With
`checkpoint.keep_every=5` in addition to fewer `keep_last`, iterations 1, 6, 11, … can be chosen. FOLDER gets `parts.json`,
with every table for every scope, and `parts.md`.

    Δ   log-ratio of a token, current over old policy       F   FutureKL, Σ_{k≥t} γ^(k−t) Δ_k without filtered tokens
    f   influence weight, clip(exp F) and the safety rule   δ   log-prob under the old policy minus that under another one

A scope is one mini-step of all iterations, or all mini-steps but the first. In the first, Δ and F are exactly zero, and
correlations with them are not defined (–).

Spread. std Δ, mean F, std F, std f: over the tokens of the scope. f at low, f at high: share of tokens with exp F at or
beyond a bound of `influence_clip`. own share: cov(Δ_t, F_t) / var F, what a token's own log-ratio contributes to the variance
of F; later share: the same of what comes after it. They add up to 100 %. interaction: 2 cov / var F of the two, which is in
both shares by half. own share of random signs: if each Δ kept its size and had a random sign; about 1 − γ² for long responses.
The own share is smaller than that where the log-ratios of a response add up.

Distance to the end. Tokens by how many there are from them to the end of the response, themselves included. std F of random
signs: sqrt(mean Σ_{k≥t} γ^(2(k−t)) Δ_k²). Where std F is above it, the log-ratios of a response add up; below, they cancel.

Correlations. Of F and f with properties of the token or its response, over all, wrong and right responses: relative position
(0 for the first token, 1 for the last); tokens after it; entropy of the policy at the token, and the mean entropy of the next
32 tokens; advantage; correctness of the response; for countdown also whether the attempt that the token belongs to, and the
next attempt, reach the target. Intervals resample prompt groups, because the tokens of a response are not independent.

Noise floor. Independent normal errors of standard deviation σ in the old log-probs. predicted: σ·sqrt(mean (1 − γ^2n)/(1 − γ²))
for n tokens to the end; measured: F computed again with drawn errors. The first σ is that of the run's own engine against the
trainer. signal to noise: std F over the measured error. correlation of f, f moved: f with errors against f without them, and
the share of tokens where they differ by more than 0.02. critical σ: where the predicted error is as large as std F.

Other log-probs in the place of the old ones. F and f if these took the place of the trainer's old log-probs: those of the
engine that sampled (`rollout engine`); for a run in float32 those of its weights rounded to bfloat16, by the trainer's model
with float32 logits (`bfloat16`) and by transformers with bfloat16 logits (`bfloat16 logits`); those of the weights one
iteration before (`one step off`), where they exist. Columns as above.

Off-policy correction. If those policies had sampled the responses, and F is exact because the trainer's old log-probs are
kept: the mean factor on a token's loss by `correction=tis` and `mis`, the share of tokens with a weight exp δ beyond
`correction_cap`, which tis caps and mis masks, and the effective sample size of the weights. For `one step off` the newer
weights have sampled, so tokens of large weight are more frequent than in a run that samples with the older ones.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fipo.environment import run_versions
from megatron_fipo.errors import UserError
from megatron_fipo.exit_codes import DONE, USER_ERROR
from megatron_fipo.outputs import check_new_folder, write_output
from megatron_fipo.study.statistics import LEVEL
from tools.bench.harness import parser
from tools.future_kl.analysis import analyse
from tools.future_kl.correlation import RESAMPLES
from tools.future_kl.render import render
from tools.future_kl.replay import Replay, Replayed, trainer_rank
from tools.future_kl.run import FinishedRun, open_run

JSON_FILE, MARKDOWN_FILE = "parts.json", "parts.md"


def main() -> int:
    arguments = _arguments()
    try:
        check_new_folder(arguments.output, "--output")
        run = open_run(arguments.run_dir)
        iterations = run.choose(arguments.iterations)
        replayed = replay(run, iterations)
        result = _result(run, replayed, arguments.seed)
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        write_output(arguments.output / JSON_FILE, text)
        write_output(arguments.output / MARKDOWN_FILE, render(json.loads(text)))
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    print(f"{arguments.output / MARKDOWN_FILE}")
    return DONE


def replay(run: FinishedRun, iterations: list[int]) -> dict[int, Replayed]:
    """Each iteration, in ascending order."""
    found = {}
    with trainer_rank(run.config) as worker:
        replays = Replay(run, worker)
        for iteration in iterations:
            found[iteration] = replays.iteration(iteration)
            print(
                f"iteration {iteration}: {len(found[iteration].steps)} mini-steps replayed", file=sys.stderr
            )
    return found


def _result(run: FinishedRun, replayed: dict[int, Replayed], seed: int) -> dict[str, Any]:
    steps = [step for found in replayed.values() for step in found.steps]
    return {
        "run": str(run.directory.path),
        "iterations": list(replayed),
        "mini_steps": max(step.number for step in steps),
        "seed": seed,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "versions": run_versions(),
        "settings": asdict(run.config),
        "replay": [
            {"iteration": iteration, "metric": name, "run": recorded, "replay": value}
            for iteration, found in replayed.items()
            for name, (recorded, value) in found.metrics.items()
        ],
        **analyse(steps, run.config.objective, seed),
    }


def _arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "run_dir", type=Path, help="folder of a finished run of fipo, with dumps and checkpoints"
    )
    options.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="new folder for the result"
    )
    options.add_argument(
        "--iterations",
        type=int,
        nargs="+",
        default=[],
        help="iterations to train again (default: all that can be)",
    )
    options.add_argument("--seed", type=int, default=0, help="of drawn errors and resamples (default 0)")
    return options.parse_args()


if __name__ == "__main__":
    sys.exit(main())
