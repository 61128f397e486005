"""The head with Triton's passes against autograd through full float64 logits, and whether a GPU's compiler takes the kernels.

With 12 rows in bf16 a workspace of 1 MiB is a slab of 14,464 columns: 15 blocks, the last one not full. Where a GPU rounds to bf16 the
interpreter cuts off, so that bf16 numbers are only compared to its last bit.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.config import HeadConfig
from megatron_fipo.model.logprob_head import torch_passes, triton_passes
from megatron_fipo.model.logprob_head.head import HeadRequest, response_log_probs
from megatron_fipo.model.logprob_head.slab import PADDED_LOGIT, KeptLogits, RowGradient, Slab
from tests.ranks import run_ranks

ROWS, HIDDEN, VOCABULARY, COLUMNS, TEMPERATURE = 12, 8, 30_000, 32_768, 0.7
BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCE = {FP32: 2e-6, BF16: 2**-7}
GRADIENT_TOLERANCE = {FP32: 2e-5, BF16: 2**-7}
"""A probability has the relative error of e to its logit, which is around 30 here: plain torch is no closer."""
SETTINGS = {
    "one-slab": HeadConfig("triton"),
    "slabs": HeadConfig("triton", workspace_mb=1),
    "keep": HeadConfig("triton", workspace_mb=1, logits_memory_mb=1),
}


def _inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[:6] = torch.tensor([0, 14_463, 14_464, 16_383, 16_384, VOCABULARY - 1])
    given = {"hidden": 1.5 * draw(ROWS, 1, HIDDEN), "weight": draw(COLUMNS, HIDDEN)}
    given = {name: value.to(dtype) for name, value in given.items()} | {"labels": labels}
    for name in ("grad_log_probs", "grad_entropy"):
        given[name] = draw(ROWS).float()
        given[name][4] = 0
    given["grad_log_probs"][5], given["grad_entropy"][6] = 0, 0
    return given


def _loss(given, log_probs, entropy, entropy_gradient):
    loss = (log_probs * given["grad_log_probs"]).sum()
    return loss + (entropy * given["grad_entropy"]).sum() if entropy_gradient else loss


def _reference(given: dict[str, torch.Tensor], entropy_gradient: bool) -> dict[str, torch.Tensor]:
    hidden, weight = (given[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    log_probabilities = (hidden[:, 0] @ weight[:VOCABULARY].t() / TEMPERATURE).log_softmax(dim=-1)
    log_probs = log_probabilities.gather(1, given["labels"][:, None]).squeeze(1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    _loss(given, log_probs, entropy, entropy_gradient).backward()
    return {
        "log_probs": log_probs.detach(),
        "entropy": entropy.detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
    }


def _head_on_rank(
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    settings: HeadConfig,
    entropy_gradient: bool,
    nan_row: bool,
) -> dict[str, torch.Tensor]:
    given = _inputs(dtype)
    if nan_row:
        given["hidden"][4] = torch.nan
    hidden = given["hidden"].requires_grad_()
    weight = given["weight"].chunk(world_size)[rank].clone().requires_grad_()
    request = HeadRequest(
        torch.arange(ROWS), given["labels"], VOCABULARY, TEMPERATURE, settings, entropy_gradient
    )
    log_probs, entropy = response_log_probs(
        hidden, weight, request, dist.group.WORLD if world_size > 1 else None, False
    )
    _loss(given, log_probs, entropy, entropy_gradient).backward(inputs=[hidden, weight])
    return {
        "log_probs": log_probs.detach(),
        "entropy": entropy.detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
    }


def _check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in ("log_probs", "entropy"):
        assert found[name].dtype == FP32
        torch.testing.assert_close(found[name].double(), expected[name], rtol=0, atol=1e-5)
    for name in ("hidden", "weight"):
        assert (found[name].double() - expected[name]).norm() < GRADIENT_TOLERANCE[
            found[name].dtype
        ] * expected[name].norm()


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_values_and_gradients_equal_full_logits(dtype, settings, entropy_gradient):
    _check(
        _head_on_rank(0, 1, dtype, settings, entropy_gradient, nan_row=False),
        _reference(_inputs(dtype), entropy_gradient),
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tensor_parallel_ranks_meet(settings):
    """The second rank's slice ends in padding."""
    expected = _reference(_inputs(BF16), True)
    shards = run_ranks(2, _head_on_rank, BF16, settings, True, False)
    for shard, weight in zip(shards, expected["weight"].chunk(2), strict=True):
        _check(shard, expected | {"weight": weight})


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_row_without_gradient_contains_its_own_nan(settings):
    clean = _head_on_rank(0, 1, BF16, settings, True, nan_row=False)
    found = _head_on_rank(0, 1, BF16, settings, True, nan_row=True)
    assert found["log_probs"].isnan().nonzero().flatten().tolist() == [4]
    assert found["hidden"][4].abs().max() == 0
    for name in ("hidden", "weight"):
        assert torch.equal(found[name], clean[name])


def test_no_rows():
    given = _inputs(FP32)
    weight = given["weight"].requires_grad_()
    request = HeadRequest(
        torch.arange(0), given["labels"][:0], VOCABULARY, TEMPERATURE, SETTINGS["slabs"], True
    )
    log_probs, entropy = response_log_probs(given["hidden"].requires_grad_(), weight, request, None, False)
    (log_probs.sum() + entropy.sum()).backward()
    assert given["hidden"].grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


SLABS = {"words": Slab(100, 1300, 100, 1200), "padded": Slab(100, 1300, 100, 1030)}


def _slab_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [5, 1200] whose row 3 is NaN in places, labels below, in and above the slab, statistics of slabs before it."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(5, 1200, generator=generator)
    logits[3, 7], logits[4, 0] = torch.nan, 60.0
    statistics = torch.rand(4, 5, generator=generator) + 1
    statistics[:, 0] = torch.tensor([PADDED_LOGIT, 0, 0, 0])
    return logits, torch.tensor([100, 99, 1299, 500, 1300]), statistics


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("slab", SLABS.values(), ids=SLABS)
def test_both_statistics_passes_agree(slab, dtype):
    found = []
    for passes in (torch_passes, triton_passes):
        logits, labels, statistics = _slab_inputs()
        kept = KeptLogits(torch.full((5, 1200), 7.0, dtype=dtype), torch.zeros(5))
        passes.add_to_statistics(logits, labels, slab, 1.25, statistics, kept)
        found.append((statistics, kept.distances[:, : slab.words].float(), kept.peak))
    finite = [0, 1, 2, 4]
    for torch_value, triton_value in zip(*found, strict=True):
        along_rows = torch_value.shape[0] == 5
        pair = ((value[finite] if along_rows else value[:, finite]) for value in (triton_value, torch_value))
        torch.testing.assert_close(*pair, rtol=TOLERANCE[dtype], atol=1e-5)
    assert found[1][0][1:3, 3].isnan().all()


@pytest.mark.parametrize(
    ("kept_dtype", "out_dtype"), [(None, FP32), (None, BF16), (FP32, FP32), (BF16, BF16)]
)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("slab", SLABS.values(), ids=SLABS)
def test_both_gradient_passes_agree(slab, entropy, kept_dtype, out_dtype):
    """Also where the gradient takes the logits' place, and exact zeros in rows 1 (no gradient) and 3 (no gradient, NaN)."""
    found = []
    for passes in (torch_passes, triton_passes):
        logits, labels, _ = _slab_inputs()
        source = logits if kept_dtype is None else (logits - 4).to(kept_dtype)
        gradients = torch.tensor([1.5, 0.0, -2.0, 0.0, 0.0 if entropy else 0.3])
        row = RowGradient(
            labels,
            gradients,
            gradients.flip(0) * torch.tensor([1, 0, 1, 0, 1.0]) if entropy else None,
            torch.full((5,), 2.0) if entropy else None,
            1.25,
        )
        out = (
            logits
            if out_dtype == FP32 and kept_dtype is None
            else torch.full((5, 1200), 9.0, dtype=out_dtype)
        )
        shift = torch.tensor([-10.0, -11.0, -12.0, torch.nan, -70.0])
        passes.write_gradient(source, 1.25 if kept_dtype is None else 1.0, shift, row, slab, out)
        assert (out[[1, 3]] == 0).all()
        assert (out[:, slab.words :] == 0).all()
        found.append(out.float())
    torch.testing.assert_close(
        found[1], found[0], rtol=10 * TOLERANCE[FP32] if out_dtype == FP32 else TOLERANCE[BF16], atol=1e-6
    )
    assert found[0].any()


def test_a_rows_bits_do_not_depend_on_the_other_rows_and_repeat():
    logits, labels, statistics = _slab_inputs()
    slab, together, alone = SLABS["padded"], statistics.clone(), statistics[:, 2:3].clone()
    triton_passes.add_to_statistics(logits, labels, slab, 1.25, together, None)
    triton_passes.add_to_statistics(logits[2:3].clone(), labels[2:3].clone(), slab, 1.25, alone, None)
    assert torch.equal(together[:, 2:3], alone)


COMPILE = """
from itertools import product
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_fipo.model.logprob_head.triton_passes import BLOCK, gradient_kernel, statistics_kernel

TYPES = dict.fromkeys(("statistics", "kept_peak", "shifts", "gradients", "entropy_gradients", "entropies"), "*fp32")
TYPES |= dict.fromkeys(("rows", "width", "words", "first_word"), "i32") | dict.fromkeys(("scale", "inverse_temperature"), "fp32")
ALIGNED = ("width", "words")


def build(kernel, constants, **types):
    constants["BLOCK"], types = BLOCK, TYPES | {"labels": "*i64"} | types
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in ALIGNED]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm


variants = [(statistics_kernel, {"KEEP": keep}, {"logits": "*fp32", "kept": kept})
            for keep, kept in product((False, True), ("*fp32", "*bf16"))]
variants += [(gradient_kernel, {"ENTROPY": entropy}, {"logits": logits, "out": out})
             for entropy in (False, True) for logits, out in (("*fp32", "*fp32"), ("*fp32", "*bf16"), ("*bf16", "*bf16"))]
for kernel, constants, types in variants:
    made = build(kernel, constants, **types)
    assert made["cubin"], (kernel, constants, types)
    loads = [line for line in made["ptx"].splitlines() if "ld.global" in line]
    assert any("ld.global.v4.b32" in line for line in loads), (kernel, constants, types, loads)
print(len(variants))
"""


def test_a_hopper_gpus_compiler_takes_every_variant(tmp_path):
    """Without a GPU: down to machine code for sm_90, with the loads of 16 bytes that reading memory at full speed takes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "10\n"), done.stderr
