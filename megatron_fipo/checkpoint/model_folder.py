"""What a Hugging Face folder means: the one reader for training, conversion, evaluation and engines.

Its reading is that of transformers. A folder that transformers, vLLM or Megatron-Core would read differently
is refused, with both files, both tensors, or file and key. Importing this module imports neither torch nor
Megatron-Core.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.checkpoint.safetensors_folder import SafetensorsFolder, StoredTensor, require_exactly
from megatron_fipo.errors import UserError
from megatron_fipo.families.family import Architecture, Family, Weight
from megatron_fipo.families.fused_experts import fused_shape
from megatron_fipo.families.registry import read_hf_config, read_model_config

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Tensors that some exporters store although they follow from the config. All readers ignore them."""
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes of plain weights, by name in the safetensors format."""


@dataclass(frozen=True)
class OtherReading:
    """A key of config.json that changes the model of transformers or vLLM, but not Megatron-Core's."""

    fix: str
    neutral: tuple[Any, ...] = (None,)
    """Values that change nothing."""
    families: tuple[str, ...] = ()
    """`model_type` of the families whose readers obey the key; empty for all."""

    def applies_to(self, model_type: Any) -> bool:
        return not self.families or model_type in self.families


_PLAIN_WEIGHTS = "the weights in bfloat16 are needed; if they are that already, remove the key"
_VLLM_ALONE = "it changes the model of vLLM alone; remove the key if the model was trained without it"
_OFF = (None, False)
OTHER_READINGS: Mapping[str, OtherReading] = {
    "quantization_config": OtherReading(_PLAIN_WEIGHTS),
    "compression_config": OtherReading(_PLAIN_WEIGHTS),
    "transformers_weights": OtherReading("name the file model.safetensors and remove the key"),
    "fusion_config": OtherReading("it changes the modules of transformers alone; remove the key"),
    "per_layer_config": OtherReading(
        "layers of different sizes are not supported; remove the key if they are equal"
    ),
    # null is bidirectional too, for transformers and vLLM.
    "is_causal": OtherReading(
        "transformers and vLLM then attend to later tokens, but training is causal; remove the key if the "
        "model is causal",
        neutral=(True,),
    ),
    "dual_chunk_attention_config": OtherReading(_VLLM_ALONE, families=("qwen2", "qwen3", "qwen3_moe")),
    "qk_norm": OtherReading(_VLLM_ALONE, _OFF, families=("qwen2",)),
    "logit_scale": OtherReading(_VLLM_ALONE, neutral=(1,), families=("llama",)),
    "qkv_bias": OtherReading(_VLLM_ALONE, _OFF, families=("llama",)),
    "bias": OtherReading(_VLLM_ALONE, _OFF, families=("llama",)),
    "target_layer_count": OtherReading(_VLLM_ALONE, neutral=(0,), families=("llama",)),
    "sliding_window": OtherReading(_VLLM_ALONE, neutral=(None, 0), families=("llama",)),
}
"""By key. An exported folder has none of those that its family obeys."""
OTHER_FILES: Mapping[str, str] = {
    "hf_quant_config.json": "vLLM takes the weights for quantized ones; remove the file if they are not",
    "adapter_config.json": "transformers adds the adapter if peft is installed; merge it, or move it out",
}
"""Files that change how transformers or vLLM read the weights, each with the fix."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder that all readers read in the same way."""

    path: Path
    family: Family
    architecture: Architecture
    weights: tuple[Weight, ...]
    """All weights of the model, in Hugging Face order."""
    source: SafetensorsFolder
    """The stored tensors."""


def open_model_folder(folder: str | Path) -> ModelFolder:
    """The model in a Hugging Face folder, from its JSON files and the headers of its safetensors.

    If embeddings are tied and `lm_head.weight` is stored, both tensors are read too, in parts (2 GB for
    152k tokens and 3,072 channels in bfloat16). Nothing else is read.

    UserError: as `read_description` and `SafetensorsFolder`; a tensor that is missing, not expected, of another
    shape than config.json requires or quantized; tied embeddings with an `lm_head.weight` of other values.
    """
    family, architecture = read_description(folder)
    source = SafetensorsFolder(folder)
    weights = tuple(family.weights(architecture))
    _check_tensors(weights, architecture, source)
    return ModelFolder(Path(folder), family, architecture, weights, source)


def read_description(folder: str | Path) -> tuple[Family, Architecture]:
    """What config.json states, for a reader that does not load the weights of the folder.

    UserError: as `read_model_config`; a `model_type` of another family; a key (`OTHER_READINGS`) or a file
    (`OTHER_FILES`) that makes another reader change the model.
    """
    family, architecture = read_model_config(folder)
    path, config = Path(folder) / "config.json", read_hf_config(folder)
    if config.get("model_type") != family.name:
        raise UserError(
            f"{path} has model_type={config.get('model_type')!r}, which transformers reads, but architectures="
            f"{config['architectures']}, which vLLM reads, needs {family.name!r}; correct one of them"
        )
    for key, reading in OTHER_READINGS.items():
        if reading.applies_to(family.name) and key in config and config[key] not in reading.neutral:
            value = "" if isinstance(config[key], dict | list) else f"={json.dumps(config[key])}"
            raise UserError(f"{path} has {key}{value}: {reading.fix}")
    for name, fix in OTHER_FILES.items():
        if (path.parent / name).exists():
            raise UserError(f"model folder {folder} has {name}: {fix}")
    return family, architecture


def describe_export(
    config: Mapping[str, Any], shapes: Mapping[str, Any], dtypes: Sequence[str]
) -> dict[str, Any]:
    """The config.json of a folder with the tensors `shapes` in `dtypes` (torch's names, widest first).

    Every key that the export could make false is set or removed; the others are copied.
    """
    family = config.get("model_type")
    dropped = {key for key, reading in OTHER_READINGS.items() if reading.applies_to(family)}
    written = {key: value for key, value in config.items() if key not in dropped}
    written["tie_word_embeddings"] = OUTPUT not in shapes
    names = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    for key in names:
        if written.get(key) not in dtypes:
            written[key] = dtypes[0]
    return written


def _check_tensors(weights: Sequence[Weight], architecture: Architecture, source: SafetensorsFolder) -> None:
    """UserError unless the folder has exactly the model's tensors, in the model's shapes, not quantized."""
    expected = {
        name: shape for weight in weights for name, shape in zip(weight.names, weight.shapes, strict=True)
    }
    found = {name for name in source.tensors if not name.endswith(IGNORED_SUFFIXES)}
    if expected.keys() - found == {OUTPUT}:
        raise UserError(
            f"model folder {source.folder} has no {OUTPUT}, but config.json has no tie_word_embeddings=true; "
            f"set it if {EMBEDDING} is the output layer too, or copy the weights again"
        )
    _check_fused(expected, architecture, source)
    copied_head = architecture.share_embeddings_and_output_weights and OUTPUT in found
    require_exactly(
        f"model folder {source.folder}",
        found - {OUTPUT} if copied_head else found,
        expected.keys(),
        "config.json",
    )
    for name, shape in expected.items():
        _check_tensor(name, source.tensors[name], shape, source)
    if copied_head and not source.equal(OUTPUT, EMBEDDING):
        raise UserError(
            f"config.json in {source.folder} has tie_word_embeddings=true, but {OUTPUT} differs from "
            f"{EMBEDDING}; set it to false to keep both tensors, or remove {OUTPUT}"
        )


def _check_fused(
    expected: Mapping[str, tuple[int, ...]], architecture: Architecture, source: SafetensorsFolder
) -> None:
    """UserError unless each stored tensor with all experts of a layer consists of tensors `expected`."""
    for name, stored in source.fused.items():
        count = architecture.experts.count if architecture.experts else 0
        _check_tensor(name, stored, fused_shape(name, expected, count), source)


def _check_tensor(
    name: str, stored: StoredTensor, shape: tuple[int, ...] | None, source: SafetensorsFolder
) -> None:
    """UserError for a tensor of another shape (None: of experts in a layer without them), or that is quantized."""
    if stored.shape != shape:
        needed = "no experts in this layer" if shape is None else list(shape)
        raise UserError(
            f"{name} in {source.folder} has shape {list(stored.shape)}; config.json requires {needed}"
        )
    if stored.dtype not in FLOAT_DTYPES:
        raise UserError(
            f"{name} in {source.folder} is stored as {stored.dtype}; convert it to bfloat16 or float32 first"
        )
