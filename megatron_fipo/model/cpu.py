"""The CPU platform: patches that let Megatron-Core, which is written for CUDA, run on CPU tensors over gloo.

Megatron-Core's algorithms (tensor, pipeline and context parallelism, its optimizers, its checkpoints) need no
CUDA. Only device names, a few type-name comparisons and imports prevent a CPU run. `install` patches exactly
these:

1. Every `megatron.core` module gets, as its global `torch`, a proxy that maps CUDA to the CPU: factory
   functions replace a CUDA device by the CPU, and `torch.cuda` has no-op streams and the CPU's random state.
   The real `torch` is unchanged for all other modules. An import hook does this, so modules imported later
   are covered.
2. `Tensor.cuda()` is the identity. It would raise on a build without CUDA.
3. `Tensor.type()`, called by `megatron.core.optimizer`, returns `torch.cuda.FloatTensor`, which that code
   compares with.
4. The tensor-parallel random tracker stores the CPU generator's state.
5. The optimizer is a look-alike of `FusedAdam`, because the distributed optimizer cannot load its state into
   torch's AdamW.
6. `torch.compile` is the identity while a Megatron module is being imported (saves import time and memory;
   needs no compiler).
7. The one module that imports Triton unconditionally (Megatron-Core 0.19, experts only) is replaced by a
   stub.
8. The counts with which tokens are sent to experts become NumPy arrays, as they do when they are copied from a GPU:
   torch takes no tensors for them.
9. Gathers and reduce-scatters of parts of different sizes (experts with tensor parallelism) are made of gloo's
   other collectives, since it has neither.
10. Megatron-Core 0.16's router gets the name of a kernel of Transformer Engine, which it reads without having defined
   it.
11. Transformer Engine and apex, if installed, are found but not imported: Megatron-Core would pass CPU tensors
   to their kernels.

If CUDA is available, `install` does nothing.
"""

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.optim.adam import adam

ROOT = "megatron.core"
CPU = torch.device("cpu")
TRITON_MODULE = f"{ROOT}.transformer.moe.ops.paged_stash"
FOR_GPUS = ("transformer_engine", "apex")

FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "empty_strided", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "randperm"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
)


def install() -> None:
    """Patch the coming import of `megatron.core` for the CPU.

    Call before the first import; later calls have no effect.

    Does nothing if CUDA is available. RuntimeError if `megatron.core` is already imported without the
    platform, or if this Megatron-Core no longer has an attribute that the platform replaces.
    """
    if torch.cuda.is_available() or is_installed():
        return
    if ROOT in sys.modules:
        raise RuntimeError(
            "megatron.core is already imported without the CPU platform; import megatron_fipo.model before it"
        )
    _require_modules(PATCHES)
    torch.Tensor.cuda = _identity_cuda  # type: ignore[method-assign, assignment]
    torch.Tensor.type = _tensor_type  # type: ignore[method-assign, assignment]
    # Megatron-Core imports it, and it would warn about a CUDA toolkit without a device. `megatron-fipo
    # doctor` reports that.
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime" not in record.getMessage()
    )
    sys.meta_path.insert(0, _MegatronFinder())


def is_installed() -> bool:
    """Whether this process's Megatron-Core runs on the CPU platform."""
    return any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path)


# --- the import hook ----------------------------------------------------------------------------------------


class _MegatronFinder(MetaPathFinder):
    """Finds `megatron.core` modules as usual and patches each one after its body has run.

    Blocks imports of `FOR_GPUS`.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in FOR_GPUS:
            spec = PathFinder.find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = _RefusingLoader()
            return spec
        if fullname != ROOT and not fullname.startswith(f"{ROOT}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        if fullname == TRITON_MODULE and importlib.util.find_spec("triton") is None:
            return ModuleSpec(fullname, _StubLoader())
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with mock.patch.object(torch, "compile", _identity_compile), warnings.catch_warnings():
                # Megatron-Core warns repeatedly that Transformer Engine and Apex are not installed.
                warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed")
                execute(module)
            if module.__dict__.get("torch") is torch:
                module.__dict__["torch"] = _TORCH
            PATCHES.get(fullname, _no_patch)(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _StubLoader(Loader):
    """A module in which every name is a function that raises when called."""

    def exec_module(self, module: ModuleType) -> None:
        def __getattr__(name: str) -> Callable[..., Any]:
            if name.startswith("__"):
                raise AttributeError(name)

            def unavailable(*args: Any, **kwargs: Any) -> Any:
                raise RuntimeError(f"{module.__name__}.{name} needs Triton, which is not installed")

            return unavailable

        module.__dict__["__getattr__"] = __getattr__


class _RefusingLoader(Loader):
    """A package that is found but cannot be imported."""

    def exec_module(self, module: ModuleType) -> None:
        raise ModuleNotFoundError(
            f"{module.__name__} runs on GPUs only, and this machine has none", name=module.__name__
        )


def _identity_compile(function: Any = None, **_: Any) -> Any:
    """A `torch.compile` that compiles nothing, as a function and as a decorator with arguments."""
    return function if function is not None else lambda wrapped: wrapped


# --- torch as Megatron-Core sees it -------------------------------------------------------------------------


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


class _Stream:
    """A CUDA stream or event without a device: all work is always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Proxy(ModuleType):
    """A module with the attributes in `overrides`, and those of `original` for all other names."""

    def __init__(self, original: ModuleType, overrides: dict[str, Any]) -> None:
        super().__init__(original.__name__)
        self.__dict__["_original"] = original
        self.__dict__.update(overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


_CUDA = _Proxy(
    torch.cuda,
    {
        "current_device": lambda: CPU,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": lambda stream: nullcontext(),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
    },
)
_TORCH = _Proxy(torch, {"cuda": _CUDA, **{name: _on_cpu(getattr(torch, name)) for name in FACTORIES}})


def _identity_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


_original_type = torch.Tensor.type


def _tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    answer = _original_type(self, *args, **kwargs)
    caller = sys._getframe(1).f_globals.get("__name__", "")
    if isinstance(answer, str) and caller.startswith(f"{ROOT}.optimizer"):
        return answer.replace("torch.", "torch.cuda.", 1)
    return answer


# --- patches of single modules ------------------------------------------------------------------------------


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state layout of NVIDIA's FusedAdam.

    `step` is an int per parameter group, not a tensor per parameter.
    The arithmetic is torch's `adam`, so updates equal `torch.optim.AdamW` (or `Adam` with
    `adam_w_mode=False`) bit for bit.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("optimizer CUDA graphs (capturable) need CUDA")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param] = {
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
            adam(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                max_exp_avg_sqs=[],
                state_steps=[torch.tensor(float(group["step"] - 1)) for _ in params],
                decoupled_weight_decay=self.adam_w_mode,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _require_modules(names: Iterable[str]) -> None:
    """RuntimeError if the installed Megatron-Core lacks a module to patch (found on disk, not imported)."""
    namespace = importlib.util.find_spec("megatron")
    roots = [Path(location) for location in (namespace.submodule_search_locations or [])] if namespace else []
    for name in names:
        inside = Path(*name.split(".")[1:])
        if not any(
            (root / inside).with_suffix(".py").is_file() or (root / inside / "__init__.py").is_file()
            for root in roots
        ):
            raise RuntimeError(
                f"the CPU platform patches {name}, which the installed megatron-core does not have"
            )


def _replace(module: ModuleType, **names: Any) -> None:
    for name, value in names.items():
        if not hasattr(module, name):
            raise RuntimeError(
                f"the CPU platform replaces {module.__name__}.{name}, which this megatron-core does not have"
            )
        setattr(module, name, value)


def _patch_random(module: ModuleType) -> None:
    _replace(
        module,
        _get_cuda_rng_state=lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        _set_cuda_rng_state=lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state),
    )
    # The tracker warns if the CPU generator advanced while the "CUDA" one was in use. Here they are the same
    # generator.
    logging.getLogger(module.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _counts_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _all_gather(parts: list[torch.Tensor], tensor: torch.Tensor, group: Any = None) -> None:
    """`torch.distributed.all_gather` into parts that may differ in size."""
    for rank, part in enumerate(parts):
        if rank == group.rank():
            part.copy_(tensor)
        torch.distributed.broadcast(part, torch.distributed.get_global_rank(group, rank), group=group)


def _reduce_scatter(output: torch.Tensor, parts: list[torch.Tensor], group: Any = None) -> None:
    """`torch.distributed.reduce_scatter` of parts that may differ in size."""
    for rank, part in enumerate(parts):
        total = part.clone()
        torch.distributed.reduce(total, torch.distributed.get_global_rank(group, rank), group=group)
        if rank == group.rank():
            output.copy_(total)


def _patch_mappings(module: ModuleType) -> None:
    distributed = _Proxy(torch.distributed, {"all_gather": _all_gather, "reduce_scatter": _reduce_scatter})
    _replace(module, torch=_Proxy(_TORCH, {"distributed": distributed}))


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    f"{ROOT}.tensor_parallel.random": _patch_random,
    f"{ROOT}.optimizer": lambda module: _replace(module, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
    f"{ROOT}.optimizer.distrib_optimizer": lambda module: _replace(
        module, Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True
    ),
    f"{ROOT}.tensor_parallel.mappings": _patch_mappings,
    f"{ROOT}.transformer.moe.moe_utils": lambda module: vars(module).setdefault("te_general_gemm", None),
    f"{ROOT}.transformer.moe.token_dispatcher": lambda module: _replace(
        module, maybe_move_tensor_to_cpu=_counts_on_host
    ),
}


def _no_patch(module: ModuleType) -> None: ...
