"""Wrong contents of a model folder are found before anything is trained on it or sampled from it."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_fipo.checkpoint import finite
from megatron_fipo.checkpoint.finite import check_stored_values, is_finite
from megatron_fipo.checkpoint.hf_import import load_hf_weights
from megatron_fipo.checkpoint.model_folder import open_model_folder
from megatron_fipo.checkpoint.tokenizer import load_tokenizer
from megatron_fipo.cli.main import main
from megatron_fipo.config import ModelConfig, ParallelConfig
from megatron_fipo.driver.tokenizer import checked_tokenizer
from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.model_folder import load_model
from megatron_fipo.errors import UserError
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.build import build_model
from tests.checkpoint.editing import (
    EMBEDDING,
    HEAD,
    NORM,
    put,
    save_model,
    set_config,
    set_json,
    set_text,
    spoil,
    steps,
    stored,
)
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
LAYER = "model.layers.1"
NAN, INF = float("nan"), float("inf")
SPOILED = [
    (NORM, NAN),
    (EMBEDDING, INF),
    (HEAD, -INF),
    (f"{LAYER}.self_attn.k_proj.weight", NAN),
    (f"{LAYER}.self_attn.v_proj.bias", INF),
    (f"{LAYER}.mlp.up_proj.weight", NAN),
    (f"{LAYER}.mlp.down_proj.weight", NAN),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "folder")


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_single_value_is_found_anywhere(dtype, value):
    for shape in ((), (1,), (7, 129)):
        values = torch.ones(shape, dtype=dtype)
        assert is_finite(values)
        for index in {0, values.numel() // 2, values.numel() - 1}:
            spoiled = values.clone()
            spoiled.view(-1)[index] = value
            assert not is_finite(spoiled)
    assert is_finite(torch.empty(0, dtype=dtype))
    assert is_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))


@pytest.mark.parametrize(("name", "value"), SPOILED)
def test_the_local_engine_refuses_and_names_the_tensor(folder, name, value):
    spoil(name, value)(folder)
    with pytest.raises(UserError, match=rf"^{name} in .*/model has NaN or infinite values in float32; copy"):
        LocalEngine(str(folder), "float32").ready()


@pytest.mark.parametrize("part_bytes", [1, 100, 2**26])
@pytest.mark.parametrize(("name", "value"), SPOILED)
def test_the_check_on_disk_names_the_tensor(folder, monkeypatch, name, value, part_bytes):
    """As an engine on vLLM does it before vLLM starts."""
    monkeypatch.setattr(finite, "PART_BYTES", part_bytes)
    check_stored_values(open_model_folder(folder).source, torch.float32)
    spoil(name, value)(folder)
    with pytest.raises(UserError, match=rf"^{name} in .*/model has NaN or infinite"):
        check_stored_values(open_model_folder(folder).source, torch.float32)


def load(folder: Path, parallel: ParallelConfig, dtype: str = "float32") -> str | None:
    """The error of this rank, or None."""
    model_parallel.initialize(parallel, seed=1)
    chunks = build_model(folder, ModelConfig(path=str(folder), dtype=dtype), parallel)
    try:
        load_hf_weights(chunks, folder)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("name", "value"), SPOILED)
def test_a_rank_that_has_the_value_refuses_and_names_the_tensor(folder, name, value):
    spoil(name, value)(folder)
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    errors = run_ranks(2, lambda rank, world: load(folder, parallel))
    assert errors[1].startswith(f"{name} in {folder} has NaN or infinite values in float32")
    replicated = name == NORM
    assert (errors[0] == errors[1]) if replicated else errors[0] is None, "the value is in rank 1's slices"


def test_a_value_beyond_the_range_of_the_training_dtype_is_refused(folder):
    spoil(NORM, 3.4e38)(folder)  # infinite in bfloat16
    assert run_ranks(1, lambda rank, world: load(folder, ParallelConfig())) == [None]
    (error,) = run_ranks(1, lambda rank, world: load(folder, ParallelConfig(), "bfloat16"))
    assert error.startswith(f"{NORM} in {folder} has NaN or infinite values in bfloat16")
    with pytest.raises(UserError, match=f"{NORM} in .* in bfloat16"):
        LocalEngine(str(folder), "bfloat16").ready()


def test_an_engine_that_gets_its_weights_from_the_trainer_does_not_read_them(folder):
    spoil(NORM, NAN)(folder)
    LocalEngine(str(folder), "float32", load_weights=False).ready()
    (folder / "model.safetensors").unlink()
    LocalEngine(str(folder), "float32", load_weights=False).ready()


# --- tokens -------------------------------------------------------------------------------------------------


def remove(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def more_rows(folder: Path) -> None:
    """Two embedding rows fewer than the tokenizer has tokens, in the weights as well."""
    for name in (EMBEDDING, HEAD):
        put(name, lambda tensors, name=name: tensors[name][:-2])(folder)
    set_config(vocab_size=30)(folder)


def empty_vocabulary(folder: Path) -> None:
    set_json("tokenizer.json", model={"type": "WordLevel", "vocab": {}, "unk_token": "<pad>"})(folder)


TOKEN_FAULTS = {
    "more tokens than rows": (
        more_rows,
        "token 'l' of the tokenizer in .* has id 31, but the model has 30 emb",
    ),
    "an added token": (
        set_json("tokenizer_config.json", pad_token="<new>"),
        "token '<new>' of the tokenizer in .* has id 32, but the model has 32 .*set pad_token in",
    ),
    "another model's special tokens": (
        remove("tokenizer_config.json"),
        "token '<.endoftext.>' of the tokenizer in .* has id 32, .*set eos_token, unk_token, pad_token in",
    ),
    "no tokenizer files": (
        remove("tokenizer.json", "tokenizer_config.json"),
        "model folder .* has no tokenizer: none of .*tokenizer.json.*; copy it again",
    ),
    "no tokenizer.json": (remove("tokenizer.json"), "has no tokenizer: none of .*tokenizer.json"),
    "an empty vocabulary": (empty_vocabulary, "has no tokens besides special ones; restore"),
    "an empty tokenizer.json": (set_text("tokenizer.json", ""), "cannot read the tokenizer in"),
    "a cut tokenizer.json": (
        lambda folder: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:-20]),
        "cannot read the tokenizer in",
    ),
    "a pointer instead of tokenizer.json": (
        set_text("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.json is a Git LFS pointer, not the file; run `git lfs pull`",
    ),
    "an end token beyond the rows": (
        set_json("generation_config.json", eos_token_id=[1, 32]),
        r"generation_config.json has eos_token_id=\[1, 32\], but the ids .* are 0 to 31; correct it",
    ),
    "a negative end token": (set_json("generation_config.json", eos_token_id=-1), "has eos_token_id=-1"),
    "an end token as text": (
        set_json("generation_config.json", eos_token_id="<eos>"),
        "eos_token_id='<eos>'",
    ),
    "an end token in config.json alone": (
        steps(remove("generation_config.json"), set_config(eos_token_id=99)),
        "config.json has eos_token_id=99",
    ),
    "generation_config.json is a list": (
        set_text("generation_config.json", "[]"),
        "config.json is not readable",
    ),
    "generation_config.json is cut": (set_text("generation_config.json", '{"eos'), "is not readable"),
}


@pytest.mark.parametrize(("edit", "message"), TOKEN_FAULTS.values(), ids=TOKEN_FAULTS)
def test_a_tokenizer_that_does_not_fit_is_refused(folder, edit, message):
    edit(folder)
    rows = open_model_folder(folder).architecture.vocab_size
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(folder, False, rows)
    assert "\n" not in str(caught.value)
    for load_weights in (True, False):  # every engine
        with pytest.raises(UserError, match=message):
            load_model(str(folder), "float32", False, load_weights)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dtype": "bf16"}, 'config.json has dtype="bf16", which .* set it to one of bfloat16, float16,'),
        ({"dtype": "auto"}, 'config.json has dtype="auto"'),
        ({"dtype": "torch.bfloat16"}, 'config.json has dtype="torch.bfloat16"'),
        ({"dtype": ..., "torch_dtype": "bf16"}, 'config.json has torch_dtype="bf16"'),
        ({"dtype": {"": "bfloat16"}}, "config.json has dtype="),
        (
            {"use_cache": "true"},
            "config.json is not readable by transformers: .*field 'use_cache': .*expected bool, got str .value: "
            "'true'.; correct the key",
        ),
        ({"bos_token_id": [1]}, "config.json is not .*field 'bos_token_id': .*expected int, got list"),
        (
            {"use_sliding_window": None},
            "config.json is not .*'use_sliding_window' expected bool, got NoneType",
        ),
    ],
)
def test_a_fault_of_the_config_is_not_blamed_on_the_tokenizer(folder, keys, message):
    set_config(**keys)(folder)
    for read in (
        lambda: checked_tokenizer(str(folder), False),
        lambda: load_model(str(folder), "float32", False, load_weights=False),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert str(caught.value).startswith(f"{folder}/config.json ")
        assert "\n" not in str(caught.value)
        assert "tokenizer" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "ids"),
    [
        (steps(), {1}),
        (set_json("generation_config.json", eos_token_id=[3, 5]), {1, 3, 5}),
        (set_json("generation_config.json", eos_token_id=...), {1}),
        (set_config(eos_token_id=7), {1}),
        (steps(remove("generation_config.json"), set_config(eos_token_id=7)), {1, 7}),
        (steps(remove("generation_config.json"), set_config(eos_token_id=...)), {1}),
    ],
)
def test_the_tokens_that_end_a_response(folder, edit, ids):
    edit(folder)
    assert load_tokenizer(folder, False, 32)[1] == ids
    assert load_model(str(folder), "float32", False, load_weights=False)[1] == ids


def test_a_larger_embedding_than_the_tokenizer_needs_is_accepted(folder):
    """As of most public models."""
    for name in (EMBEDDING, HEAD):
        put(name, lambda tensors, name=name: torch.cat([tensors[name], tensors[name]]))(folder)
    set_config(vocab_size=64)(folder)
    assert load_model(str(folder), "float32", False, load_weights=True)[1] == {1}
    assert stored(folder)[HEAD].shape[0] == 64


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("fault", ["an added token", "no tokenizer files", "an end token beyond the rows"])
def test_a_command_refuses_before_anything_starts(folder, monkeypatch, capsys, command, fault):
    edit, _ = TOKEN_FAULTS[fault]
    edit(folder)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    config = str(ROOT / "examples/countdown/fipo.yaml")
    arguments = {
        "train": ["train", config, f"model.path={folder}", "run_dir=run"],
        "evaluate": ["evaluate", str(folder), config, "--output", "table.jsonl"],
    }[command]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "token" in error
    assert str(folder) in error
    assert "resume" not in error
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
