"""Where Ray keeps its files on this machine, checked before it starts: sockets and logs in a folder, objects in /dev/shm."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_fipo.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
DEFAULT_BASE = "/tmp"
VARIABLES = ("RAY_TMPDIR", "TMPDIR")
"""The folder for temporary files, the first one that is set. Ray itself looks at these."""
PREFIX = "fipo-"
RAY_FOLDER = "ray"
"""In the private folder, because Ray lets all users write to its own."""
LONGEST_BASE = 107 - len("/fipo-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes. The paths of Unix sockets have at most 107."""
LONGEST_WORKER_BASE = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes of TMPDIR in ranks and engines."""
MIN_FREE_BYTES = 64 * 2**20
"""For sockets, logs and what Ray writes when it starts."""
MAX_STORE_OUTSIDE_BYTES = 10**10
"""Ray refuses to keep a larger object store in files."""


def make_session_folder(environment: Mapping[str, str], log: Callable[[str], None]) -> Path:
    """A new private folder for the files of a Ray cluster, in TMPDIR, or in /tmp if the name of that is too long for sockets.

    Raises `UserError` if there is none.
    """
    variable = next((name for name in VARIABLES if environment.get(name)), None)
    base = os.path.abspath(environment[variable]) if variable else DEFAULT_BASE
    named = f"{variable}={base}" if variable else base
    if variable and not os.path.isdir(base):
        raise UserError(f"{named} is not a folder; create it, or unset {variable}")
    if variable and not usable_for_sockets(base):
        log(
            f"{named} {'contains a space' if ' ' in base else f'is longer than the {LONGEST_BASE} characters that sockets allow'}, "
            f"so Ray's files are in {DEFAULT_BASE}"
        )
        variable, base, named = None, DEFAULT_BASE, DEFAULT_BASE
    fix = (
        f"fix {variable}"
        if variable
        else f"set TMPDIR to another folder, of at most {LONGEST_BASE} characters"
    )
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    except OSError as error:
        raise UserError(
            f"Ray cannot keep its files in {named}: {error.strerror}; make it writable, or {fix}"
        ) from None
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        folder.rmdir()
        raise UserError(
            f"{named} has {free // 2**20} MB of free space, and Ray needs {MIN_FREE_BYTES // 2**20} MB for sockets and logs; "
            f"free some, or {fix}"
        )
    return folder


def worker_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of ranks and engines: multiprocessing, which writes checkpoints, has its sockets in TMPDIR as well."""
    base = environment.get("TMPDIR", "")
    return (
        {"TMPDIR": DEFAULT_BASE}
        if len(os.fsencode(os.path.abspath(base))) > LONGEST_WORKER_BASE and base
        else {}
    )


def usable_for_sockets(base: str) -> bool:
    """Ray passes paths to its workers on a command line that it splits at spaces."""
    return len(os.fsencode(base)) <= LONGEST_BASE and not any(character.isspace() for character in base)


def remove_session_folder(folder: Path, *, keep_logs: bool) -> None:
    """Remove it, with `keep_logs` except for the logs of Ray's processes, which a message refers to."""
    for path in folder.glob(f"{RAY_FOLDER}/session_*/*" if keep_logs else "*"):
        if keep_logs and path.name == "logs":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if not keep_logs:
        shutil.rmtree(folder, ignore_errors=True)


def check_shared_memory(
    store_bytes: int, log: Callable[[str], None], shared_memory: Path = SHARED_MEMORY
) -> None:
    """Raises `UserError` if /dev/shm cannot be used; logs once if it is too small, so that Ray keeps objects in files.

    Ray, checkpoint writers and engines need it.
    """
    fix = "mount a tmpfs there (containers: --shm-size or --ipc=host)"
    try:
        with tempfile.TemporaryFile(dir=shared_memory):
            free = shutil.disk_usage(shared_memory).free
    except OSError as error:
        raise UserError(
            f"{shared_memory} cannot be written ({error.strerror}), but processes of a run share memory through it; {fix}"
        ) from None
    if free >= store_bytes:
        return
    too_small = f"{shared_memory} has {free / 2**30:.2f} GiB of free space, but Ray's object store needs {store_bytes / 2**30:.2f} GiB"
    if store_bytes > MAX_STORE_OUTSIDE_BYTES:
        raise UserError(f"{too_small}; enlarge it (containers: --shm-size)")
    log(f"{too_small}, so Ray keeps objects in slower files; enlarge it (containers: --shm-size)")
