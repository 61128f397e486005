"""Model folders and data files of unknown origin: no code runs, and sizes have limits."""

import json
import struct
from pathlib import Path

import pytest

from megatron_fipo.checkpoint import safetensors_folder
from megatron_fipo.checkpoint.safetensors_folder import SafetensorsFolder
from megatron_fipo.errors import UserError
from megatron_fipo.tasks import row as row_module
from megatron_fipo.tasks import row_reader
from megatron_fipo.tasks.countdown.tokenizer import build_tokenizer
from megatron_fipo.tasks.prompt_encoder import PromptEncoder
from tests.tasks.files import NOW, read, row, write

MESSAGES = (("user", "1+1"),)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.mknod(PATH) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['__builtins__']['open'](PATH, 'w') }}",
        "{{ strftime_now.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% set x = messages.__setitem__ %}{{ x(0, 1) }}",
        "{% include PATH %}",
        "{% for i in range(10000000) %}x{% endfor %}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(tmp_path, template):
    owned = tmp_path / "owned"
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template.replace("PATH", repr(str(owned)))
    with pytest.raises(UserError, match="row 1: the chat template refuses the prompt"):
        PromptEncoder(tokenizer, 10**9, NOW)("row 1", MESSAGES)
    assert not owned.exists()


def test_the_header_of_a_safetensors_file_has_a_limit(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        SafetensorsFolder(tmp_path)


def test_an_index_has_a_limit(tmp_path, monkeypatch):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(safetensors_folder, "MAX_INDEX_BYTES", 50)
    with pytest.raises(UserError, match=r"is not a readable index of safetensors .*more than 50 bytes"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
def test_an_index_names_files_of_its_folder_alone(tmp_path, file):
    index = {"metadata": {}, "weight_map": {"a": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is not a safetensors file of the same folder"):
        SafetensorsFolder(tmp_path)


def test_a_row_group_has_a_limit(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.parquet", [row("a" * 5000)])
    read(path, limit=10**6)
    monkeypatch.setattr(row_reader, "MAX_ROW_GROUP_BYTES", 4000)
    with pytest.raises(UserError, match="of prompts and answers in its row group 0, of which at most"):
        read(path, limit=10**6)


def test_a_footer_has_a_limit(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.parquet", [row(**{"n" * 5000: "x"})])
    monkeypatch.setattr(row_reader, "MAX_FOOTER_BYTES", 1000)
    with pytest.raises(UserError, match="is not a readable parquet file"):
        read(path)


def test_a_line_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(row_reader, "MAX_LINE_BYTES", 2000)
    path = write(tmp_path / "rows.jsonl", [row(), row("b" * 3000)])
    with pytest.raises(UserError, match=r"rows.jsonl line 2 has more than 0 MiB"):
        read(path)


def test_a_ground_truth_has_a_limit(tmp_path, monkeypatch):
    assert row_module.MAX_ANSWER_CHARACTERS < row_reader.MAX_LINE_BYTES
    monkeypatch.setattr(row_module, "MAX_ANSWER_CHARACTERS", 1000)
    path: Path = write(tmp_path / "rows.jsonl", [row(answer="7" * 1001)])
    with pytest.raises(UserError, match=r"line 1 has a `reward_model\.ground_truth` of 1,001 characters"):
        read(path)
