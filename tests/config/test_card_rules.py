"""What is wrong with the GPUs of a machine: each case has one sentence, with what was found and the fix."""

from dataclasses import replace

import pytest

from megatron_fipo.config.card_rules import CardNeeds, card_findings, check_cards, together
from megatron_fipo.environment import Accelerators, Card, Driver
from megatron_fipo.errors import UserError

GIB = 2**30
H100, A100 = Card("NVIDIA H100", (9, 0), 80 * GIB), Card("NVIDIA A100", (8, 0), 40 * GIB)
T4 = Card("Tesla T4", (7, 5), 15 * GIB)
NONE = Accelerators(capability=None, cuda="13.0", transformer_engine=None)


def machine(*cards: Card) -> Accelerators:
    return replace(NONE, cards=cards, capability=min(card.capability for card in cards))


DEFAULTS = CardNeeds()


def only(found: Accelerators, needs: CardNeeds = DEFAULTS) -> tuple[str, bool]:
    (finding,) = card_findings(found, needs)
    return finding.sentence, finding.fatal


@pytest.mark.parametrize("found", [NONE, machine(H100), machine(H100, H100), machine(T4)])
def test_cards_that_can_do_what_is_needed(found):
    assert card_findings(found, CardNeeds(dtype="float32")) == []


def test_the_memory_of_one_model_may_differ_by_what_error_correction_takes():
    assert card_findings(machine(H100, replace(H100, memory_bytes=79 * GIB)), CardNeeds()) == []
    sentence, _ = only(machine(H100, replace(H100, memory_bytes=40 * GIB)))
    assert "1 x NVIDIA H100 (80 GiB), 1 x NVIDIA H100 (40 GiB)" in sentence


def test_mixed_cards_are_reported_and_refused_if_every_bit_counts():
    mixed = machine(H100, A100, H100)
    sentence, fatal = only(mixed)
    assert sentence.startswith("the GPUs differ (2 x NVIDIA H100 (80 GiB), 1 x NVIDIA A100 (40 GiB)): ")
    assert "CUDA_VISIBLE_DEVICES" in sentence
    assert not fatal
    sentence, fatal = only(mixed, CardNeeds(deterministic=True))
    assert fatal
    assert sentence.startswith("deterministic=true needs GPUs of one kind")


@pytest.mark.parametrize(
    ("cuda", "driver", "reason"),
    [
        (
            "13.0",
            "535.104.05",
            "that CUDA needs driver 580 or later; update the driver, or install torch for an older",
        ),
        ("12.8", "470.82.01", "that CUDA needs driver 525 or later"),
        (
            "12.8",
            "535.104.05",
            "the driver does not answer, or this process may not use the GPUs; look at nvidia-smi",
        ),
        ("13.0", "unknown version", "the driver does not answer"),
        ("99.0", "100.1", "the driver does not answer"),
    ],
)
def test_gpus_that_a_torch_for_gpus_cannot_use_are_not_replaced_by_the_cpu(cuda, driver, reason):
    sentence, fatal = only(replace(NONE, cuda=cuda, unused_driver=Driver(driver, 1)))
    assert fatal
    assert sentence.startswith(
        f"this machine has 1 GPU with driver {driver}, but torch, built for CUDA {cuda}, can use none: {reason}"
    )
    assert sentence.endswith("or set CUDA_VISIBLE_DEVICES= (empty) to train on CPU cores")


def test_a_torch_for_cpus_on_a_machine_with_gpus_is_reported():
    sentence, fatal = only(replace(NONE, cuda=None, unused_driver=Driver("580.159.04", 2)))
    assert not fatal
    assert sentence.startswith(
        "this machine has 2 GPUs with driver 580.159.04, but torch is built without CUDA"
    )
    assert "TORCH_INDEX" in sentence


def test_bfloat16_needs_ampere():
    sentence, fatal = only(machine(T4))
    assert fatal
    assert "needs GPUs of compute capability 8.0 (Ampere) or later, and Tesla T4 has 7.5" in sentence
    assert "set model.dtype=float32, or use a newer GPU" in sentence
    with_newer = [finding.sentence for finding in card_findings(machine(H100, T4), CardNeeds())]
    assert "or choose GPUs of one kind by CUDA_VISIBLE_DEVICES" in with_newer[0]


def test_triton_that_is_demanded_must_be_there():
    needs = CardNeeds(dtype="float32", kernels="triton")
    sentence, fatal = only(replace(machine(H100), triton=False), needs)
    assert fatal
    assert sentence.startswith("head.kernels=triton needs Triton, which is not installed; pip install triton")
    sentence, fatal = only(machine(T4), needs)
    assert fatal
    assert "compute capability 8.0 or later, and Tesla T4 has 7.5; set head.kernels=auto" in sentence
    assert card_findings(machine(H100), needs) == []
    without = replace(machine(H100), triton=False)
    assert card_findings(without, CardNeeds()) == [], "the rank's line about head and loss reports it"
    assert card_findings(replace(NONE, triton=False), needs) == [], "without a GPU the rank decides"


def test_the_first_fatal_finding_ends_the_run_and_the_others_are_reported():
    findings = card_findings(machine(H100, A100), CardNeeds())
    assert check_cards(findings) == [findings[0].sentence]
    with pytest.raises(UserError, match=r"Tesla T4 has 7\.5"):
        check_cards(card_findings(machine(H100, T4), CardNeeds()))


def test_the_gpus_of_ranks_are_judged_together():
    ranks = [machine(H100), machine(A100), replace(machine(T4), triton=False)]
    found = together(ranks)
    assert found.cards == (H100, A100, T4)
    assert found.capability == (7, 5)
    assert not found.triton
    blind = replace(NONE, unused_driver=Driver("470.1", 8))
    assert together([machine(H100), blind]).unused_driver == Driver("470.1", 8)
    assert card_findings(together([NONE, NONE]), CardNeeds()) == []
