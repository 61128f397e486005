"""The sections of the GPU check, in two parts of less than 7 minutes each, and the choice of them. Pure."""

from dataclasses import dataclass
from itertools import chain

PART_LIMIT_S = 405.0
"""Of a part, so that it has ended within 420 s, the start of the check and the end of its last process included."""
PYTEST = (
    "pytest",
    "-m",
    "gpu",
    "-s",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:faulthandler",
    "-q",
    "--no-header",
    "--tb=short",
)


@dataclass(frozen=True)
class Section:
    """A test file or a benchmark. Its process reports cases and rows as `tools.bench.harness.send` does."""

    name: str
    command: tuple[str, ...]
    """After `python -m`; the names of cases are appended if not all of them are to run."""
    expected_s: float
    """Estimate of its time on an H200, the starts of its processes included."""
    budget_s: float
    """Of all cases together."""
    case_s: float
    """Of one case, the start of its process included."""
    correctness: bool
    one_each: tuple[str, ...] = ()
    """If given, these cases run, each in a process of its own, so that memory of one is free for the next."""


def _tests(name: str, expected_s: float, budget_s: float, case_s: float) -> Section:
    file = f"tests/gpu/test_{name}.py"
    return Section(name, (*PYTEST, file), expected_s, budget_s, case_s, correctness=True)


def _bench(
    name: str,
    module: str,
    expected_s: float,
    budget_s: float,
    case_s: float,
    correctness: bool = False,
    one_each: tuple[str, ...] = (),
) -> Section:
    command = (f"tools.bench.{module}",)
    return Section(name, command, expected_s, budget_s, case_s, correctness, one_each)


PARTS = {
    "correctness": (
        _tests("loss", 30.0, 90.0, 60.0),
        _tests("head", 20.0, 60.0, 45.0),
        _tests("model", 40.0, 100.0, 60.0),
        _tests("scores", 60.0, 110.0, 50.0),
        _tests("checksum", 8.0, 20.0, 20.0),
        _tests("decoding", 25.0, 50.0, 40.0),
        _bench("resume", "gpu_checkpoint", 30.0, 60.0, 60.0, correctness=True),
        _bench("offload", "gpu_offload", 45.0, 90.0, 90.0, correctness=True),
        _bench("lengths", "gpu_lengths", 45.0, 90.0, 90.0, correctness=True),
        _bench("train", "gpu_train", 90.0, 150.0, 150.0, correctness=True),
    ),
    "speed": (
        _bench("ceilings", "gpu_ceilings", 8.0, 25.0, 25.0),
        _bench("scan", "gpu_scan", 31.0, 75.0, 50.0),
        _bench("head-speed", "gpu_head", 30.0, 75.0, 50.0),
        _bench("step", "gpu_step", 85.0, 130.0, 60.0),
        _bench("memory", "gpu_memory", 45.0, 80.0, 50.0),
        _bench(
            "layers",
            "gpu_layers",
            100.0,
            150.0,
            70.0,
            one_each=("BF16", "FP8 blockwise", "FP8 tensorwise"),
        ),
        _bench("fp8", "gpu_fp8", 60.0, 100.0, 70.0),
        _bench("rollouts", "local_engine", 40.0, 70.0, 70.0, one_each=("0.6M",)),
    ),
}
SECTIONS = tuple(chain.from_iterable(PARTS.values()))


def choose(part: str | None, only: str | None) -> tuple[list[Section], float]:
    """The sections to run, in their order, and the limit in seconds of all of them: of one part, or some by name, or all.

    ValueError that names what there is.
    """
    if part and only:
        raise ValueError("give --part or --only, not both")
    if part:
        if part not in PARTS:
            raise ValueError(f"no part {part!r}; there are {' and '.join(PARTS)}")
        return list(PARTS[part]), PART_LIMIT_S
    if not only:
        return list(SECTIONS), PART_LIMIT_S * len(PARTS)
    named = {section.name: section for section in SECTIONS}
    wanted = [name.strip() for name in only.split(",")]
    if unknown := [name for name in wanted if name not in named]:
        raise ValueError(f"no section {unknown[0]!r}; there are {', '.join(named)}")
    return [named[name] for name in dict.fromkeys(wanted)], PART_LIMIT_S * len(PARTS)
