"""How secrets are told from values that may be stored, printed and written into scripts. Standard library only."""

import os
import re
from pathlib import Path

_NAME = re.compile(
    r"(^|_)(API_?KEY|KEYS?|AUTH|TOKENS?|SECRETS?|PASS(WORD|WD|PHRASE)?|CREDENTIALS?)($|_)", re.IGNORECASE
)
_URL_USER = re.compile(r"://[^/\s@]+@")


def is_secret(name: str) -> bool:
    """Whether a variable of this name probably holds a password or token."""
    return _NAME.search(name) is not None


def has_password(text: str) -> bool:
    """Whether a text has a URL with a user, which may be a token, or a password."""
    return _URL_USER.search(text) is not None


def write_private(path: Path, secret: str) -> None:
    """Write a new file that only its owner can read. Raises OSError."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(secret)


def hide_passwords(text: str) -> str:
    """The text without users and passwords in URLs."""
    return _URL_USER.sub("://(hidden)@", text)
