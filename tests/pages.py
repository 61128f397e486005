"""The Python code and the commands of documentation pages, executed as printed, so that a page and its tests cannot differ."""

import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def code_blocks(page: str) -> list[str]:
    """The Python blocks of docs/`page`, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


def run_blocks(page: str, *blocks: int) -> dict[str, Any]:
    """Execute these blocks of a page, or all, in one namespace. Returns the names they define."""
    code = code_blocks(page)
    names: dict[str, Any] = {"__name__": page}
    for index in blocks or range(len(code)):
        exec(compile(code[index], f"{page}, block {index}", "exec"), names)
    return names


def shown_commands(text: str, command: str) -> list[list[str]]:
    """The arguments of every `megatron-fipo COMMAND EXAMPLE ...` in a page or in the comments of a YAML file, in order.

    EXAMPLE is a file of this repository; commands with a placeholder in its place are left out. A command may continue on
    the next line after a backslash.
    """
    joined = re.sub(r"\\\n#? *", " ", text)
    found = [
        shlex.split(line, comments=True) for line in re.findall(rf"megatron-fipo {command} ([^`\n]+)", joined)
    ]
    return [words for words in found if words and (ROOT / words[0]).is_file()]
