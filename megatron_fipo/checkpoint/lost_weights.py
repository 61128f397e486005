"""Why a folder lacks files of weights: an unfinished download, links to nothing, or another format."""

from collections.abc import Iterable
from pathlib import Path

from megatron_fipo.errors import listed

DOWNLOAD_AGAIN = "download the folder again with `hf download`"
_SAVE = "load it with transformers and write it with save_pretrained"
_OTHER_FORMATS = (
    (
        ("model-*-of-*.safetensors",),
        f"has shards ({{}}) but no model.safetensors.index.json; {DOWNLOAD_AGAIN}",
    ),
    (
        ("consolidated*.safetensors", "consolidated*.pth"),
        "has its weights in the layout of another library ({}); download the model in Hugging Face format",
    ),
    (("*.gguf",), f"has its weights in GGUF ({{}}); download the safetensors, or {_SAVE} (gguf_file=...)"),
    (("pytorch_model*.bin", "*.pth", "model*.pt"), f"has its weights as pickles ({{}}); {_SAVE}"),
    (
        ("adapter_model.safetensors", "adapter_model.bin"),
        "has an adapter alone ({}); merge it into its base model with merge_and_unload of peft",
    ),
    (("*.h5", "*.msgpack", "*.onnx"), "has its weights for another library ({}); download the safetensors"),
    (
        ("*.safetensors",),
        "has safetensors of another name ({}); if they are the complete model, name the file model.safetensors",
    ),
)
"""Patterns of files, and what a folder with them has, with the fix. The first that matches is reported."""


def explain(folder: Path, names: Iterable[str]) -> str | None:
    """Why none or not all of the files `names` are in the folder, with the fix; None if nothing shows it."""
    dangling = [name for name in names if (folder / name).is_symlink() and not (folder / name).exists()]
    dangling += [
        path.name for path in folder.glob("*.safetensors") if path.is_symlink() and not path.exists()
    ]
    if dangling:
        return f"has links to files that are gone ({_few(dangling)}); {DOWNLOAD_AGAIN}"
    if parts := _unfinished(folder):
        return f"has an unfinished download ({_few(parts)}); {DOWNLOAD_AGAIN}, which completes it"
    return None


def explain_no_safetensors(folder: Path) -> str | None:
    """What a folder has that has neither index nor model.safetensors, with the fix; None if no weights."""
    for patterns, problem in _OTHER_FORMATS:
        if found := [path.name for pattern in patterns for path in folder.glob(pattern)]:
            return problem.format(_few(found))
    return None


def _unfinished(folder: Path) -> list[str]:
    """Parts of an unfinished download: in the folder, its .cache, or the blobs of the cache that has it."""
    places = [folder, folder / ".cache/huggingface/download"]
    if folder.resolve().parent.name == "snapshots":
        places.append(folder.resolve().parent.parent / "blobs")
    return [path.name for place in places for path in place.glob("*.incomplete")]


def _few(names: Iterable[str]) -> str:
    return listed(sorted({*names}), 1)
