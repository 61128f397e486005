"""Data files in the format of DAPO's, and an encoder for their prompts."""

import json
from datetime import datetime

import pyarrow
import pyarrow.parquet

from megatron_fipo.tasks.countdown.tokenizer import build_tokenizer
from megatron_fipo.tasks.prompt_encoder import PromptEncoder
from megatron_fipo.tasks.prompt_file import RowSettings, read_problems

NOW = datetime(2026, 11, 28, 9, 30)
ENCODE = PromptEncoder(build_tokenizer(), 4000, NOW)


def row(prompt="1+1", answer="2", index=None, **fields):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {
        "prompt": messages,
        "reward_model": {"ground_truth": answer},
        "data_source": "math",
        "extra_info": {"index": index},
    } | fields


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_text("\n".join(json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def read(path, tokenizer=None, limit=50, deduplicate=True, log=print, source=None, **settings):
    encode = PromptEncoder(tokenizer or build_tokenizer(), limit, NOW)
    source = source or path.suffix[1:]
    rows = RowSettings(str(path), source, deduplicate=deduplicate, **settings)
    return read_problems(rows, encode, log)
