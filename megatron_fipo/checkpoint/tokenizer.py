"""The tokenizer of a model folder, checked against the model's vocabulary."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_fipo.checkpoint.companions import MODEL_FILES, companions
from megatron_fipo.errors import UserError, first_line
from megatron_fipo.families.registry import read_hf_config
from megatron_fipo.placeholders import refuse_placeholder

GENERATION_CONFIG = "generation_config.json"
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
"""Files with the tokens of a tokenizer, as glob patterns. Its class may name others."""


def load_tokenizer(
    folder: str | Path, trust_remote_code: bool, vocab_size: int
) -> tuple[Any, frozenset[int]]:
    """The tokenizer of a folder whose model has `vocab_size` embedding rows, and the ids that end a response.

    These are the end-of-sequence tokens of the tokenizer and of generation_config.json. Without the latter
    they are those of config.json, as in transformers.

    UserError if one of its files is a Git LFS pointer or a web page; if the tokenizer cannot be read, has no
    file of tokens (transformers then makes one without tokens) or none but special tokens in it, or has a
    token whose id is outside the embedding; if there is no end-of-sequence token, or one outside the embedding.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(
            f"model folder {folder} does not exist; give model.path a folder in Hugging Face format."
        )
    for path in companions(Path(folder), MODEL_FILES):
        refuse_placeholder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # the error of a damaged tokenizer.json depends on the damage
        raise UserError(
            f"cannot read the tokenizer in {folder} ({first_line(error)}); restore tokenizer.json and "
            "tokenizer_config.json"
        ) from error
    vocabulary = tokenizer.get_vocab()
    patterns = {*VOCABULARIES, *tokenizer.vocab_files_names.values()}
    if not any(path.is_file() for pattern in patterns for path in Path(folder).glob(pattern)):
        raise UserError(
            f"model folder {folder} has no tokenizer: none of {', '.join(sorted(patterns))}; copy it again"
        )
    if not vocabulary.keys() - {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}:
        raise UserError(
            f"the tokenizer in {folder} has no tokens besides special ones; restore tokenizer.json and "
            "tokenizer_config.json"
        )
    token, last = max(vocabulary.items(), key=lambda entry: entry[1])
    if last >= vocab_size:
        roles = ", ".join(role for role, name in tokenizer.special_tokens_map.items() if name == token)
        fix = f"set {roles} in tokenizer_config.json to a token that it has, or " if roles else ""
        raise UserError(
            f"token {token!r} of the tokenizer in {folder} has id {last}, but the model has {vocab_size} "
            f"embedding rows (vocab_size in config.json); {fix}restore the model's own tokenizer"
        )
    end_ids = _configured_end_ids(Path(folder), vocab_size)
    if tokenizer.eos_token_id is not None:
        end_ids |= {tokenizer.eos_token_id}
    if not end_ids:
        raise UserError(
            f"neither tokenizer nor {GENERATION_CONFIG} in {folder} names an end-of-sequence token; set "
            "eos_token in tokenizer_config.json"
        )
    return tokenizer, end_ids


def _configured_end_ids(folder: Path, vocab_size: int) -> frozenset[int]:
    """`eos_token_id` of generation_config.json, or of config.json if there is no such file."""
    path = folder / GENERATION_CONFIG
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            named = config.get("eos_token_id")
        except (OSError, ValueError, RecursionError, AttributeError) as error:
            raise UserError(f"{path} is not readable: {first_line(error)}; restore it or remove it") from None
    else:
        path = folder / "config.json"
        named = read_hf_config(folder).get("eos_token_id")
    ids: Iterable[Any] = named if isinstance(named, list) else [] if named is None else [named]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise UserError(
                f"{path} has eos_token_id={named!r}, but the ids of the model's {vocab_size} embedding rows "
                f"(vocab_size in config.json) are 0 to {vocab_size - 1}; correct it"
            )
    return frozenset(ids)
