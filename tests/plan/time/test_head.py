"""The head's table (docs/benchmarks.md, "Head"): forward and backward over the three products alone, measured on one H200."""

from dataclasses import replace

import pytest

from megatron_fipo.plan.machine_file import load_machine
from megatron_fipo.plan.time.head import head_time, slabs
from megatron_fipo.plan.time.layer import product_seconds
from megatron_fipo.plan.time.packs import Packs
from tests.plan.time.cases import SHAPE, case_of, layout

H200 = load_machine("h200")
SMALL, LARGE = (8_192, 4_096, 151_936), (20_480, 5_120, 19_008)
"""Tokens, hidden size, vocabulary."""
MEASURED = [  # workspace_mb, logits_memory_mb, ratio
    (SMALL, 384, 0, 1.52),
    (SMALL, 384, 900, 1.39),
    (SMALL, 128, 0, 1.62),
    (SMALL, 2_048, 0, 1.47),
    (LARGE, 384, 0, 1.57),
    (LARGE, 384, 900, 1.21),
    (LARGE, 128, 0, 1.73),
    (LARGE, 2_048, 0, 1.53),
]


@pytest.mark.parametrize(("sizes", "workspace", "kept", "ratio"), MEASURED)
def test_measured_ratios_are_within_five_percent(sizes, workspace, kept, ratio):
    """Nothing was fitted to them. The products themselves take 11 % longer there than at the machine's rate: their kernels run
    for milliseconds, and the clock falls.
    """
    tokens, hidden, vocabulary = sizes
    case = case_of(
        machine=H200,
        architecture=replace(SHAPE, hidden_size=hidden, vocab_size=vocabulary),
        head__workspace_mb=workspace,
        head__logits_memory_mb=kept,
    )
    products = product_seconds(case, "bfloat16", tokens, hidden, vocabulary).value * 3
    forward, backward = head_time(case, Packs(1, tokens, 0.0, tokens))
    assert (forward.value + backward.value) / products == pytest.approx(ratio, rel=0.05)


def test_slabs_fit_the_workspace():
    """384 MiB hold 64 Mi logits of 6 bytes: 8,192 columns of 8,192 rows, of 152,064."""
    assert slabs(case_of(), 8_192) == 19
    assert slabs(case_of(**layout(tp=8)), 8_192) == 3


def test_rows_of_prompts_are_not_computed():
    case = case_of()
    some, none = (
        sum(part.value for part in head_time(case, Packs(1, 8_192, 0.0, rows))) for rows in (4_096, 8_192)
    )
    assert some == pytest.approx(none / 2, rel=0.05)
