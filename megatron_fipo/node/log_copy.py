"""Copies Ray's logs from a node's local disk to the log folder while they grow, so that a lost node's logs stay."""

from pathlib import Path

CHUNK = 2**20


class LogCopy:
    """Appends what is new in the files below `source` to files of the same names below `target`."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source = source
        self._target = target
        self._copied: dict[Path, int] = {}
        """Bytes by path relative to `source`."""

    def sync(self) -> None:
        """Copy what was appended since the last call. Raises OSError if the target cannot be written."""
        for path in sorted(self._source.glob("**/*")):
            if path.is_file() and not path.is_symlink():
                self._append(path.relative_to(self._source))

    def _append(self, name: Path) -> None:
        done = self._copied.get(name, 0)
        try:
            size = (self._source / name).stat().st_size
            if size < done:  # Ray began the file again
                done = 0
            if size == done and name in self._copied:
                return
            source = (self._source / name).open("rb")
        except FileNotFoundError:
            return
        target = self._target / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with source, target.open("ab" if done else "wb") as copy:
            source.seek(done)
            while chunk := source.read(CHUNK):
                copy.write(chunk)
                done += len(chunk)
        self._copied[name] = done
