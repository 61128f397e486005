"""The commands `train`, `evaluate`, `sft`, `report`, `doctor` and `config`: their arguments and handlers."""

import argparse
import os
from pathlib import Path

from megatron_fipo.cli.arguments import Subparsers, add_command, add_overrides, path
from megatron_fipo.cli.streams import say
from megatron_fipo.environment import HUB_OFFLINE


def add_train(commands: Subparsers) -> None:
    command = add_command(commands, "train", "train a model by reinforcement learning", TRAIN_HELP)
    command.add_argument("config", metavar="CONFIG", help="YAML file; ready-made ones are in examples/")
    add_overrides(command, "optimizer.lr=1e-5 objective.influence_clip=[0.8,1.2]")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan (ranks, memory, times) and stop, as `plan` does, which has more options; needs only the "
        "model's config.json",
    )
    command.add_argument(
        "--allow-change",
        metavar="KEY[,KEY]",
        default="",
        help="settings that may differ from those of the existing run, although they change its mathematics",
    )
    command.add_argument(
        "--replay",
        metavar="DIR",
        type=path,
        help="train on the responses dumped in DIR (rollout.dump_every), without engines",
    )
    command.set_defaults(handler=run_train)


TRAIN_HELP = """\
    Train a model by reinforcement learning: roll out, score, update with FIPO (or DAPO, GRPO), push weights,
    evaluate.

    The settings come from a YAML file and key=value overrides; `megatron-fipo config` explains each of them.
    Invalid combinations are refused before anything starts. Paths are relative to the current directory; a
    leading ~ is the home folder.

    Results are written to the run_dir of the configuration: metrics, checkpoints, report.html, and the
    trained model in Hugging Face format. Ctrl-C saves the state; the same command resumes from it. SIGTERM,
    SIGUSR1 and max_walltime_minutes also save the state and exit with code 85, which tells a scheduler to
    start the command again.

    examples:
      megatron-fipo train examples/countdown/fipo.yaml
      megatron-fipo train examples/countdown/fipo.yaml parallel.tensor_model_parallel_size=2 run_dir=runs/tp2
      megatron-fipo train examples/qwen2.5-32b/fipo.yaml --dry-run
      megatron-fipo train mine.yaml optimizer.lr=2e-6 --allow-change optimizer.lr
      megatron-fipo train mine.yaml run_dir=runs/again --replay runs/mine/rollouts
"""


def run_train(arguments: argparse.Namespace) -> int:
    from megatron_fipo.config import load_config, validate

    config = load_config(arguments.config, arguments.overrides, note=say)
    from megatron_fipo.families.registry import read_architecture

    architecture = read_architecture(config.model.path)
    # `train` validates again with the machine. Here errors appear before Ray and Megatron-Core are imported,
    # which takes seconds.
    validate(config, architecture)
    if arguments.dry_run:
        from megatron_fipo.cli.case_options import read_case
        from megatron_fipo.cli.plan import print_case

        print_case(read_case(config))
        return 0
    os.environ.setdefault(HUB_OFFLINE, "1")  # read when huggingface_hub is imported
    from megatron_fipo.driver.train import train

    return train(config, [key for key in arguments.allow_change.split(",") if key], arguments.replay)


def add_evaluate(commands: Subparsers) -> None:
    command = add_command(commands, "evaluate", "evaluate a model on held-out problems", EVALUATE_HELP)
    command.add_argument(
        "model_dir", metavar="HF_DIR", help="folder with config.json, safetensors and tokenizer"
    )
    command.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file as for train")
    add_overrides(command, "evaluation.samples_per_problem=8 rollout.temperature=0.7")
    command.add_argument(
        "--output",
        metavar="FILE",
        type=path,
        help="file for the table, as JSON lines (default: runs/evaluation/<name of HF_DIR>.jsonl)",
    )
    command.set_defaults(handler=run_evaluate)


EVALUATE_HELP = """\
    Evaluate a model in Hugging Face format on the held-out problems: avg@k, cons@k, pass@k and response
    length, a row for each set.

    CONFIG gives data, reward, rollout and evaluation settings, usually those of the training run; its
    model.path is replaced by HF_DIR. Without CONFIG the defaults apply; override them with key=value. Nothing
    is trained.

    Prints the metrics, and writes a table with every response and its score to FILE. The run_dir is not
    changed.

    examples:
      megatron-fipo evaluate examples/countdown/base-model examples/countdown/fipo.yaml
      megatron-fipo evaluate runs/countdown-fipo/model examples/countdown/fipo.yaml --output trained.jsonl
      megatron-fipo evaluate /models/Qwen2.5-7B data.source=parquet evaluation.sets.aime24=data/aime24.parquet
"""


def run_evaluate(arguments: argparse.Namespace) -> int:
    from megatron_fipo.config import load_config, validate_evaluation

    file, overrides = arguments.config, list(arguments.overrides)
    if file is not None and "=" in file:  # no CONFIG: its position has the first override
        file, overrides = None, [file, *overrides]
    if file is None:
        # The schema requires a run_dir; evaluation writes nothing there.
        overrides.insert(0, "run_dir=runs/evaluation")
    overrides.append(f"model.path={arguments.model_dir}")
    config = load_config(file, overrides, note=say)
    from megatron_fipo.families.registry import read_architecture

    validate_evaluation(config, read_architecture(config.model.path))
    os.environ.setdefault(HUB_OFFLINE, "1")  # read when huggingface_hub is imported
    from megatron_fipo.driver.evaluate import evaluate

    model_name = Path(os.path.abspath(config.model.path)).name
    evaluate(config.model.path, config, arguments.output or Path("runs/evaluation") / f"{model_name}.jsonl")
    return 0


def add_sft(commands: Subparsers) -> None:
    summary = "supervised training: of a model on your rows, or of the base model of a small task"
    command = add_command(commands, "sft", summary, SFT_HELP)
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    add_overrides(command, "optimizer.lr=1e-5 steps=500 seed=2")
    command.set_defaults(handler=run_sft)


SFT_HELP = """\
    Train a model on responses with Megatron-Core, and save it in Hugging Face format: a model folder or random
    weights, on the rows of a file or on generated traces. Only response tokens are trained on.

    The base model in examples/countdown, which `train` starts from, was made by this command. `megatron-fipo
    config sft` explains the settings. The model is written to the output_dir of the configuration. Nothing is
    saved before the end, so a run cannot be resumed.

    examples:
      megatron-fipo sft examples/countdown/sft.yaml output_dir=runs/base-model
      megatron-fipo sft examples/smollm-math/sft.yaml
"""


def run_sft(arguments: argparse.Namespace) -> int:
    from megatron_fipo.config import SftConfig, load_config, validate_sft

    config = load_config(arguments.config, arguments.overrides, SftConfig, note=say)
    validate_sft(config)
    from megatron_fipo.families.registry import read_architecture

    validate_sft(config, read_architecture(config.start))
    from megatron_fipo.driver.sft import train

    train(config)
    return 0


def add_report(commands: Subparsers) -> None:
    command = add_command(commands, "report", "rebuild the report of a run", REPORT_HELP)
    command.add_argument(
        "run_dir", metavar="RUN_DIR", type=path, help="the run_dir of a training run, finished or in progress"
    )
    command.set_defaults(handler=run_report)


REPORT_HELP = """\
    Rebuild RUN_DIR/report.html from the metrics and samples that the run has logged: the figures of the paper
    for this run, and responses with their tokens colored by influence weight. The page needs no network.
    Works while the run is in progress.

    example:
      megatron-fipo report runs/countdown-fipo
"""


def run_report(arguments: argparse.Namespace) -> int:
    from megatron_fipo.report import write_report

    print(f"wrote {write_report(arguments.run_dir)}")
    return 0


def add_doctor(commands: Subparsers) -> None:
    summary = "show which optional GPU packages are installed, and the effect of each missing one"
    command = add_command(commands, "doctor", summary, DOCTOR_HELP)
    command.set_defaults(handler=run_doctor)


DOCTOR_HELP = """\
    Show Python, CUDA and the packages that training uses, each with its version or the effect of its absence,
    and what is wrong with the GPUs: a driver that is too old, cards that differ or are too old. Exits with code 1
    if a required package is missing, or the GPUs cannot train with the default settings.
"""


def run_doctor(arguments: argparse.Namespace) -> int:
    from megatron_fipo.cli import doctor

    return doctor.main()


def add_config(commands: Subparsers) -> None:
    summary = "print every setting with its meaning and default"
    command = add_command(commands, "config", summary, CONFIG_HELP)
    command.add_argument(
        "command",
        nargs="?",
        choices=("train", "sft", "launch", "study"),
        default="train",
        help="the command that the settings are for (default: train)",
    )
    command.set_defaults(handler=run_config)


CONFIG_HELP = """\
    Print every setting with its meaning and default, as a YAML file to start from. Required values are shown
    as ???.

    example:
      megatron-fipo config > mine.yaml
"""


def run_config(arguments: argparse.Namespace) -> int:
    from megatron_fipo.config import Config, SftConfig
    from megatron_fipo.config.describe import describe
    from megatron_fipo.launch.settings import LaunchSettings
    from megatron_fipo.study.schema import StudyConfig

    schemas = {"train": Config, "sft": SftConfig, "launch": LaunchSettings, "study": StudyConfig}
    print(describe(schemas[arguments.command]))
    return 0
