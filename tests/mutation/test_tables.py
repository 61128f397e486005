"""The tables of faults fit the sources; whether the tests catch the faults is for `tests/mutation/check.py`."""

from tests.mutation.kernel_mutants import KERNEL_MUTANTS
from tests.mutation.loss_mutants import MUTANTS


def test_every_fault_applies_to_the_sources() -> None:
    stale = [problem for mutant in MUTANTS + KERNEL_MUTANTS if (problem := mutant.stale())]
    assert not stale, "\n".join(["update tests/mutation:", *stale])


def test_every_named_test_exists() -> None:
    missing = [problem for mutant in MUTANTS + KERNEL_MUTANTS for problem in mutant.missing_tests()]
    assert not missing, "\n".join(["update tests/mutation:", *missing])


def test_names_are_unique() -> None:
    names = [mutant.name for mutant in MUTANTS + KERNEL_MUTANTS]
    assert len(names) == len(set(names))
