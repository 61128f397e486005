"""A folder without its weights, or with other files in their place, is refused with what it has and the fix."""

import shutil
from pathlib import Path

import pytest

from megatron_fipo.checkpoint.model_folder import open_model_folder
from megatron_fipo.checkpoint.safetensors_folder import INDEX_NAME, SINGLE_NAME
from megatron_fipo.checkpoint.tokenizer import load_tokenizer
from megatron_fipo.errors import UserError
from tests.checkpoint.editing import SHARDS, set_text, steps

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PAGE = "\n<!DOCTYPE html><html>Sign in</html>"


def remove(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def dangling(*names: str):
    """Links as of the hub's cache, without the files that they point to."""

    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()
            (folder / name).symlink_to(f"../../blobs/{name}")

    return edit


def put(name: str):
    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"content")

    return edit


LOST = {
    "no weights": (False, remove(SINGLE_NAME), "it has no weights; download the folder again with `hf dow"),
    "shards without an index": (
        True,
        remove(INDEX_NAME),
        rf"it has shards \({SHARDS[0]} and 1 more\) but no model.safetensors.index.json; download the folder",
    ),
    "a part in the folder": (
        False,
        steps(remove(SINGLE_NAME), put("model.safetensors.3f.incomplete")),
        r"unfinished download \(model.safetensors.3f.incomplete\); download .*, which completes it",
    ),
    "a part in .cache": (
        True,
        steps(remove(INDEX_NAME), put(".cache/huggingface/download/x.3f.incomplete")),
        "it has an unfinished download",
    ),
    "a part, and a shard is gone": (
        True,
        steps(remove(SHARDS[1]), put(".cache/huggingface/download/x.3f.incomplete")),
        f"lacks {SHARDS[1]}, which its index lists, and has an unfinished download",
    ),
    "a link to nothing": (
        False,
        dangling(SINGLE_NAME),
        r"it has links to files that are gone \(model.safetensors\); download",
    ),
    "a shard that is a link to nothing": (True, dangling(SHARDS[0]), "and has links to files that are gone"),
    "links to nothing, also of the index": (True, dangling(INDEX_NAME, *SHARDS), "and 2 more.; download"),
    "config.json is a link to nothing": (
        False,
        dangling("config.json"),
        "config.json is a link to a file that is gone; download the folder again",
    ),
    "GGUF": (
        False,
        steps(remove(SINGLE_NAME), put("model-Q8_0.gguf")),
        r"in GGUF \(model-Q8_0.gguf\); download the safetensors, or .* save_pretrained \(gguf_file=",
    ),
    "a pickle": (
        False,
        steps(remove(SINGLE_NAME), put("pytorch_model.bin")),
        r"as pickles \(pytorch_model.bin\); .*save_pretrained",
    ),
    "pickles in parts": (
        False,
        steps(remove(SINGLE_NAME), put("pytorch_model-00001-of-00002.bin"), put("pytorch_model-00002-of-00002.bin")),
        r"as pickles \(pytorch_model-00001-of-00002.bin and 1 more\)",
    ),
    "Meta's files": (
        False,
        steps(remove(SINGLE_NAME), put("consolidated.00.pth")),
        r"the layout of another library \(consolidated.00.pth\); download the model in Hugging Face format",
    ),
    "an adapter": (
        False,
        steps(remove(SINGLE_NAME), put("adapter_model.safetensors")),
        "an adapter alone .*merge_and_unload",
    ),
    "TensorFlow": (False, steps(remove(SINGLE_NAME), put("tf_model.h5")), "for another library .tf_model.h5"),
    "another name": (
        False,
        steps(remove(SINGLE_NAME), put("weights.safetensors")),
        "of another name .weights.safetensors.; .*name the file model.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sharded", "edit", "message"), LOST.values(), ids=LOST)
def test_the_reason_and_the_fix_are_reported(make, sharded, edit, message):
    folder = make(sharded, edit)
    with pytest.raises(UserError, match=message) as caught:
        open_model_folder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_part_in_the_hub_cache_is_found(models, tmp_path):
    folder = Path(shutil.copytree(models[False], tmp_path / "models--a--b/snapshots/3f"))
    (folder / SINGLE_NAME).unlink()
    put("../../blobs/5e.incomplete")(folder)
    with pytest.raises(UserError, match=r"an unfinished download \(5e.incomplete\)"):
        open_model_folder(folder)


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (POINTER, "is a Git LFS pointer, not the file; run `git lfs pull`"),
        (PAGE, "is a web page or XML, not"),
    ],
)
@pytest.mark.parametrize(
    ("sharded", "file"),
    [
        (False, SINGLE_NAME),
        (True, SHARDS[1]),
        (True, INDEX_NAME),
        (False, "config.json"),
        (False, "tokenizer.json"),
        (False, "tokenizer_config.json"),
        (False, "generation_config.json"),
        (False, "chat_template.jinja"),
        (False, "tokenizer.model"),
    ],
)
def test_a_pointer_or_a_web_page_instead_of_a_file_is_named(make, content, advice, sharded, file):
    folder = make(sharded, set_text(file, content))
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, False, open_model_folder(folder).architecture.vocab_size)
    assert str(caught.value).startswith(f"{folder / file} {advice}")


@pytest.mark.parametrize(
    "text", ["<|im_start|>user", "<s>{{ messages }}", "{# <html> #}", "<header>", "version 1"]
)
def test_a_chat_template_may_start_like_that(make, text):
    load_tokenizer(make(False, set_text("chat_template.jinja", text)), False, 32)
