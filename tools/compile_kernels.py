"""Compiles every Triton kernel of the package for a GPU, without one, and prints the resources that each uses.

    python -m tools.compile_kernels                    # compute capability 9.0
    python -m tools.compile_kernels --arch 100

The kernels are those that the loss, the head and SwiGLU launch: they run here on small CPU tensors while launches are only recorded,
so that types, constants and numbers of warps are the real ones. Exits with 1 if a kernel spills registers or uses a stack.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from megatron_fipo.config import HeadConfig
from megatron_fipo.model.logprob_head import triton_passes  # noqa: F401  (compiled kernels, not interpreted ones)
from megatron_fipo.model.swiglu import SwiGLU, triton_kernels  # noqa: F401
from megatron_fipo.objective.future_kl import scan_future_kl
from megatron_fipo.objective.kernels import triton_loss  # noqa: F401
from tests.gpu.head_inputs import random_head_inputs, run_head
from tests.gpu.loss_inputs import FIPO, OBJECTIVES, loss_and_gradients, random_loss_inputs
from tools.bench.gpu_scan import recipe_inputs
from tools.bench.harness import Bench, parser, table

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
DIVISIBLE = [["tt.divisibility", 16]]
"""Triton's attribute of arguments that are multiples of 16: most pointers, and some integers."""


@dataclass(frozen=True)
class Launch:
    """One kernel with the types and constants of a real launch."""

    scenario: str
    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return str((self.kernel.__name__, self.signature, self.constants, self.divisible, self.options))


@dataclass(frozen=True)
class Usage:
    """Registers, and bytes of stack and spills, of a thread; bytes of shared memory of a block."""

    registers: int
    stack: int
    spills: int
    shared: int

    @property
    def spills_nothing(self) -> bool:
        return self.stack == 0 and self.spills == 0


def loss_scenarios() -> Iterator[tuple[str, Callable[[], object]]]:
    """The scan and the loss under every objective that compiles differently."""
    inputs = random_loss_inputs([700, 20], 1, chunks=2)
    x, plan = inputs.log_probs, inputs.rows.plan
    for dtype in (torch.float32, torch.float64):
        given = x.to(dtype), x.new_zeros(len(x), 0), plan
        yield (
            f"scan, {dtype}".replace("torch.", ""),
            lambda given=given: scan_future_kl(*given, 32.0, kernels="triton"),
        )
    recipe = recipe_inputs([700, 20])
    yield "recipe", lambda: loss_and_gradients(recipe, FIPO, "triton")
    for name, objective in OBJECTIVES.items():
        yield name, lambda objective=objective: loss_and_gradients(inputs, objective, "triton")


def head_scenarios() -> Iterator[tuple[str, Callable[[], object]]]:
    bench = Bench(torch.device("cpu"))
    for dtype in (torch.bfloat16, torch.float32):
        for bonus in (False, True):
            for megabytes in (0, 64):
                settings = HeadConfig(kernels="triton", logits_memory_mb=megabytes)
                name = f"head {dtype}{', bonus' * bonus}{', kept' * bool(megabytes)}".replace("torch.", "")
                inputs = random_head_inputs(bench, settings, dtype, bonus)
                yield name, lambda inputs=inputs: run_head(inputs)


def activation_scenarios() -> Iterator[tuple[str, Callable[[], object]]]:
    """SwiGLU forward and backward."""

    def run(dtype: torch.dtype) -> None:
        given = torch.randn(16, 2 * 4_864).to(dtype).requires_grad_()
        SwiGLU("triton")(given).sum().backward()

    for dtype in (torch.bfloat16, torch.float32):
        yield f"swiglu {dtype}".replace("torch.", ""), lambda dtype=dtype: run(dtype)


def recorded_launches(scenarios: Iterable[tuple[str, Callable[[], object]]]) -> list[Launch]:
    """Every different launch of the scenarios. None is carried out, so results of the functions are undefined."""
    launches: dict[str, Launch] = {}
    for name, run in scenarios:

        def record(
            kernel: JITFunction, *args: Any, grid: Any, warmup: bool, _name: str = name, **named: Any
        ) -> None:
            launch = describe_launch(_name, kernel, args, named)
            launches.setdefault(launch.key, launch)

        # The switch is read when kernels are defined (imported above, without it) and when they are chosen for CPU tensors.
        with (
            mock.patch.object(JITFunction, "run", record),
            mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        ):
            run()
    return list(launches.values())


def describe_launch(scenario: str, kernel: JITFunction, args: tuple, named: dict[str, Any]) -> Launch:
    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        n: v for n, v in named.items() if n in kernel.arg_names
    }
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        value = values[parameter.name]
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                divisible.append(parameter.name)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(parameter.name)
    return Launch(scenario, kernel, signature, constants, tuple(divisible), options)


def compile_launch(launch: Launch, arch: int) -> Usage:
    attributes = {(launch.kernel.arg_names.index(name),): DIVISIBLE for name in launch.divisible}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    return resource_usage(compiled.asm["cubin"], compiled.asm["ptx"], arch)


def resource_usage(cubin: bytes, ptx: str, arch: int) -> Usage:
    """Of the compiled code, by cuobjdump; spills by ptxas, which alone separates them from other uses of the stack."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary, text = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        binary.write_bytes(cubin)
        text.write_text(ptx, encoding="utf-8")
        usage = _output([tools / "cuobjdump", "-res-usage", binary])
        target = re.search(r"\.target (\w+)", ptx)
        assembler = tools / ("ptxas-blackwell" if arch >= 100 else "ptxas")
        verbose = _output(
            [
                assembler,
                "-v",
                f"--gpu-name={target[1] if target else f'sm_{arch}'}",
                text,
                "-o",
                Path(folder) / "out",
            ]
        )
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", verbose))
    return Usage(
        *(int(_found(name, usage)) for name in ("REG", "STACK")), spilled, int(_found("SHARED", usage))
    )


def _found(name: str, usage: str) -> str:
    match = re.search(rf"{name}:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump did not report {name}: {usage}")
    return match[1]


def _output(command: list[Any]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout + done.stderr


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--arch", type=int, default=90, help="compute capability times ten")
    arch = options.parse_args().arch
    print(f"Triton {triton.__version__}, sm_{arch}\n")
    heads = ("kernel", "first launched by", "warps", "registers", "stack", "spills", "shared memory")
    launches = recorded_launches(chain(loss_scenarios(), head_scenarios(), activation_scenarios()))
    usages = [compile_launch(launch, arch) for launch in launches]
    rows = (
        (
            launch.kernel.__name__,
            launch.scenario,
            launch.options.get("num_warps", 4),
            usage.registers,
            f"{usage.stack} B",
            f"{usage.spills} B",
            f"{usage.shared} B",
        )
        for launch, usage in zip(launches, usages, strict=True)
    )
    print(table(heads, rows))
    return 0 if all(usage.spills_nothing for usage in usages) else 1


if __name__ == "__main__":
    sys.exit(main())
