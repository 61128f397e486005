"""What a rank runs on, logged once at the start: a pure function from facts to lines."""

from dataclasses import dataclass

from megatron_fipo.config import ModelConfig, OptimizerSettings
from megatron_fipo.model.layer_spec import TRANSFORMER_ENGINE

ADAMS = {
    "transformer_engine": "Transformer Engine's FusedAdam",
    "apex": "apex's FusedAdam",
    "torch": "torch's AdamW",
    "megatron_fipo": "torch's AdamW (CPU)",
}


@dataclass(frozen=True)
class RankFacts:
    """Facts about one rank."""

    device: str
    """As CUDA names it, or `CPU`."""
    peak_flops: float | None
    """Its dense BF16 FLOP/s; None if not known."""
    layer_spec: str
    transformer_engine: str | None
    flash_attention: str | None
    """Version of the flash-attn package; None if it is not installed."""
    adam: str
    """The top package of the Adam class: a key of `ADAMS`."""
    fuses_gradients: bool
    """Whether linear layers add their weight gradients to the buffer inside the GEMM."""
    kernels: str
    """What computes head, loss and SwiGLU, from `describe_kernels`."""


def active_lines(facts: RankFacts, model: ModelConfig, optimizer: OptimizerSettings) -> list[str]:
    """One line for each part of the model and the optimizer, for the log."""
    engine = f"Transformer Engine {facts.transformer_engine}"
    fused = facts.layer_spec == TRANSFORMER_ENGINE
    flash = (
        f"flash-attn {facts.flash_attention} or cuDNN, as it chooses" if facts.flash_attention else "cuDNN"
    )
    fp8 = "none" if model.fp8 == "none" else f"{model.fp8}, scales {model.fp8_recipe}"
    masters = "no master weights" if model.dtype == "float32" else "master weights float32"
    state = f"moments {optimizer.state_dtype}, {masters}"
    peak = (
        "peak FLOP/s not known, so MFU is not reported"
        if facts.peak_flops is None
        else f"{facts.peak_flops / 1e12:.0f} TFLOP/s in dense BF16, the peak for MFU"
    )
    offload = (
        f", {optimizer.cpu_offload:.0%} in host memory (torch's AdamW there)" if optimizer.cpu_offload else ""
    )
    return [
        f"device: {facts.device}, {peak}",
        f"layers: {engine if fused else 'portable, of plain torch and Megatron-Core'}, {model.dtype}",
        f"attention: {f'Transformer Engine through {flash}' if fused else 'torch scaled_dot_product_attention'}",
        f"norm: RMSNorm of {f'{engine}, fused with the product after it' if fused else 'plain torch'}",
        f"FP8: {fp8}{', weights kept in it' if model.fp8_param_gather else ''}",
        f"weight gradients: {'added within the products' if facts.fuses_gradients else 'added after the products'}",
        f"optimizer: {ADAMS.get(facts.adam, facts.adam)}, {state}{offload}",
        f"head, loss and SwiGLU: {facts.kernels}",
    ]
