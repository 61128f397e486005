"""Steps measured on one H200 (docs/benchmarks.md, "One H200") against `update_time` with the shipped machine file.

Figures of the file and of `time/layer.py` were fitted to four rows: products, attention, memory and the host's time to the
1.5B row in bfloat16 with its profile by kernel, and the card's ceilings; FP8's rates to two rows of the 32B shape; FP8's
launches to one row of 0.5B. The others are predictions.
"""

from dataclasses import dataclass

import pytest

from megatron_fipo.config import Config
from megatron_fipo.families.family import Architecture
from megatron_fipo.families.qwen2 import QWEN2
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.machine_file import load_machine
from megatron_fipo.plan.time.trainer import update_time
from megatron_fipo.plan.workload import Assumptions

H200 = load_machine("h200")
TOLERANCE = 0.12


def qwen2(
    layers: int, hidden: int, ffn: int, heads: int, groups: int, vocabulary: int, tied: bool
) -> Architecture:
    return Architecture(
        layers,
        hidden,
        ffn,
        heads,
        groups,
        hidden // heads,
        vocabulary,
        32_768,
        1e-6,
        1e6,
        tied,
        add_qkv_bias=True,
    )


MODELS = {
    "0.5B": qwen2(24, 896, 4_864, 14, 2, 151_936, tied=True),
    "1.5B": qwen2(28, 1_536, 8_960, 12, 2, 151_936, tied=True),
    "32B shape": qwen2(6, 5_120, 27_648, 40, 8, 152_064, tied=False),
}
PACKS = {1: (1_024, 19_456), 4: (512, 4_608)}
"""Tokens of prompt and response, by the number of sequences."""


@dataclass(frozen=True)
class Row:
    model: str
    sequences: int
    recipe: str
    """Of FP8; "" for bfloat16."""
    milliseconds: float


FITTED = [
    Row("1.5B", 1, "", 709),
    Row("32B shape", 1, "blockwise", 860),
    Row("32B shape", 1, "tensorwise", 806),
    Row("0.5B", 4, "blockwise", 306),
]
PREDICTED = [
    Row("0.5B", 1, "", 326),
    Row("0.5B", 1, "blockwise", 351),
    Row("0.5B", 4, "", 241),
    Row("1.5B", 1, "blockwise", 672),
    Row("1.5B", 4, "", 518),
    Row("1.5B", 4, "blockwise", 486),
    Row("32B shape", 1, "", 1_035),
    Row("32B shape", 4, "", 883),
    Row("32B shape", 4, "blockwise", 727),
    Row("32B shape", 4, "tensorwise", 663),
]


def case_of(row: Row) -> Case:
    config = Config()
    if row.recipe:
        config.model.fp8, config.model.fp8_recipe = "hybrid", row.recipe
    config.batch.prompts_per_iteration = config.batch.mini_batch_prompts = 1
    config.batch.responses_per_prompt, config.batch.max_tokens_per_micro_batch = row.sequences, 20_480
    prompt, response = PACKS[row.sequences]
    config.rollout.max_prompt_length, config.rollout.max_response_length = prompt, response
    lengths = Assumptions(
        prompt_tokens=prompt, response_end=float(response), prompt_spread=0.0, response_spread=0.0
    )
    return Case(config, QWEN2, MODELS[row.model], H200, lengths)


@pytest.mark.parametrize("row", FITTED + PREDICTED, ids=str)
def test_measured_steps_are_within_twelve_percent(row):
    predicted = update_time(case_of(row)).total
    assert predicted.value == pytest.approx(row.milliseconds / 1e3, rel=TOLERANCE)
    assert predicted.low <= row.milliseconds / 1e3 <= predicted.high


def test_parts_of_the_profiled_step():
    """GPU time of the 1.5B step by kernel: 270 ms of products, the head's included, and 267 ms of attention; the device waits for
    65 ms of 713.
    """
    parts = update_time(case_of(FITTED[0])).parts
    assert parts["attention"].value == pytest.approx(0.267, rel=0.02)
    head_products = 8 * 19_456 * 1_536 * 151_936 / 730e12
    assert parts["products"].value + head_products == pytest.approx(0.270, rel=0.03)
    assert parts["host"].value == pytest.approx(0.065, rel=0.1)
    assert parts["optimizer"].value == pytest.approx(0.013 + 0.015, rel=0.1)


def test_a_single_rank_does_not_communicate():
    parts = update_time(case_of(FITTED[0])).parts
    for name in ("tensor parallel", "context parallel", "experts", "data parallel", "pipeline", "bubble"):
        assert parts[name].value == 0


def test_every_source_is_measured():
    total = update_time(case_of(FITTED[0])).total
    assert total.sources == {"one H200, 2026-11-28"}
    assert not total.not_calibrated
