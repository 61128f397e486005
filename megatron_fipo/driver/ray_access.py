"""Who reaches the Ray cluster that a run starts: processes of this machine alone, and of those the ones that have its token."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from megatron_fipo.network import LOOPBACK
from megatron_fipo.secrecy import write_private

OPTIONS = {"_node_ip_address": LOOPBACK}
"""Options of `ray.init`. Ray's servers then listen on this address."""
VARIABLES = {
    # Else Ray replaces 127.0.0.1 by the address of another interface. (On Linux only this variable changes that.)
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Nothing reads Ray's own metrics, which a server without authentication would export.
    "RAY_enable_metrics_collection": "0",
}
"""Environment variables of all processes of Ray."""
TOKEN_FILE = "token"
_TOKEN = secrets.token_hex(32)
"""One per process, because Ray keeps the first that it reads."""


@contextlib.contextmanager
def own_token(folder: Path) -> Iterator[None]:
    """Ray processes that start within the context know each other by a token in `folder`, which only this user can read.

    RAY_AUTH_MODE=disabled turns that off.
    """
    path = folder / TOKEN_FILE
    write_private(path, _TOKEN)
    before = {name: os.environ.pop(name, None) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")}
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_TOKEN_PATH"]
        os.environ |= {name: value for name, value in before.items() if value is not None}
        path.unlink(missing_ok=True)


def need_any_token() -> None:
    """Have a token for a cluster that is joined: Ray needs one even if the cluster has no authentication and ignores it."""
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not named and not Path("~/.ray/auth_token").expanduser().exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextlib.contextmanager
def loopback_as_written() -> Iterator[None]:
    """`ray.init` connects to 127.0.0.1 as it is written: `VARIABLES` for a process that has imported Ray."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
