"""Random faults in model folders: every reader gives the tensors of transformers, bit for bit, or a UserError.

A reader is the import of a rank, the local engine, or a conversion and back. FOLDER_FUZZ_COUNT sets the number
of folders, FOLDER_FUZZ_SEED the first seed. The message of a failure names the seed and its faults.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from megatron_fipo.checkpoint.convert.convert import to_hf, to_megatron
from megatron_fipo.checkpoint.hf_export import iterate_hf_tensors
from megatron_fipo.checkpoint.hf_import import load_hf_weights
from megatron_fipo.checkpoint.safetensors_folder import INDEX_NAME, SINGLE_NAME
from megatron_fipo.config import ModelConfig, ParallelConfig
from megatron_fipo.engine.model_folder import load_model
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.build import build_model
from tests.checkpoint.conftest import no_progress
from tests.checkpoint.editing import (
    EMBEDDING,
    HEAD,
    in_tensors,
    index_of,
    other_weights,
    put,
    save_model,
    set_config,
    set_index,
    set_json,
    set_text,
    stale_index,
    stored,
    weight_files,
)
from tests.ranks import run_ranks

COUNT = int(os.environ.get("FOLDER_FUZZ_COUNT", "40"))
FIRST_SEED = int(os.environ.get("FOLDER_FUZZ_SEED", "0"))
BASES = [(tied, sharded) for tied in (False, True) for sharded in (False, True)]
Tensors = dict[str, torch.Tensor]
Fault = Callable[[random.Random, Path], object]


# --- faults: some cannot apply to a folder that others have changed; they raise, and nothing happens ---------


def _some_file(rng: random.Random, folder: Path) -> str:
    return rng.choice(weight_files(folder))


def _some_tensor(rng: random.Random, folder: Path) -> tuple[str, str]:
    file = _some_file(rng, folder)
    return file, rng.choice(sorted(stored(folder, file)))


def delete_tensor(rng: random.Random, folder: Path) -> None:
    file, name = _some_tensor(rng, folder)
    in_tensors(lambda tensors: tensors.pop(name), file)(folder)


def rename_tensor(rng: random.Random, folder: Path) -> None:
    file, name = _some_tensor(rng, folder)
    new = rng.choice(
        [name.removeprefix("model."), f"model.{name}", f"{name}_scale", name.upper(), HEAD, EMBEDDING]
    )
    in_tensors(lambda tensors: tensors.update({new: tensors.pop(name)}), file)(folder)
    if (folder / INDEX_NAME).exists() and rng.random() < 0.7:
        entries = index_of(folder)
        entries[new] = entries.pop(name)
        set_index(folder, entries)


def copy_tensor(rng: random.Random, folder: Path) -> None:
    """Into another file, or under another name; with the same or other values."""
    file, name = _some_tensor(rng, folder)
    tensor = stored(folder, file)[name] + rng.choice([0, 1])
    target = _some_file(rng, folder)
    new = rng.choice([name, name, name.removeprefix("model."), f"base_model.{name}", HEAD])
    put(new, lambda tensors: tensor, target)(folder)


def reshape_tensor(rng: random.Random, folder: Path) -> None:
    file, name = _some_tensor(rng, folder)
    change = rng.choice(
        [lambda t: t.T.contiguous(), lambda t: t[:-1].contiguous(), lambda t: t.flatten(), lambda t: t[None]]
    )
    put(name, lambda tensors: change(tensors[name]), file)(folder)


def cast_tensor(rng: random.Random, folder: Path) -> None:
    file, name = _some_tensor(rng, folder)
    kinds = [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool]
    kind = rng.choice(kinds)
    put(name, lambda tensors: tensors[name].to(kind), file)(folder)


def spoil_value(rng: random.Random, folder: Path) -> None:
    file, name = _some_tensor(rng, folder)
    value = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, -0.0])
    in_tensors(
        lambda tensors: tensors[name].view(-1)[rng.randrange(tensors[name].numel())].fill_(value), file
    )(folder)


def store_head(rng: random.Random, folder: Path) -> None:
    """The head of a tied model: a copy, or a little different."""
    (file,) = [file for file in weight_files(folder) if EMBEDDING in stored(folder, file)]
    change = rng.choice(
        [lambda t: t, lambda t: t, lambda t: t * 1.001, lambda t: t[:-1], lambda t: t.double()]
    )
    put(HEAD, lambda tensors: change(tensors[EMBEDDING]), file)(folder)
    if (folder / INDEX_NAME).exists():
        set_index(folder, {**index_of(folder), HEAD: file})


def truncate_file(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice([0, 7, len(content) // 2, len(content) - 1])])


def lengthen_file(rng: random.Random, folder: Path) -> None:
    with (folder / _some_file(rng, folder)).open("ab") as file:
        file.write(b"\0" * rng.choice([1, 64]))


def damage_header(rng: random.Random, folder: Path) -> None:
    path = folder / _some_file(rng, folder)
    content = bytearray(path.read_bytes())
    content[rng.randrange(400)] = rng.randrange(256)
    path.write_bytes(content)


def swap_files(rng: random.Random, folder: Path) -> None:
    one, other = weight_files(folder)[:2]
    (folder / one).rename(folder / "x")
    (folder / other).rename(folder / one)
    (folder / "x").rename(folder / other)


def edit_index(rng: random.Random, folder: Path) -> None:
    entries: dict[str, Any] = index_of(folder)
    name = rng.choice(sorted(entries))
    file = rng.choice(
        [*entries.values(), f"../{entries[name]}", f"./{entries[name]}", SINGLE_NAME, "x.bin", None, 3]
    )
    if file is None:
        del entries[name]
    else:
        entries[name] = file
    set_index(folder, entries)


def index_of_single(rng: random.Random, folder: Path) -> None:
    set_index(folder, dict.fromkeys(stored(folder), SINGLE_NAME))


def damage_index(rng: random.Random, folder: Path) -> None:
    entries = index_of(folder) if (folder / INDEX_NAME).exists() else {}
    metadata, weight_map = {"metadata": {}}, {"weight_map": entries}
    content = rng.choice([weight_map, metadata, {**metadata, "weight_map": sorted(entries)}, [], entries, 1])
    (folder / INDEX_NAME).write_text(json.dumps(content))


def add_file(rng: random.Random, folder: Path) -> None:
    name = rng.choice(
        [
            "model.safetensors",
            "consolidated.safetensors",
            "original/consolidated.safetensors",
            "adapter_model.safetensors",
            "model-00003-of-00003.safetensors",
            "shard-00000-model-00001-of-00001.safetensors",
        ]
    )
    other_weights(name)(folder)


def add_text_file(rng: random.Random, folder: Path) -> None:
    names = ["pytorch_model.bin", "hf_quant_config.json", "adapter_config.json", "params.json", "model.gguf"]
    set_text(rng.choice(names), rng.choice(["{}", "version https://git-lfs", ""]))(folder)


def remove_file(rng: random.Random, folder: Path) -> None:
    rng.choice(sorted(path for path in folder.iterdir() if path.is_file())).unlink()


VALUES: tuple[Any, ...] = (
    None,
    ...,
    True,
    False,
    0,
    -1,
    1,
    3,
    16,
    0.5,
    1e9,
    float("nan"),
    "x",
    "silu",
    [],
    [1],
    {},
)


def edit_config(rng: random.Random, folder: Path) -> None:
    key = rng.choice(sorted(json.loads((folder / "config.json").read_text())))
    set_config(**{key: rng.choice(VALUES)})(folder)


def edit_rotary(rng: random.Random, folder: Path) -> None:
    keys = ("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "full_attention")
    entry = {rng.choice(keys): rng.choice([*VALUES[2:], "default", "linear", "llama3"])}
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **entry}
    place = rng.choice(["rope_parameters", "rope_scaling"])
    set_config(**{place: parameters, **rng.choice([{}, {"rope_theta": 5000.0}, {"rope_parameters": ...}])})(
        folder
    )


def add_config_key(rng: random.Random, folder: Path) -> None:
    keys = (
        *(
            "quantization_config",
            "compression_config",
            "transformers_weights",
            "per_layer_config",
            "head_dim",
        ),
        *(
            "text_config",
            "torch_dtype",
            "attention_bias",
            "mlp_bias",
            "auto_map",
            "fusion_config",
            "is_decoder",
        ),
        *(
            "rope_theta",
            "partial_rotary_factor",
            "sliding_window",
            "use_sliding_window",
            "tie_word_embeddings",
        ),
        *(
            "architectures",
            "model_type",
            "num_labels",
            "id2label",
            "attn_implementation",
            "_attn_implementation",
        ),
    )
    values = (
        *VALUES,
        "llama",
        "qwen3",
        "bfloat16",
        "model.safetensors",
        ["LlamaForCausalLM"],
        {"quant_method": "fp8"},
    )
    set_config(**{rng.choice(keys): rng.choice(values)})(folder)


def edit_generation(rng: random.Random, folder: Path) -> None:
    keys = ("eos_token_id", "bos_token_id", "pad_token_id", "temperature", "do_sample")
    set_json("generation_config.json", **{rng.choice(keys): rng.choice([*VALUES, 31, 32, [1, 40]])})(folder)


def edit_tokenizer(rng: random.Random, folder: Path) -> None:
    key = rng.choice(
        ["pad_token", "eos_token", "unk_token", "tokenizer_class", "added_tokens_decoder", "backend"]
    )
    set_json("tokenizer_config.json", **{key: rng.choice([*VALUES, "<eos>", "<new>", "LlamaTokenizer"])})(
        folder
    )


FAULTS: tuple[Fault, ...] = (
    *(delete_tensor, rename_tensor, copy_tensor, reshape_tensor, cast_tensor, spoil_value, store_head),
    *(truncate_file, lengthen_file, damage_header, swap_files, edit_index, index_of_single, damage_index),
    *(add_file, add_text_file, remove_file, edit_config, edit_rotary, add_config_key, edit_generation),
    *(edit_tokenizer, lambda rng, folder: stale_index(folder)),
)


def damage(seed: int, bases: dict[tuple[bool, bool], Path], target: Path) -> list[str]:
    """A folder with one to three faults at `target`; their names. Half of the folders have only one."""
    rng = random.Random(seed)
    shutil.copytree(bases[rng.choice(BASES)], target)
    names = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        fault = rng.choice(FAULTS)
        try:
            fault(rng, target)
        except Exception as error:  # such as a tensor that an earlier fault removed
            names.append(f"({fault.__name__}: {type(error).__name__})")
        else:
            names.append(fault.__name__)
    return names


# --- readers: the float32 tensors by name, or the text of a UserError -----------------------------------------


def by_transformers(folder: Path) -> Tensors | str | None:
    """The reference, without any check of this package. None if transformers cannot build the model."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if (folder / "generation_config.json").exists():
            GenerationConfig.from_pretrained(folder)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception:
        return None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (Exception, CheckpointException) as error:
        return f"{type(error).__name__}: {error}"
    return dict(model.state_dict())


def by_engine(folder: Path) -> Tensors:
    return dict(load_model(str(folder), "float32", False, load_weights=True)[0].state_dict())


def by_import(folder: Path) -> Tensors:
    chunks = build_model(folder, ModelConfig(path=str(folder), dtype="float32"), ParallelConfig())
    load_hf_weights(chunks, folder)
    return {name: tensor.clone() for name, tensor in iterate_hf_tensors(chunks)}


def by_conversion(folder: Path) -> Tensors:
    converted, back = folder.parent / "converted", folder.parent / "back"
    try:
        to_megatron(folder, converted, "float32", no_progress)
        to_hf(converted, back, "float32", no_progress)
        return stored(back)
    finally:
        for path in (converted, back):
            shutil.rmtree(path, ignore_errors=True)


def outcome(reader: Callable[[Path], Tensors], folder: Path) -> Tensors | str:
    """The tensors, or `UserError: ...`, or any other error, which is a failure."""
    try:
        return reader(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def by_imports(folders: list[Path]) -> list[Tensors | str]:
    """The import of all folders on one rank."""

    def body(rank: int, world: int) -> list[Tensors | str]:
        model_parallel.initialize(ParallelConfig(), seed=1)
        return [outcome(by_import, folder) for folder in folders]

    return run_ranks(1, body)[0]


def difference(found: Tensors | str, reference: Tensors | str | None) -> str | None:
    """What is wrong with a reader's outcome, or None.

    Without a reference there is nothing to compare with: a command asks transformers too before it starts.
    """
    if isinstance(found, str):
        return None if found.startswith("UserError: ") and "\n" not in found else found
    if reference is None:
        return None
    if isinstance(reference, str):
        return f"accepted, but transformers has {reference}"
    for name, tensor in reference.items():
        own = found.get(name, found[EMBEDDING] if name == HEAD else None)
        # Bits, so that NaN equals NaN.
        if (
            own is None
            or own.shape != tensor.shape
            or not torch.equal(own.view(torch.int32), tensor.view(torch.int32))
        ):
            return f"{name} differs from transformers"
    return None


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[tuple[bool, bool], Path]:
    """By tied and sharded."""
    return {
        (tied, sharded): save_model(tmp_path_factory.mktemp("base") / "model", tied, sharded)
        for tied, sharded in BASES
    }


@pytest.mark.timeout(60 + COUNT)
def test_all_readers_agree(bases, tmp_path):
    folders = [tmp_path / f"{FIRST_SEED + index}" / "model" for index in range(COUNT)]
    faults = [damage(FIRST_SEED + index, bases, folder) for index, folder in enumerate(folders)]
    problems, accepted = [], Counter()
    for index, (folder, imported) in enumerate(zip(folders, by_imports(folders), strict=True)):
        reference = by_transformers(folder)
        outcomes = {
            "import": imported,
            "engine": outcome(by_engine, folder),
            "convert": outcome(by_conversion, folder),
        }
        if reference is None:
            assert isinstance(outcomes["engine"], str)
        for reader, found in outcomes.items():
            accepted[reader] += not isinstance(found, str)
            if problem := difference(found, reference):
                problems.append(f"seed {FIRST_SEED + index} {faults[index]}: {reader}: {problem}")
    print(f"accepted of {COUNT}: {dict(accepted)}")
    assert not problems, "\n".join(problems)
    assert all(0 < accepted[reader] < COUNT for reader in ("import", "engine", "convert")), (
        "nothing was tested"
    )
