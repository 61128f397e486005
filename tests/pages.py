"""The Python code of documentation pages, executed as printed, so that a page and its tests cannot differ."""

import re
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
