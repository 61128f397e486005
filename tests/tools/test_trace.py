"""A step's time by kind: from a trace written by hand as a GPU's, and from a real profile on the CPU."""

import pytest
import torch

from tools.bench.gpu_profile import record, rows_by_kind, trace_of, wait_row, waits_of
from tools.bench.harness import Bench
from tools.bench.trace import IDLE, OTHER, STEP, Work, busy_time, kind_of, summarize

BENCH = Bench(torch.device("cpu"))


def span(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: object) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


def launched(name: str, at: float, start: float, duration: float, number: int, tid: int = 1) -> list[dict]:
    return [
        span("cuda_runtime", "cudaLaunchKernel", at, 1, tid, correlation=number),
        span("kernel", name, start, duration, tid=7, correlation=number),
    ]


TRACE = [
    span("user_annotation", STEP, 0, 1_000),
    span("cpu_op", "_LogProbAndEntropy", 10, 50),
    span("cpu_op", "aten::mm", 20, 20),
    *launched("nvjet_tst_128x256", 25, 100, 200, 1),  # a product of the head
    span("cpu_op", "aten::mm", 70, 10),
    *launched("nvjet_tst_128x256", 72, 300, 100, 2),
    span("cpu_op", "autograd::engine::evaluate_function: FusedAttnFuncBackward", 80, 30, tid=2),
    *launched("cudnn_generated_fort_native_sdpa_sm90", 85, 350, 150, 3, tid=2),  # beside the product
    span("user_annotation", "Optimizer.step#FusedAdam.step", 120, 30),
    *launched("void multi_tensor_apply_kernel", 125, 600, 50, 4),
    *launched("triton_poi_fused_add_mul_silu_0", 160, 650, 30, 5),
    *launched("new_kernel_of_unknown_kind", 170, 700, 20, 6),
    span("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 720, 10, tid=7, correlation=9),
    span("cuda_runtime", "cudaStreamSynchronize", 730, 5),
    span("cuda_runtime", "cudaDeviceSynchronize", 900, 90),
    span("kernel", "gemm_after_the_step", 2_000, 100, tid=7, correlation=11),
    {"ph": "i", "name": "[memory]", "ts": 5},
]


def test_a_gpu_trace():
    found = summarize(TRACE)
    assert found.seconds == pytest.approx(1e-3)
    microseconds = {kind: pytest.approx(1e6 * seconds) for kind, seconds in found.by_kind.items()}
    assert microseconds == {
        "head": 200,
        "GEMM": 100,
        "attention": 150,
        "optimizer": 50,
        "norm, activation, residual": 30,
        OTHER: 20,
        "copies": 10,
        # 500 to 600, before 100, 680 to 700, and after 730
        IDLE: 100 + 100 + 20 + 270,
    }
    assert found.other == ["new_kernel_of_unknown_kind"]
    assert found.waits == {"cudaStreamSynchronize": 1}  # the last one ends the measurement


def test_a_trace_without_the_step_is_refused():
    with pytest.raises(ValueError, match="0 steps"):
        summarize(TRACE[1:])


@pytest.mark.parametrize(
    ("name", "around", "kind"),
    [
        ("statistics_kernel", (), "head"),
        ("gradient_kernel", (), "head"),
        ("swiglu_gradient_kernel", (), "norm, activation, residual"),
        ("scan_rows_kernel", (), "loss"),
        ("sm90_xmma_gemm_bf16bf16", (), "GEMM"),
        ("cast_transpose_fused_kernel", (), "FP8 casts"),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor>", (), "copies"),
        ("rmsnorm_fwd_tuned_kernel", (), "norm, activation, residual"),
        ("ncclDevKernel_AllReduce", (), OTHER),
        ("void at::native::reduce_kernel", ("_TritonPolicyLoss",), "loss"),
    ],
)
def test_kinds(name, around, kind):
    assert kind_of(Work(name, around, 0, 1, 1)) == kind


def test_overlapping_intervals_count_once():
    assert busy_time([(5, 7), (0, 2), (1, 4), (6, 6.5)]) == 4 + 2
    assert busy_time([]) == 0


def test_a_real_profile_on_the_cpu():
    """Products, a norm and an optimizer's step are found, and nothing counts twice."""
    layer = torch.nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(layer.parameters())
    inputs = torch.randn(512, 256)

    def step() -> None:
        torch.nn.functional.layer_norm(layer(inputs), (256,)).sum().backward()
        optimizer.step()

    step()
    recorded = record(BENCH, step)
    found = summarize(trace_of(recorded))
    assert {"GEMM", "norm, activation, residual", "optimizer", IDLE} <= set(found.by_kind)
    assert sum(found.by_kind.values()) <= 1.001 * found.seconds
    rows = list(rows_by_kind("profile", found))
    assert [row.name for row in rows] == [f"profile: {kind}" for kind in found.by_kind]
    assert not waits_of(BENCH, step)
    assert wait_row(BENCH, "waits", found, waits_of(BENCH, step)).verdict == "skipped"
