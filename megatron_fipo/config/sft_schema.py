"""Every setting of `megatron-fipo sft`, with its meaning beside it, as in `schema.py`."""

from dataclasses import dataclass, field
from typing import Any

from megatron_fipo.config.schema import ParallelConfig
from megatron_fipo.config.task_schema import FILE_SOURCES
from megatron_fipo.fields import REQUIRED, choice, file_path, free_values, hook, named_texts, number

SFT_COLUMN_NAMES = ("prompt", "response")
"""Names of `data.columns`."""


@dataclass
class SftDataConfig:
    """What to imitate: responses in rows, or written-out searches of generated countdown problems."""

    source: str = hook("countdown", *FILE_SOURCES)
    """`parquet`, `jsonl` and `arrow` read a prompt and a response per row, and so does an import path, as data.source of
    `train`. `countdown` generates problems and writes their searches."""
    path: str | None = file_path(None)
    """Rows to train on: a file, a folder with the shards of one, or a pattern, as data.train_path of `train`."""
    held_out_path: str | None = file_path(None)
    """Rows whose loss is measured, not trained on; null for none, or for those of held_out_share."""
    held_out_share: float = number(0.0, least=0, below=1)
    """Share of the different prompts of `path`, chosen by `seed`, whose loss is measured and that are not trained on."""
    columns: dict[str, str] = named_texts(*SFT_COLUMN_NAMES)
    """Columns that are read, if they have other names: `columns: {prompt: question, response: solution}`. A dot names a field
    of an object. If both name the same column of messages, its last message, the assistant's, is the response."""
    text_prompts: str = choice("verbatim", "user_message")
    """Prompts that are plain text: used without changes, or as a message of the user in the chat template."""
    system_prompt: str | None = None
    """System message of prompts that have none; null for none."""
    chat_template_arguments: dict[str, Any] = free_values()
    """Values that the chat template of the tokenizer reads, such as `{enable_thinking: false}`."""
    max_length: int = number(2048, least=2)
    """Longest row in tokens, prompt and response together; at most tokens_per_step."""
    overlong_rows: str = choice("error", "drop")
    """Rows above max_length: refused, or left out and counted."""
    train_size: int = number(4000, least=1)
    """Problems to write traces for (countdown). The held-out problems are never among them."""
    numbers: int = number(3, least=3, most=4)
    """Numbers in each problem (countdown), as data.numbers of `train`."""


@dataclass
class SftOptimizerSettings:
    """AdamW for supervised training."""

    lr: float = number(3e-3, above=0)
    """Learning rate after the warm-up (AdamW); it falls along a half cosine to lr / 10 at the last step. The default is for
    a small model from random weights; a pretrained one needs about 1e-5."""
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
    """Supervised training: from random weights, how the base model of a small task is made, or from a model folder."""

    model_config_path: str | None = file_path(None)
    """Folder with config.json and tokenizer in Hugging Face format. No weights are needed: they are initialized from
    `seed`. Either this or model_path."""
    model_path: str | None = file_path(None)
    """Folder in Hugging Face format with the weights to start from. Either this or model_config_path."""
    output_dir: str = file_path(REQUIRED)
    """Folder of the trained model, in Hugging Face format."""
    dtype: str = choice("float32", "bfloat16")
    """Dtype of parameters and activations, and of the trained model's file."""
    layer_spec: str = choice("auto", "portable", "transformer_engine")
    """Modules of a layer, as in `train`."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: SftDataConfig = field(default_factory=SftDataConfig)
    optimizer: SftOptimizerSettings = field(default_factory=SftOptimizerSettings)
    steps: int = number(1000, least=1)
    """Optimizer steps."""
    tokens_per_step: int = number(3000, least=1)
    """Tokens of complete rows per optimizer step, prompts included, over all ranks. The last row may exceed it."""
    max_tokens_per_micro_batch: int | None = number(None, least=1)
    """Tokens that one rank processes at once, as batch.max_tokens_per_micro_batch of `train`; at least data.max_length. null
    for twice tokens_per_step, which makes one micro-batch of a step."""
    seed: int = number(1, least=0)
    """Seed of initialization, data and order."""

    @property
    def start(self) -> str:
        """The folder with the config and tokenizer of the model."""
        return self.model_path or self.model_config_path or ""

    @property
    def micro_batch_tokens(self) -> int:
        """The limit of a micro-batch, in tokens."""
        return self.max_tokens_per_micro_batch or 2 * self.tokens_per_step
