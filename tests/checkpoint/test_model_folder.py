"""A folder that can be read in two ways is refused by every reader, and all read an accepted one alike."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.checkpoint import safetensors_folder
from megatron_fipo.checkpoint.convert.convert import to_hf, to_megatron
from megatron_fipo.checkpoint.hf_import import load_hf_weights
from megatron_fipo.checkpoint.model_folder import open_model_folder
from megatron_fipo.checkpoint.safetensors_folder import INDEX_NAME
from megatron_fipo.cli.main import main
from megatron_fipo.config import ModelConfig, ParallelConfig
from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.errors import UserError
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.build import build_model
from tests.checkpoint.conftest import no_progress
from tests.checkpoint.editing import (
    EMBEDDING,
    HEAD,
    NORM,
    SHARDS,
    drop,
    in_tensors,
    index_of,
    other_weights,
    put,
    set_config,
    set_index,
    set_text,
    stale_index,
    steps,
    stored,
    weight_files,
)
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
TIED = set_config(tie_word_embeddings=True)


def reindex(**files):
    """An edit of a sharded folder's index; None removes an entry, `norm` is the final norm."""

    def edit(folder: Path) -> None:
        changed = {NORM if name == "norm" else name: file for name, file in files.items()}
        entries = {**index_of(folder), **changed}
        set_index(folder, {name: file for name, file in entries.items() if file is not None})

    return edit


def copy_to(target: str):
    def edit(folder: Path) -> None:
        (folder / target).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / SHARDS[1], folder / target)

    return edit


def two_shards(name: str, same: bool):
    """An edit that also puts a tensor of the second shard into the first."""

    def edit(folder: Path) -> None:
        tensor = stored(folder, SHARDS[1])[name]
        put(name, lambda tensors: tensor if same else tensor + 1, SHARDS[0])(folder)

    return edit


SINGLE_FAULTS = {
    "tied, other head": (
        steps(TIED),
        "tie_word_embeddings=true, but lm_head.weight differs from model.embed_tokens.weight; set it to false",
    ),
    "tied, one bit of the head differs": (
        steps(
            TIED,
            put(HEAD, lambda tensors: tensors[EMBEDDING]),
            in_tensors(lambda tensors: tensors[HEAD].view(torch.int32)[-1, -1].bitwise_xor_(1)),
        ),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "tied, head in another dtype": (
        steps(TIED, put(HEAD, lambda tensors: tensors[EMBEDDING].double())),
        "lm_head.weight differs",
    ),
    "tied, head of fewer rows": (
        steps(TIED, put(HEAD, lambda tensors: tensors[EMBEDDING][:-1])),
        "lm_head.weight differs",
    ),
    "tied, head instead of the embedding": (steps(TIED, drop(EMBEDDING)), f"lacks {EMBEDDING}"),
    "not tied, no head": (
        drop(HEAD),
        "has no lm_head.weight, but config.json has no tie_word_embeddings=true",
    ),
    "tie_word_embeddings left out, no head": (
        steps(drop(HEAD), set_config(tie_word_embeddings=...)),
        "has no lm_head.weight",
    ),
    "tie_word_embeddings as text": (set_config(tie_word_embeddings="false"), "has to be true or false"),
    "index of other files": (
        stale_index,
        f"model.safetensors, or {SHARDS[0]} of model.safetensors.index.json; remove",
    ),
    "index of this and another file": (
        steps(
            other_weights(SHARDS[0]),
            lambda folder: set_index(
                folder, dict.fromkeys(stored(folder), "model.safetensors") | {NORM: SHARDS[0]}
            ),
        ),
        f"model.safetensors, or {SHARDS[0]} of",
    ),
    "index of a file that is gone": (
        lambda folder: set_index(folder, dict.fromkeys(stored(folder), SHARDS[0])),
        f"model.safetensors, or {SHARDS[0]} of",
    ),
    "a second file of weights": (
        other_weights("model.fp16.safetensors"),
        "read in two ways: model.safetensors, or also model.fp16.safetensors; move",
    ),
    "an adapter's weights": (
        other_weights("adapter_model.safetensors"),
        "or also adapter_model.safetensors",
    ),
    "an adapter": (
        steps(other_weights("adapter_model.safetensors"), set_text("adapter_config.json")),
        "has adapter_config.json: transformers adds the adapter if peft is installed; merge it",
    ),
    "consolidated weights": (other_weights("consolidated.safetensors"), "or also consolidated.safetensors"),
    "consolidated weights below": (
        other_weights("original/consolidated.00.safetensors"),
        "or also original/consolidated.00.safetensors",
    ),
    "shards of transformers' ranks": (
        other_weights("shard-00000-model-00001-of-00001.safetensors"),
        "or also shard-00000-model-00001-of-00001.safetensors",
    ),
    "quantization_config": (
        set_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        "config.json has quantization_config: the weights in bfloat16 are needed; if they are that already, remove",
    ),
    "compression_config": (set_config(compression_config={"format": "x"}), "has compression_config"),
    "hf_quant_config.json": (set_text("hf_quant_config.json"), "has hf_quant_config.json: vLLM takes"),
    "transformers_weights": (
        steps(other_weights("other.bin"), set_config(transformers_weights="other.safetensors")),
        "has transformers_weights",
    ),
    "fp8 weights": (
        put(NORM, lambda tensors: tensors[NORM].to(torch.float8_e4m3fn)),
        "model.norm.weight in .* is stored as F8_E4M3; convert it",
    ),
    "int8 weights": (put(NORM, lambda tensors: tensors[NORM].to(torch.int8)), "is stored as I8; convert it"),
    "a scale of a quantized weight": (
        put("model.layers.0.mlp.up_proj.weight_scale_inv", lambda tensors: torch.ones(1)),
        "has model.layers.0.mlp.up_proj.weight_scale_inv, not expected",
    ),
    "one parameter under two prefixes": (
        put("norm.weight", lambda tensors: tensors[NORM] + 1),
        "has norm.weight, not expected by its config.json",
    ),
    "one parameter with the prefix twice": (
        put("model.model.norm.weight", lambda tensors: tensors[NORM]),
        "has model.model.norm.weight, not expected",
    ),
    "no prefix": (
        in_tensors(lambda tensors: tensors.update({"norm.weight": tensors.pop(NORM)})),
        "lacks model.norm.weight and has norm.weight, not expected",
    ),
    "model_type of another family": (
        set_config(model_type="llama"),
        "model_type='llama', which transformers reads, but architectures=.'Qwen2ForCausalLM'., which vLLM reads",
    ),
    "no model_type": (set_config(model_type=...), "model_type=None"),
    "sliding layers": (
        set_config(layer_types=["sliding_attention", "full_attention"]),
        "layer_types=.'sliding_attention', 'full_attention'. is not supported",
    ),
    "rotation of a part": (
        set_config(
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
        ),
        "partial_rotary_factor=0.5 is not supported",
    ),
    "a size in one layer": (
        set_config(per_layer_config={"0": {"intermediate_size": 12}}),
        "has per_layer_config",
    ),
}
SHARDED_FAULTS = {
    "path to the parent": (
        reindex(norm=f"../{SHARDS[1]}"),
        f"has model.norm.weight in '../{SHARDS[1]}', which is not",
    ),
    "absolute path": (reindex(norm=f"/models/{SHARDS[1]}"), f"in '/models/{SHARDS[1]}', which is not"),
    "path in a folder below": (
        steps(copy_to(f"old/{SHARDS[1]}"), reindex(norm=f"old/{SHARDS[1]}")),
        "which is not a safetensors file of the same folder",
    ),
    "path of this folder": (
        reindex(norm=f"./{SHARDS[1]}"),
        "which is not a safetensors file of the same folder",
    ),
    "file of pickles": (reindex(norm="pytorch_model.bin"), "in 'pytorch_model.bin', which is not"),
    "file name that is a number": (reindex(norm=2), "has model.norm.weight in 2, which is not"),
    "a shard that is gone": (
        lambda folder: (folder / SHARDS[1]).unlink(),
        f"lacks {SHARDS[1]}, which its index lists",
    ),
    "a tensor in the other shard": (
        reindex(norm=SHARDS[0]),
        "lack model.norm.weight, which .*index.json lists",
    ),
    "a tensor that the index lacks": (
        reindex(norm=None),
        f"does not list model.norm.weight, which {SHARDS[1]} has",
    ),
    "a tensor in two shards": (
        two_shards(NORM, same=False),
        f"model.norm.weight is in two files of .*, {SHARDS[0]} and {SHARDS[1]}; remove it",
    ),
    "equal tensors in two shards": (two_shards(NORM, same=True), "model.norm.weight is in two files"),
    "swapped shards": (
        lambda folder: [
            (folder / one).rename(folder / other)
            for one, other in ((SHARDS[0], "x"), (SHARDS[1], SHARDS[0]), ("x", SHARDS[1]))
        ],
        "lack .*, which model.safetensors.index.json lists",
    ),
    "consolidated weights": (other_weights("consolidated.safetensors"), "or also consolidated.safetensors"),
    "the file of a run before": (
        other_weights("model.safetensors"),
        "model.safetensors, or model-00001-of-00002",
    ),
    "no weight_map": (set_text(INDEX_NAME, '{"metadata": {}}'), "not a readable index .*'weight_map'"),
    "weight_map is a list": (
        set_text(INDEX_NAME, '{"metadata": {}, "weight_map": ["a"]}'),
        "not a readable index",
    ),
    "no metadata": (
        lambda folder: (folder / INDEX_NAME).write_text(json.dumps({"weight_map": index_of(folder)})),
        "not a readable index .*'metadata'",
    ),
    "empty index": (set_text(INDEX_NAME, ""), "not a readable index"),
}
FAULTS = [
    *((name, False, edit, message) for name, (edit, message) in SINGLE_FAULTS.items()),
    *((name, True, edit, message) for name, (edit, message) in SHARDED_FAULTS.items()),
]
ACCEPTED = {
    "tied with a copy of the head": (False, steps(TIED, put(HEAD, lambda tensors: tensors[EMBEDDING]))),
    "tied without head": (False, steps(TIED, drop(HEAD))),
    "index of the single file": (
        False,
        lambda folder: set_index(folder, dict.fromkeys(stored(folder), "model.safetensors")),
    ),
    "pickles beside": (False, set_text("pytorch_model.bin", "not read")),
    "an adapter's weights that the index does not list": (True, other_weights("adapter_model.safetensors")),
    "rotary frequencies": (
        False,
        put("model.layers.0.self_attn.rotary_emb.inv_freq", lambda tensors: torch.ones(4)),
    ),
    "quantization_config is null": (False, set_config(quantization_config=None)),
    "links to files elsewhere": (
        True,
        lambda folder: [
            (folder / file).symlink_to((folder / file).rename(folder.parent / file)) for file in SHARDS
        ],
    ),
}


@pytest.mark.parametrize(
    ("sharded", "edit", "message"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_a_folder_with_two_readings_is_refused(make, sharded, edit, message):
    folder = make(sharded, edit)
    with pytest.raises(UserError, match=message) as caught:
        open_model_folder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_every_reader_refuses_them(make, tmp_path):
    """The import of the ranks, the local engine and the conversion."""
    folders = [make(sharded, edit, name=f"{index}") for index, (_, sharded, edit, _) in enumerate(FAULTS)]
    good = make(False, lambda folder: None, name="good")

    def load(rank, world):
        parallel = ParallelConfig()
        model_parallel.initialize(parallel, seed=1)
        chunks = build_model(good, ModelConfig(path=str(good), dtype="float32"), parallel)
        load_hf_weights(chunks, good)
        for folder in folders:
            with pytest.raises(UserError):
                load_hf_weights(chunks, folder)

    run_ranks(1, load)
    for folder in folders:
        with pytest.raises(UserError):
            LocalEngine(str(folder), "float32").ready()
        with pytest.raises(UserError):
            to_megatron(folder, tmp_path / "converted", "keep", no_progress)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(("sharded", "edit"), ACCEPTED.values(), ids=ACCEPTED)
def test_an_accepted_folder_is_read_as_transformers_reads_it(make, tmp_path, sharded, edit):
    folder = make(sharded, edit)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    engine = LocalEngine(str(folder), "float32")
    engine.ready()
    to_megatron(folder, tmp_path / "converted", "keep", no_progress)
    to_hf(tmp_path / "converted", tmp_path / "back", "keep", no_progress)
    back = stored(tmp_path / "back")
    for name, tensor in expected.items():
        assert torch.equal(engine._weights()[name], tensor), name
        assert torch.equal(back[name if name in back else EMBEDDING], tensor), name


def test_the_comparison_of_tied_tensors_is_in_parts(make, monkeypatch):
    folder = make(False, ACCEPTED["tied with a copy of the head"][1])
    monkeypatch.setattr(safetensors_folder, "COMPARED_BYTES", 100)
    assert open_model_folder(folder).source.equal(HEAD, EMBEDDING)
    in_tensors(lambda tensors: tensors[HEAD][-1].neg_())(folder)
    with pytest.raises(UserError, match="differs"):
        open_model_folder(folder)


def test_the_check_needs_no_torch(make):
    """The driver holds no tensors, and `convert` fails before it loads Megatron-Core."""
    folder = make(False, ACCEPTED["tied with a copy of the head"][1])
    program = (
        "import sys; from megatron_fipo.checkpoint.model_folder import open_model_folder; "
        f"open_model_folder({str(folder)!r}); print(sorted({{'torch', 'megatron'}} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["train", "evaluate", "convert"])
@pytest.mark.parametrize(
    ("fault", "key"),
    [
        ("tied, other head", "has tie_word_embeddings=true, but lm_head.weight"),
        ("index of other files", "of model.safetensors.index.json; remove"),
        ("quantization_config", "config.json has quantization_config"),
        ("an adapter", "has adapter_config.json"),
    ],
)
def test_a_command_refuses_before_anything_starts(make, tmp_path, monkeypatch, capsys, command, fault, key):
    folder = str(make(False, SINGLE_FAULTS[fault][0]))
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "examples/countdown/fipo.yaml")
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    assert (
        main(
            {
                "train": ["train", config, f"model.path={folder}", "run_dir=run"],
                "evaluate": ["evaluate", folder, config, "--output", "table.jsonl"],
                "convert": ["convert", "to-megatron", folder, "converted"],
            }[command]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert key in error
    assert "resume" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}
    assert weight_files(Path(folder))
