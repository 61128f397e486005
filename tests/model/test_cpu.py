"""The CPU platform: absent with CUDA, exact, and an error if it is installed too late or no longer fits."""

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from megatron_fipo.model import cpu


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_changes_where_cuda_is_available():
    run_python("""
        import sys, torch
        before = torch.Tensor.cuda, torch.Tensor.type, list(sys.meta_path)
        torch.cuda.is_available = lambda: True
        from megatron_fipo.model import cpu
        assert (torch.Tensor.cuda, torch.Tensor.type, list(sys.meta_path)) == before
        assert not cpu.is_installed()
    """)


def test_it_refuses_to_come_after_megatron_core():
    run_python("""
        import sys, types
        sys.modules["megatron.core"] = types.ModuleType("megatron.core")
        try:
            import megatron_fipo.model
        except RuntimeError as error:
            assert "already imported" in str(error)
        else:
            raise AssertionError("not refused")
    """)


def test_what_is_for_gpus_is_found_but_not_imported(tmp_path):
    """With Transformer Engine installed, Megatron-Core would use its kernel for the norm of CPU tensors."""
    for package in ("transformer_engine", "apex"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('imported')")
    run_python(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import megatron_fipo.model
        from importlib.util import find_spec
        from megatron.core.optimizer.clip_grads import l2_norm_impl
        from megatron_fipo.model.mcore import has_transformer_engine
        assert l2_norm_impl.__module__ == "megatron.core.utils"
        assert has_transformer_engine()
        assert find_spec("apex").submodule_search_locations
    """)


def test_installing_twice_installs_once():
    finders = list(sys.meta_path)
    cpu.install()
    assert sys.meta_path == finders
    assert cpu.is_installed()


def test_a_missing_patch_target_is_an_error():
    with pytest.raises(RuntimeError, match="does not have"):
        cpu._require_modules(["megatron.core.optimizer", "megatron.core.gone"])
    with pytest.raises(RuntimeError, match=r"torch\.nope"):
        cpu._replace(torch, nope=1)


def test_only_megatron_sees_the_cpu_as_cuda():
    from megatron.core import utils

    assert utils.torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert (
        utils.torch.empty_like(torch.zeros(2), device=utils.torch.cuda.current_device()).device.type == "cpu"
    )
    assert utils.torch.nn is torch.nn
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_the_random_tracker_gives_its_own_reproducible_streams():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 5)
    torch.manual_seed(1)
    with tracker.fork("one"):
        first = torch.rand(3)
    outside = torch.rand(3)
    with tracker.fork("one"):
        second = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(outside, torch.rand(3))
    torch.manual_seed(5)
    assert torch.equal(torch.cat((first, second)), torch.cat((torch.rand(3), torch.rand(3))))


@pytest.mark.parametrize(
    ("adam_w_mode", "reference_class"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)]
)
def test_fused_adam_equals_torch_bit_for_bit(adam_w_mode, reference_class):
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    fused = cpu.FusedAdam(ours.parameters(), adam_w_mode=adam_w_mode, **settings)
    reference = reference_class(theirs.parameters(), **settings)
    for step in range(5):
        batch = torch.randn(4, 5)
        for model, optimizer in ((ours, fused), (theirs, reference)):
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()
        assert fused.param_groups[0]["step"] == step + 1
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
