"""What the process of an answer may do: compute, take memory up to a limit, start some threads, and use its open files.

A seccomp filter allows the system calls for this and refuses all others. So the answer cannot open, list or change files,
start processes, connect to anything, or send signals. It needs neither privileges nor namespaces. The filter's numbers are
those of `asm/unistd_64.h` (x86_64) and `asm-generic/unistd.h` (aarch64).
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct

MAX_THREADS = 64
OPEN_FILES = 16
PRIVATE_USERS = 2**30
"""User ids from here on belong to no account; `PRIVATE_USERS + process id` is that of the answers of one sandbox."""
NOBODY = 65534

_SYSTEM_CALLS = {
    "x86_64": (0xC000003E, 0),
    "aarch64": (0xC00000B7, 1),
}
"""The audit architecture, and the position of the number in the tables below."""
_ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "uname": (63, 160),
    "getrandom": (318, 278),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "setrlimit": (160, 164),
    "setitimer": (38, 103),
    "alarm": (37, None),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
_CLONE, _CLONE3, _FCNTL, _PRLIMIT, _FSTATAT = (56, 220), (435, 435), (72, 25), (302, 261), (262, 79)
_THREAD_FLAGS = (0x3D0F00, 0x7D0F00)
"""Of `clone` for a thread, by glibc and musl. Any other flags would start a process."""
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
"""Duplicating, and flags: not the owner, to whom the kernel would send signals."""
_AT_EMPTY_PATH = 0x1000

_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _HAS_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER_MODE = 1, 22, 38, 2


def supported() -> bool:
    """Whether there is a filter for this processor."""
    return platform.system() == "Linux" and platform.machine() in _SYSTEM_CALLS


class Lockdown:
    """Prepared once, applied by each process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        code = _filter(*_SYSTEM_CALLS[platform.machine()])
        self._code = ctypes.create_string_buffer(code, len(code))

        class Program(ctypes.Structure):
            _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_void_p))

        self._program = Program(len(code) // 8, ctypes.addressof(self._code))
        self._users = (PRIVATE_USERS + os.getpid(), NOBODY) if os.geteuid() == 0 else ()
        self._base_memory = _virtual_memory()

    def apply(self, *, memory_bytes: int, cpu_s: int, threads: int) -> None:
        """Limit this process for the rest of its life. Raises OSError if the kernel refuses a part.

        Its memory is `memory_bytes` beyond what this object saw when it was made; `threads` is that of the user.
        """
        for kind, limit in (
            (resource.RLIMIT_AS, self._base_memory + memory_bytes),
            (resource.RLIMIT_CPU, cpu_s),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_NOFILE, OPEN_FILES),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NPROC, threads),
        ):
            hard = resource.getrlimit(kind)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (limit, limit))
        os.setsid()
        self._change_user()
        self._control(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self._control(_PR_SET_NO_NEW_PRIVS, 1)
        self._control(_PR_SET_SECCOMP, _FILTER_MODE, ctypes.addressof(self._program))

    def end_with_parent(self) -> None:
        """Let the kernel end this process when its parent ends."""
        self._control(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def thread_limit(self) -> int:
        """RLIMIT_NPROC for an answer: it counts all threads of the user, of which an answer that is not root's own has others."""
        return MAX_THREADS if self._users else MAX_THREADS + 2 * _threads_of(os.getuid())

    def _change_user(self) -> None:
        """Root becomes a user without files and other processes, or nobody. The root of a container may have neither, and is
        then a usual user outside it.
        """
        for user in self._users:
            with contextlib.suppress(OSError):
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                return

    def _control(self, option: int, *arguments: int) -> None:
        values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
        if self._library.prctl(option, *values):
            raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def _filter(architecture: int, column: int) -> bytes:
    """The program of the filter: `struct sock_filter` one after the other."""
    refuse = _REFUSE | errno.EACCES
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for numbers in _ALLOWED.values():
        if (allowed := numbers[column]) is not None:
            code += [(_EQUAL, 0, 1, allowed), (_RETURN, 0, 0, _ALLOW)]
    # glibc then uses clone, whose flags can be read
    code += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]
    for number, argument, test, values in (
        (_CLONE[column], 0, _EQUAL, _THREAD_FLAGS),
        (_FCNTL[column], 1, _EQUAL, _FCNTL_COMMANDS),
        (_PRLIMIT[column], 0, _EQUAL, (0,)),
        (_FSTATAT[column], 3, _HAS_BITS, (_AT_EMPTY_PATH,)),
    ):
        tests = [step for value in values for step in ((test, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
        block = [(_LOAD, 0, 0, 16 + 8 * argument), *tests, (_RETURN, 0, 0, refuse)]
        code += [(_EQUAL, 0, len(block), number), *block]
    code.append((_RETURN, 0, 0, refuse))
    return b"".join(struct.pack("HBBI", *step) for step in code)


def _virtual_memory() -> int:
    """Bytes of address space of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _threads_of(user: int) -> int:
    """Threads of all processes of a user."""
    count = 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == user:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count
