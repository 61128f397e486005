"""Faults in the Triton kernels of the loss. Their tests need Triton and its interpreter."""

from tests.mutation.mutant import Mutant

FOLDER = "kernels/"
"""Tests below it import Triton."""
TESTS = f"{FOLDER}test_loss_kernels.py"
SCAN = f"{TESTS}::test_any_cut_gives_the_definition"
LOSS = f"{TESTS}::test_no_split_changes_loss_or_gradient"
GOLDEN = f"{TESTS}::test_matches_the_reference"
OUTPUTS = f"{TESTS}::test_every_output_equals_the_torch_path"
FILE = "objective/kernels/triton_loss.py"
SCAN_FILE = "objective/kernels/triton_scan.py"

KERNEL_MUTANTS = (
    Mutant(
        "kernels: later blocks left out",
        SCAN_FILE,
        "    future += decay * add_blocks(aggregate, tl.program_id(0) + 1, end, 0.0, RATE, BLOCK, TILE)\n",
        "",
        (SCAN, GOLDEN),
    ),
    Mutant(
        "kernels: only the first tile of blocks",
        SCAN_FILE,
        "        offset += TILE\n",
        "        offset += 1000000\n",
        (f"{TESTS}::test_blocks_are_added_tile_by_tile",),
    ),
    Mutant(
        "kernels: a chunk's carry is not moved to its start",
        SCAN_FILE,
        "before = tl.load(first_row_offset + sequence * C + c)",
        "before = tl.load(first_row_offset + sequence * C + c) * 0.0",
        (SCAN,),
    ),
    Mutant(
        "kernels: chunks of other ranks left out",
        SCAN_FILE,
        "exists = source < CP * C",
        "exists = source < C",
        (SCAN, f"{LOSS}[2-zigzag"),
    ),
    Mutant(
        "kernels: scan from left to right",
        SCAN_FILE,
        "(BLOCK - 1 - tl.arange(0, BLOCK))",
        "tl.arange(0, BLOCK)",
        (SCAN, LOSS, GOLDEN),
    ),
    Mutant(
        "kernels: gradient outside the clip",
        FILE,
        "((ratio >= LOW) & (ratio <= HIGH))",
        "(ratio > 0)",
        (LOSS, GOLDEN, OUTPUTS),
    ),
    Mutant(
        "kernels: gradient beyond the clamp of the log-ratio",
        FILE,
        "gradient = tl.where(unclamped, slope * ratio, 0.0)",
        "gradient = slope * ratio",
        (f"{OUTPUTS}[False-dapo",),
    ),
    Mutant(
        "kernels: no halving where the dual clip ties",
        FILE,
        "slope * 0.5",
        "slope",
        (f"{TESTS}::test_the_ratio_at_its_bounds_has_the_gradient_of_torch",),
    ),
    Mutant(
        "kernels: safety rule left out",
        FILE,
        "tl.where(negative & (ratio > SAFETY)",
        "tl.where(negative & (ratio > 1e30)",
        (LOSS, OUTPUTS),
    ),
    Mutant(
        "kernels: safety rule without its low bound",
        FILE,
        "_clamp(weight, SAFE_LOW, SAFE_HIGH)",
        "_clamp(weight, 0.0, SAFE_HIGH)",
        (f"{TESTS}::test_the_safety_rule_has_a_low_bound",),
    ),
    Mutant(
        "kernels: a NaN reaches the loss",
        FILE,
        "finite = _is_finite(log_prob) & _is_finite(old) & _is_finite(advantage)",
        "finite = _is_finite(old) & _is_finite(advantage)",
        (f"{OUTPUTS}[True-fipo",),
    ),
    Mutant(
        "kernels: masked rows count",
        FILE,
        "valid & (tl.load(mask + row, mask=valid, other=0) != 0)",
        "valid",
        (f"{OUTPUTS}[True-fipo", f"{GOLDEN}[holes"),
    ),
    Mutant(
        "kernels: dropped responses stay in the gradient",
        FILE,
        "row_weight = tl.where(kept, ",
        "row_weight = tl.where(counts, ",
        (LOSS,),
    ),
    Mutant(
        "kernels: correction not in the gradient",
        FILE,
        "        factor = _clamp(importance, 0.0, CAP)\n        policy, slope = policy * factor, slope * factor",
        "        factor = _clamp(importance, 0.0, CAP)\n        policy = policy * factor",
        (f"{OUTPUTS}[False-fipo_tis", LOSS),
    ),
    Mutant(
        "kernels: FutureKL filtered at the dual clip although the filter is off",
        "objective/kernels/launch.py",
        '"FUTURE_KL_LIMIT": objective.future_kl_limit',
        '"FUTURE_KL_LIMIT": float(torch.tensor(objective.dual_clip).log())',
        (f"{OUTPUTS}[False-fipo_no_filter", LOSS),
    ),
    Mutant(
        "kernels: backward ignores the gradient of the loss",
        "objective/kernels/launch.py",
        "return grad_log_probs * grad_loss, by_entropy",
        "return grad_log_probs, by_entropy",
        (OUTPUTS,),
    ),
)
