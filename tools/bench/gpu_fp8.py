"""From which size of layers FP8 pays: a step of a few layers by hidden size and recipe, also with parameters kept in FP8.

    python -m tools.bench.gpu_fp8

The vocabulary is small, so that the head, which FP8 does not change, is a few percent of the step. `gpu_step` and `gpu_layers`
have complete models.
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_fipo.config import ModelConfig
from megatron_fipo.trainer.rank_model import RankModel
from tests.gpu.policies import Shape
from tools.bench.gpu_ceilings import peak_flops
from tools.bench.gpu_models import LONGEST, PACKS, TOY, TOY_PACKS, obstacle, packs, settings, with_policy
from tools.bench.gpu_step import step_flops, time_steps
from tools.bench.harness import Bench, Case, Cases, is_out_of_memory, release, run_cases
from tools.bench.report import FIGURE, SKIPPED, Row, duration, reason

SECTION = "fp8"
VOCABULARY = 8_192
SHAPES = {
    "8 layers of hidden size 2,048": Shape(8, 2_048, 11_008, 16, 2, VOCABULARY, tied=False),
    "4 layers of hidden size 3,584": Shape(4, 3_584, 18_944, 28, 4, VOCABULARY, tied=False),
}
"""As Qwen2.5-3B and -7B. Hidden sizes 896, 1,536 and 5,120: `gpu_step` and `gpu_layers`."""

WITH_PARAMETERS = "4 layers of hidden size 3,584"


@dataclass(frozen=True)
class Precision:
    """How matrices are multiplied and kept."""

    recipe: str | None
    parameters: bool = False
    """Whether they are kept in FP8 between steps."""


PRECISIONS: Mapping[str, Precision] = {
    "BF16": Precision(None),
    "FP8 blockwise": Precision("blockwise"),
    "FP8 tensorwise": Precision("tensorwise"),
    "FP8 blockwise, parameters too": Precision("blockwise", parameters=True),
    "FP8 tensorwise, parameters too": Precision("tensorwise", parameters=True),
}


def by_precision(name: str, shape: Shape) -> Case:
    """All precisions of a shape, one model after the other; parameters in FP8 with one shape only, which takes less time."""

    def run(bench: Bench) -> Iterator[Row]:
        used, lengths = bench.pick((shape, PACKS[LONGEST]), (TOY, TOY_PACKS[LONGEST]))
        seconds: dict[str, float] = {}
        """Of the steps in BF16, by pack."""
        for title, precision in PRECISIONS.items():
            if precision.parameters and name != WITH_PARAMETERS:
                continue
            model = settings(precision.recipe, fp8_parameters=precision.parameters)
            if why := obstacle(bench, used, model, lengths):
                yield reason(SKIPPED, SECTION, f"{name}, {title}", why, False)
                continue
            yield from _step_rows(bench, used, model, f"{name}, {title}", seconds)

    return run


def _step_rows(
    bench: Bench, shape: Shape, model: ModelConfig, name: str, seconds: dict[str, float]
) -> Iterator[Row]:
    """A row per pack; a model that does not fit costs its own rows only."""

    def body(policy: RankModel) -> Iterator[Row]:
        for pack, shards in packs(bench, policy, shape, model):
            timing, peak_bytes = time_steps(bench, policy, shards)
            base = seconds.setdefault(pack, timing.median) if model.fp8 == "none" else seconds.get(pack)
            lengths = shards[0].cu_seqlens_padded.diff().tolist()
            flops = step_flops(shape, lengths, shards[0].num_rows)
            peak, _ = peak_flops(bench)
            mfu = flops / timing.median / peak
            result = (
                f"{duration(timing.median)}, MFU {100 * mfu:.1f} % of {peak / 1e12:,.0f} TFLOP/s, "
                f"{peak_bytes / 2**30:.1f} GiB"
            )
            figures: dict[str, float | str] = {"peak_bytes": peak_bytes, "mfu": mfu} | timing.figures("step")
            if base is not None and model.fp8 != "none":
                result += f", BF16 / this {base / timing.median:.2f}"
                figures["speedup"] = base / timing.median
            yield Row(SECTION, f"{name}, {pack}", FIGURE, result, figures)

    try:
        yield from with_policy(bench, shape, model, body)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        yield reason(SKIPPED, SECTION, name, f"out of memory: {error}", False)
    release(bench)


CASES: Cases = {name: by_precision(name, shape) for name, shape in SHAPES.items()}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
