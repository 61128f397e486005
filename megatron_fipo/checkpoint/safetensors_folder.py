"""Reading a Hugging Face folder of safetensors, one slice at a time."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_fipo.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class SafetensorsFolder:
    """The tensors of a folder by name: one `model.safetensors`, or shards with an index. A context manager.

    UserError for a missing folder, index, shard or tensor, and for a file that is not readable safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._stack = ExitStack()
        if not self.folder.is_dir():
            raise UserError(f"model folder {self.folder} does not exist")
        self._files = self._read_index()
        missing = sorted({name for name in self._files.values() if not (self.folder / name).is_file()})
        if missing:
            raise UserError(f"model folder {self.folder} lacks {listing(missing)}, which its index names; copy it again")
        try:
            self._handles = {name: self._open(name) for name in sorted(set(self._files.values()))}
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        """Names of all tensors, as the index (or the single file) lists them."""
        return set(self._files)

    def slice(self, name: str) -> Any:
        """A lazily read tensor: `get_shape()`, and indexing with slices reads just those elements."""
        try:
            return self._handles[self._files[name]].get_slice(name)
        except SafetensorError:
            raise UserError(f"{self.folder / self._files[name]} does not hold {name}, though the index says so") from None

    def _read_index(self) -> dict[str, str]:
        index = self.folder / INDEX_NAME
        if index.is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{index} is not a readable index of safetensors: {error!r}") from None
        if not (self.folder / SINGLE_NAME).is_file():
            raise UserError(f"model folder {self.folder} has neither {INDEX_NAME} nor {SINGLE_NAME}; only safetensors are read")
        with self._stack:
            names = list(self._open(SINGLE_NAME).keys())
        return dict.fromkeys(names, SINGLE_NAME)

    def _open(self, name: str) -> Any:
        try:
            return self._stack.enter_context(safe_open(self.folder / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / name} is not a readable safetensors file (damaged or cut short?): {error}") from None


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Names for an error message: all of them, or the first and how many more."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
