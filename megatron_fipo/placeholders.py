"""Files that a download or a clone left in the place of other files: Git LFS pointers and web pages."""

from pathlib import Path

from megatron_fipo.errors import UserError

HEAD_BYTES = 256
_SIGNATURES = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file; run `git lfs pull`"),
    *(
        (start, "is a web page or XML, not the file; download the file itself")
        for start in (b"<!doctype html", b"<html", b"<?xml")
    ),
)
"""First bytes of such a file in lower case, after a UTF-8 byte order mark and blanks, and what to do."""


def placeholder(head: bytes) -> str | None:
    """What the file with these first bytes is instead of its name's content, and the fix, or None."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((advice for signature, advice in _SIGNATURES if start.startswith(signature)), None)


def refuse_placeholder(path: Path) -> None:
    """UserError if `path` is a Git LFS pointer or a web page. A file that cannot be read passes."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return
    if advice := placeholder(head):
        raise UserError(f"{path} {advice}")
