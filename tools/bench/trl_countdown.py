"""Megatron-FIPO beside TRL's `GRPOTrainer` on countdown, on the same two CPU cores: time, tokens, memory, held-out accuracy.

    make venv venv-adapters
    python -m tools.bench.trl_countdown --output bench/trl                 # one run of each, 10 iterations: some minutes
    python -m tools.bench.trl_countdown --plain-generate                   # TRL with its default generation
    python -m tools.bench.trl_countdown --seeds 1 2 3 --repeats 2          # 6 runs of each, in turn
    python -m tools.bench.trl_countdown --iterations 2 batch.prompts_per_iteration=6   # settings of both, to try it

Each run is a process of its own, ours and TRL's in turn. Ours is `megatron-fipo train examples/countdown/dapo.yaml`; TRL's
is `tools/bench/trl_run.py`, which takes its settings from the same file. Both start from the same base model in float32, with
the same training problems in the same order, 24 prompts x 16 responses per iteration, at most 160 tokens sampled at temperature
1, 4 optimizer steps per iteration on the same number of responses, AdamW with the same learning rate and gradient clip, DAPO's
loss with clip 0.2/0.28 and dual clip 10 (`delta`), no KL term, the countdown scorer and overlong penalty of this project, and
150 held-out problems with 4 responses each. TRL has what was fastest of its settings on one core: continuous batching of
transformers with 64 sequences at a time (its default, `generate`, takes about three times as long), SDPA, mini-batches of
96 responses at once, no gradient checkpointing.

What differs:

- Dynamic sampling. We replace a group whose responses are all right or all wrong by one more prompt; TRL trains on it, with
  advantages near 0. The table counts prompts sampled and such groups. After a replacement the prompts of the systems differ.
- Advantages are divided by the standard deviation + 1e-6 here, + 1e-4 in TRL.
- Mini-batches are 6 whole groups here, and as many responses drawn from all groups in TRL.
- The loss is the mean over the tokens of the mini-batch here, and over a quarter of the tokens of the iteration in TRL.
- Padding. We pack a mini-batch by tokens into micro-batches; TRL pads all responses to the longest of the iteration.
- Engine. Ours is a process of its own that decodes all responses at once; TRL generates with the model that it trains. Random
  numbers differ with the same seed.
- Processes. Ours are driver, engine, rank and scorers on a Ray cluster; TRL is one process.
- With --threads N, TRL computes with N threads; Megatron-FIPO has N ranks and N engines with one thread each, of which either
  the ranks or the engines work.

Seconds are those of an iteration without evaluation, after the first iteration of each run, since that includes warming up:
median (least to most). Tokens are response tokens trained on. Memory is the proportional set size of the process and all its
descendants, read every second.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median

from megatron_fipo.environment import run_versions
from megatron_fipo.outputs import write_output
from megatron_fipo.run_dir.evaluation_names import MAIN, evaluation_metric
from megatron_fipo.run_dir.metrics_log import Record, read_metrics
from tools.bench import process_tree
from tools.bench.harness import ROOT, heading, parser, table

CONFIG = "examples/countdown/dapo.yaml"
CORES = 2
EVERY = 5
"""Iterations between evaluations."""
OURS, TRL = "Megatron-FIPO", "TRL"
TRL_PACKAGES = ("trl", "torch", "transformers", "accelerate")
LAST_LINES = 20
"""Of what a run printed, shown if it fails."""

Values = Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """What one run measured."""

    system: str
    seed: int
    load: float
    """Processes that were running or waiting for a core in the minute before it."""
    seconds: float
    """From the start of its process to its end."""
    peak_bytes: int
    """Of all its processes together."""
    iterations: dict[str, list[float]]
    """Name in `MEASURES` → values by iteration, the first included."""
    accuracy: dict[int, float]
    """Held-out avg@k after so many iterations."""
    length: dict[int, float]
    """Held-out response length in tokens, likewise."""


@dataclass(frozen=True)
class Comparison:
    """All that is written as JSON."""

    title: str
    """Date, machine and options."""
    settings: list[str]
    """Of all runs of both systems, in addition to those of `CONFIG`."""
    versions: dict[str, dict[str, str]]
    """System → package → version."""
    runs: list[Run]


@dataclass(frozen=True)
class Measure:
    """A number of an iteration, from its metrics."""

    of: Callable[[Values], float]
    digits: int = 1


def seconds_of(values: Values) -> float:
    return values["time/total"] - values["time/evaluation"] - values["time/checkpoint"]


def rest_of(values: Values) -> float:
    return seconds_of(values) - sum(values[f"time/{name}"] for name in ("rollout", "old_log_probs", "update"))


MEASURES = {
    "seconds per iteration": Measure(seconds_of, 2),
    "of it rollout and scores": Measure(lambda values: values["time/rollout"], 2),
    "of it old log-probs": Measure(lambda values: values["time/old_log_probs"], 2),
    "of it update": Measure(lambda values: values["time/update"], 2),
    "of it the rest": Measure(rest_of, 2),
    "tokens per second": Measure(lambda values: values["tokens/used"] / seconds_of(values), 0),
    "tokens per iteration": Measure(lambda values: values["tokens/used"], 0),
    "prompts sampled": Measure(lambda values: values["rollout/prompts"], 0),
    "groups all right or all wrong": Measure(
        lambda values: values["groups/all_right"] + values["groups/all_wrong"], 0
    ),
}
"""The first rows of the table."""


# -- a run


def settings(options: Namespace) -> list[str]:
    """Of all runs of both systems, in addition to those of `CONFIG`."""
    return [
        f"iterations={options.iterations}",
        f"evaluation.every={EVERY}",
        "checkpoint.every=0",
        "tracking.wandb=disabled",
        "tracking.tensorboard=false",
        *options.overrides,
    ]


def command(system: str, options: Namespace, seed: int, run_dir: Path) -> list[str]:
    given = [CONFIG, *settings(options), f"seed={seed}", f"run_dir={run_dir}"]
    if system == TRL:
        plain = ["--plain-generate"] if options.plain_generate else []
        return [str(options.trl_python), "-m", "tools.bench.trl_run", *plain, *given]
    workers = [f"parallel.data_parallel_size={options.threads}", f"rollout.num_engines={options.threads}"]
    return [sys.executable, "-m", "megatron_fipo.cli", "train", *given, *workers]


def measure(system: str, options: Namespace, seed: int) -> Run:
    """Train once. Raises SystemExit, with the end of its output, if it fails."""
    load = os.getloadavg()[0]
    threads = options.threads if system == TRL else 1
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        run_dir, log = Path(folder) / "run", Path(folder) / "log"
        words = command(system, options, seed, run_dir)
        ended = process_tree.run(words, log, environment, ROOT)
        if ended.code:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise SystemExit(f"{system} ended with {ended.code}: {' '.join(words)}\n{last}")
        return result(system, seed, load, ended, read_metrics(run_dir))


def result(system: str, seed: int, load: float, ended: process_tree.Ended, records: Sequence[Record]) -> Run:
    """The run from its log."""
    iterations = [record.values for record in records if record.kind == "iteration"]
    evaluations = {record.iteration: record.values for record in records if record.kind == "evaluation"}
    return Run(
        system,
        seed,
        load,
        ended.seconds,
        ended.peak_bytes,
        {name: [each.of(values) for values in iterations] for name, each in MEASURES.items()},
        {number: values[evaluation_metric(MAIN)] for number, values in evaluations.items()},
        {number: values[evaluation_metric("length_mean")] for number, values in evaluations.items()},
    )


# -- the table


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Name, ours, TRL's, and TRL's divided by ours."""
    by_system = [[run for run in runs if run.system == system] for system in (OURS, TRL)]
    return [
        *(
            _row(name, [_after_the_first(of_one, name) for of_one in by_system], each.digits)
            for name, each in MEASURES.items()
        ),
        _row("peak memory, GiB", [[max(run.peak_bytes for run in runs) / 2**30] for runs in by_system], 2),
        *_held_out("held-out accuracy", [[run.accuracy for run in runs] for runs in by_system], 3),
        *_held_out("held-out response length", [[run.length for run in runs] for runs in by_system], 1),
    ]


def _after_the_first(runs: Iterable[Run], name: str) -> list[float]:
    return [value for run in runs for value in run.iterations[name][1:]]


def _held_out(name: str, by_system: list[list[dict[int, float]]], digits: int) -> list[list[str]]:
    """A row per evaluation: means over runs."""
    return [
        _row(
            f"{name}, iteration {number}",
            [[fmean(series[number] for series in runs)] for runs in by_system],
            digits,
        )
        for number in by_system[0][0]
    ]


def _row(name: str, by_system: Sequence[Sequence[float]], digits: int) -> list[str]:
    ours, theirs = (median(values) for values in by_system)
    ratio = f"{theirs / ours:.2f}" if ours else ""
    return [name, *(_cell(values, digits) for values in by_system), ratio]


def _cell(values: Sequence[float], digits: int) -> str:
    """The median, and the range if there are several values."""
    middle, least, most = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least} to {most})"


def page(comparison: Comparison) -> str:
    """Markdown: what was measured where, and the table."""
    versions = comparison.versions
    software = [
        f"- {system}: " + ", ".join(f"{name} {version}" for name, version in versions[system].items())
        for system in (OURS, TRL)
    ]
    heads = ["", OURS, f"{TRL} {versions[TRL]['trl']}", f"{TRL} / {OURS}"]
    lines = [comparison.title, "", f"- {CONFIG} {' '.join(comparison.settings)}", *software, ""]
    return "\n".join([*lines, table(heads, rows(comparison.runs))]) + "\n"


# -- the command


def trl_versions(python: Path) -> dict[str, str]:
    """Of the packages of TRL's environment. Raises SystemExit if it has no TRL."""
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {TRL_PACKAGES}}}))"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(
            f"{python} is not a Python with TRL; run `make venv-adapters`, or give --trl-python"
        ) from None
    return json.loads(done.stdout)


def parsed() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--iterations", type=int, default=10, help="at least 2")
    options.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="SEED")
    options.add_argument("--repeats", type=int, default=1, help="runs of each system with each seed")
    options.add_argument("--threads", type=int, default=1, help="cores that a system computes on at one time")
    options.add_argument("--trl-python", type=Path, default=Path(".venv-adapters/bin/python"))
    options.add_argument(
        "--plain-generate", action="store_true", help="TRL with its default generation, which is slower here"
    )
    options.add_argument("--output", type=Path, metavar="FOLDER", help="for trl_countdown.md and .json")
    options.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of both systems")
    arguments = options.parse_args()
    if arguments.iterations < 2:
        options.error("--iterations must be at least 2, since the first one is left out")
    arguments.trl_python = Path(os.path.abspath(arguments.trl_python))  # the link of a virtual environment
    return arguments


def main() -> None:
    options = parsed()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # of all runs
    versions = {OURS: run_versions(), TRL: trl_versions(options.trl_python)}
    seeds = " ".join(map(str, options.seeds))
    generation = "generate" if options.plain_generate else "continuous batching"
    title = heading(
        f"{options.iterations} iterations, threads {options.threads}, seeds {seeds}, repeats {options.repeats}",
        f"TRL with {generation}",
    )
    print(title, flush=True)
    runs = []
    for seed, _, system in product(options.seeds, range(options.repeats), (OURS, TRL)):
        run = measure(system, options, seed)
        runs.append(run)
        print(f"{system}, seed {seed}: {run.seconds:.0f} s (load before it {run.load:.1f})", flush=True)
    comparison = Comparison(title, settings(options), versions, runs)
    shown = page(comparison)
    print(f"\n{shown}", end="")
    if options.output:
        write_output(options.output / "trl_countdown.md", shown)
        write_output(options.output / "trl_countdown.json", json.dumps(asdict(comparison), indent=1) + "\n")


if __name__ == "__main__":
    main()
