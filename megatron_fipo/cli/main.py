"""The command line. Nothing heavy is imported before a command has its settings: `--help` and a mistyped key answer at once."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import dedent

from megatron_fipo.cli.convert import add_convert
from megatron_fipo.errors import UserError

Handler = Callable[[argparse.Namespace], int]

OVERRIDES = (
    "settings that win over the file, for example optimizer.lr=1e-5 objective.influence_clip=[0.8,1.2]"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done · 2 a mistake of the user, one sentence on stderr · 85 stopped by SIGTERM, SIGUSR1 or the time limit with its state saved:
    run the same command to go on · 130 stopped by Ctrl-C.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        # argparse does not resume optional positionals behind a flag, as in `train CONFIG --dry-run key=value`.
        if word.startswith("-") or not hasattr(arguments, "overrides"):
            parser.error(f"unrecognized argument: {word}")
        if "=" in word:
            arguments.overrides.append(word)
        elif arguments.config is None:
            arguments.config = word
        else:
            parser.error(f"unrecognized argument: {word}")
    try:
        return arguments.handler(arguments)
    except UserError as error:
        print(f"megatron-fipo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (
        BrokenPipeError
    ):  # as in `... --dry-run | head`; Python would complain again when it flushes at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-fipo",
        description="Train language models with FIPO (future-KL influenced policy optimization) on Megatron-Core.",
        epilog="Each command has its own --help. Start with: megatron-fipo train examples/countdown/fipo.yaml",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_evaluate(commands)
    _add_sft(commands)
    report = _add(commands, "report", "rebuild the report of a run", REPORT_HELP, run_report)
    report.add_argument("run_dir", metavar="RUN_DIR", help="the run_dir of a training run, finished or not")
    _add(
        commands,
        "doctor",
        "show which accelerations are installed, and what is lost without each",
        DOCTOR_HELP,
        run_doctor,
    )
    add_convert(commands)
    config = _add(
        commands, "config", "print every setting with its meaning and default", CONFIG_HELP, run_config
    )
    config.add_argument(
        "command",
        nargs="?",
        choices=("train", "sft"),
        default="train",
        help="whose settings (default: train)",
    )
    return parser


def _add(commands, name: str, summary: str, description: str, handler: Handler) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=dedent(description),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(handler=handler)
    return command


TRAIN_HELP = """\
    Train a model by reinforcement learning: roll out, score, update with FIPO (or DAPO, GRPO), push weights, evaluate.

    The settings come from a YAML file and key=value overrides; `megatron-fipo config` explains each of them. Impossible
    combinations are refused before anything starts. Paths start at the current directory.

    Results are in the run_dir of the configuration: metrics, checkpoints, report.html, and the trained model in Hugging Face
    format. Ctrl-C saves the state; the same command again continues from it. SIGTERM, SIGUSR1 and max_walltime_minutes do the same
    and exit with code 85, by which a scheduler knows to start the command again.

    examples:
      megatron-fipo train examples/countdown/fipo.yaml
      megatron-fipo train examples/countdown/fipo.yaml parallel.tensor_model_parallel_size=2 run_dir=runs/tp2
      megatron-fipo train examples/qwen2.5-32b/fipo.yaml --dry-run
      megatron-fipo train mine.yaml optimizer.lr=2e-6 --allow-change optimizer.lr
      megatron-fipo train mine.yaml run_dir=runs/again --replay runs/mine/rollouts
"""


def _add_train(commands) -> None:
    command = _add(commands, "train", "train a model by reinforcement learning", TRAIN_HELP, run_train)
    command.add_argument("config", metavar="CONFIG", help="YAML file; ready-made ones are in examples/")
    command.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES)
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan (ranks, parameters and memory per rank, tokens per step) and stop; needs only the model's config.json",
    )
    command.add_argument(
        "--allow-change",
        metavar="KEY[,KEY]",
        default="",
        help="settings in which an existing run may go on differently, though they change its mathematics",
    )
    command.add_argument(
        "--replay",
        metavar="DIR",
        type=Path,
        help="train on the responses dumped there (rollout.dump_every), without engines",
    )


def run_train(arguments: argparse.Namespace) -> int:
    from megatron_fipo.config import load_config, validate

    config = load_config(arguments.config, arguments.overrides)
    from megatron_fipo.families.registry import read_model_config

    family, architecture = read_model_config(config.model.path)
    # `train` checks again with the machine; here mistakes show before Ray and Megatron-Core take seconds to import.
    validate(config, architecture)
    if arguments.dry_run:
        from rich.console import Console

        from megatron_fipo.plan.plan import make_plan
        from megatron_fipo.plan.render import print_plan

        print_plan(config, architecture, make_plan(config, family, architecture), Console())
        return 0
    from megatron_fipo.driver.train import train

    return train(config, [key for key in arguments.allow_change.split(",") if key], arguments.replay)


EVALUATE_HELP = """\
    Measure a model in Hugging Face format on the held-out problems: avg@k, cons@k, pass@k and response length.

    CONFIG gives data, reward, rollout and evaluation settings, usually those of the training run; its model.path is replaced
    by HF_DIR. Without CONFIG the defaults hold and key=value settings say the rest. Nothing is trained.

    Prints the measurements, and writes a table with every response and its score to FILE. The run_dir is not touched.

    examples:
      megatron-fipo evaluate examples/countdown/base-model examples/countdown/fipo.yaml
      megatron-fipo evaluate runs/countdown-fipo/model examples/countdown/fipo.yaml --output trained.jsonl
      megatron-fipo evaluate /models/Qwen2.5-7B data.source=jsonl data.evaluation_path=aime.jsonl
"""


def _add_evaluate(commands) -> None:
    command = _add(commands, "evaluate", "measure a model on held-out problems", EVALUATE_HELP, run_evaluate)
    command.add_argument(
        "model_dir", metavar="HF_DIR", help="folder with config.json, safetensors and tokenizer"
    )
    command.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file as for train")
    command.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES)
    command.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="where the table goes, as JSON lines (default: runs/evaluation/<name of HF_DIR>.jsonl)",
    )


def run_evaluate(arguments: argparse.Namespace) -> int:
    from megatron_fipo.config import load_config, validate_evaluation

    path, overrides = arguments.config, list(arguments.overrides)
    if path is not None and "=" in path:
        path, overrides = None, [path, *overrides]
    if path is None:
        overrides.insert(
            0, "run_dir=runs/evaluation"
        )  # the schema asks for one; evaluating writes nothing there
    overrides.append(f"model.path={json.dumps(arguments.model_dir, ensure_ascii=False)}")
    config = load_config(path, overrides)
    from megatron_fipo.families.registry import read_architecture

    validate_evaluation(config, read_architecture(config.model.path))
    from megatron_fipo.driver.evaluate import evaluate

    model_name = Path(os.path.abspath(arguments.model_dir)).name
    evaluate(arguments.model_dir, config, arguments.output or Path("runs/evaluation") / f"{model_name}.jsonl")
    return 0


SFT_HELP = """\
    Train a small model from random weights on generated traces, through Megatron-Core, and save it in Hugging Face format.

    It made the base model in examples/countdown, which `train` starts from. The settings are explained by
    `megatron-fipo config sft`. The result is in the output_dir of the configuration.

    example:
      megatron-fipo sft examples/countdown/sft.yaml output_dir=runs/base-model
"""


def _add_sft(commands) -> None:
    command = _add(
        commands, "sft", "make the base model of a small task by supervised training", SFT_HELP, run_sft
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument(
        "overrides", metavar="key=value", nargs="*", help=OVERRIDES.split(",")[0] + " steps=500 seed=2"
    )


def run_sft(arguments: argparse.Namespace) -> int:
    from megatron_fipo.config import SftConfig, load_config, validate_sft

    config = load_config(arguments.config, arguments.overrides, schema=SftConfig)
    from megatron_fipo.families.registry import read_architecture

    validate_sft(config, read_architecture(config.model_config_path))
    from megatron_fipo.driver.sft import train

    train(config)
    return 0


REPORT_HELP = """\
    Write RUN_DIR/report.html anew from the metrics and samples that the run has kept: the figures of the paper for this run,
    and responses with their tokens coloured by influence weight. The page needs no network. A running job may be looked at.

    example:
      megatron-fipo report runs/countdown-fipo
"""


def run_report(arguments: argparse.Namespace) -> int:
    from megatron_fipo.report import write_report

    print(f"wrote {write_report(Path(arguments.run_dir))}")
    return 0


DOCTOR_HELP = """\
    Show Python, CUDA and the packages that matter for training, each with its version or what is lost without it.
    Exits with code 1 if a package is absent that nothing runs without.
"""


def run_doctor(arguments: argparse.Namespace) -> int:
    from megatron_fipo.cli import doctor

    return doctor.main()


CONFIG_HELP = """\
    Print every setting with its meaning and default, as a YAML file to start from. Values that have to be given are ???.

    example:
      megatron-fipo config > mine.yaml
"""


def run_config(arguments: argparse.Namespace) -> int:
    from megatron_fipo.config import Config, SftConfig
    from megatron_fipo.config.describe import describe

    print(describe(Config if arguments.command == "train" else SftConfig))
    return 0


if __name__ == "__main__":
    sys.exit(main())
