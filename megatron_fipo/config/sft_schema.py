"""Every setting of `megatron-fipo sft`, with its meaning beside it, as in `schema.py`."""

from dataclasses import dataclass, field

from megatron_fipo.config.schema import ParallelConfig
from megatron_fipo.fields import REQUIRED, choice, file_path, number


@dataclass
class SftDataConfig:
    """Traces to imitate: written-out searches of generated countdown problems."""

    train_size: int = number(4000, least=1)
    """Problems to write traces for. The held-out problems are never among them."""


@dataclass
class SftOptimizerSettings:
    """AdamW for supervised training."""

    lr: float = number(3e-3, above=0)
    """Learning rate after the warm-up (AdamW); it falls along a half cosine to lr / 10 at the last step."""
    warmup_steps: int = number(50, least=0)
    """Steps over which the rate rises linearly from 0."""
    weight_decay: float = number(0.01, least=0)
    """Decoupled weight decay, not applied to norms and biases."""
    adam_beta2: float = number(0.98, least=0, below=1)
    """Decay of the second moment; short runs need a shorter memory than 0.999."""
    clip_grad: float = number(1.0, least=0)
    """Largest global gradient norm; 0 for none."""


@dataclass
class SftConfig:
    """Supervised training from random weights: how the base model of a small task is made."""

    model_config_path: str = file_path(REQUIRED)
    """Folder with config.json and tokenizer in Hugging Face format. No weights are needed: they are initialized from
    `seed`."""
    output_dir: str = file_path(REQUIRED)
    """Folder of the trained model, in Hugging Face format."""
    dtype: str = choice("float32", "bfloat16")
    """Dtype of parameters and activations."""
    layer_spec: str = choice("auto", "portable", "transformer_engine")
    """Modules of a layer, as in `train`."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: SftDataConfig = field(default_factory=SftDataConfig)
    optimizer: SftOptimizerSettings = field(default_factory=SftOptimizerSettings)
    steps: int = number(1000, least=1)
    """Optimizer steps."""
    tokens_per_step: int = number(3000, least=1)
    """Tokens of complete traces per optimizer step, over all ranks."""
    seed: int = number(1, least=0)
    """Seed of initialization, data and order."""
