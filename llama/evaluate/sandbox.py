"""A program that runs another one, within limits and as far from the machine as the kernel allows.

``llama.evaluate.execution`` starts it, once for each program. It imports the standard library only,
since each start pays for its imports, and it runs on Linux only.

Two processes take part. The first one leaves the machine: it takes namespaces of its own, a file
system that holds nothing but Python, and no privileges. Then it forks, waits and reports. The
second one sets its limits and runs the program. Nothing that the program does reaches the first.
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules would hide those of the standard library

import ctypes
import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

NOBODY = 65534
_LIBC = ctypes.CDLL(None, use_errno=True)

# From linux/sched.h, linux/mount.h, linux/prctl.h and linux/capability.h.
_NEW_NAMESPACES = 0x20000 | 0x8000000 | 0x20000000 | 0x40000000  # mounts, IPC, processes, network
_NEW_USER = 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x1, 0x20, 0x1000, 0x4000, 1 << 18
_MS_SAFE = 0x2 | 0x4  # no setuid files, no devices
_AT_RECURSIVE, _AT_FDCWD = 0x8000, -100
_SYS_MOUNT_SETATTR = 442  # on all architectures; since Linux 5.12
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION_3 = 0x20080522

_SYSTEM = ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
_REPORT = 4096  # bytes of a report at most


def main() -> None:
    """Run the program of the job on the standard input; print the verdict."""
    job = json.load(sys.stdin)
    os.umask(0o022)
    wanted = job["cut_off"]  # None for as much as the kernel allows
    cut_off = [] if wanted == [] else leave_machine(job["disk"])
    if wanted and not set(wanted).issubset(cut_off):
        raise OSError(f"the kernel no longer cuts programs off from {' and '.join(wanted)}")
    if "files" not in cut_off:
        job["disk"] = 0  # files could be written, but not limited in their sum
    drop_privileges()
    print(json.dumps({"verdict": supervise(job), "cut_off": cut_off}))


def leave_machine(disk: int) -> list[str]:
    """Take namespaces, and a file system that holds nothing but Python.

    Args:
        disk: the bytes that fit into the working directory.

    Returns:
        What the process is cut off from: "network", and "files" unless the kernel is too old.
    """
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_NAMESPACES | (_NEW_USER if user else 0)) != 0:
        return []
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", user), ("gid_map", group)):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text if isinstance(text, str) else f"{text} {text} 1")
    # Everything read-only, and mounts from now on seen here alone.
    attributes = (ctypes.c_uint64 * 4)(_MS_RDONLY, 0, _MS_PRIVATE, 0)
    arguments = (_AT_FDCWD, b"/", _AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    if _LIBC.syscall(_SYS_MOUNT_SETATTR, *arguments) != 0:
        return ["network"]
    take_root(os.getcwd(), disk)
    return ["network", "files"]


def take_root(root: str, disk: int) -> None:
    """Make a directory the root of the file system, with Python in it and an empty directory.

    A process whose root was changed can't take namespaces either, nor mount anything in them.
    """
    python = [sys.prefix, sys.base_prefix]  # not sys.path, which may have folders of the user's
    python += os.environ.get("LD_LIBRARY_PATH", "").split(":")
    _mount("tmpfs", root, "tmpfs", _MS_SAFE, "mode=755")
    shown: list[str] = []
    for path in sorted({*_SYSTEM, *map(os.path.normpath, filter(os.path.isabs, python))}):
        if path == "/" or not os.path.exists(path) or path.startswith(tuple(shown)):
            continue
        if os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
            shown.append(f"{path}/")
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            open(root + path, "w").close()
        _mount(path, root + path, None, _MS_BIND | _MS_REC)
    os.mkdir(f"{root}/program")
    _mount(None, root, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_SAFE)
    _mount("tmpfs", f"{root}/program", "tmpfs", _MS_SAFE, f"size={disk},nr_inodes=1024,mode=1777")
    os.chroot(root)
    os.chdir("/program")


def drop_privileges() -> None:
    """Give up root and all capabilities for good, and hide from other processes' debuggers."""
    if os.getuid() == 0:
        os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _check(_LIBC.capset(header, none))
    _check(_LIBC.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_LIBC.prctl(_SET_DUMPABLE, 0, 0, 0, 0))
    _check(_LIBC.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def supervise(job: dict[str, Any]) -> str:
    """Run a program in a process of its own; return "passed", "timed out" or why it failed."""
    report, to_report = os.pipe()
    key_source, to_key_source = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(report)
        os.close(to_key_source)
        run(job, key_source, to_report)
    os.close(to_report)
    # Made behind the fork, so that it isn't in the program's memory.
    key = os.urandom(16).hex().encode()
    os.write(to_key_source, key)  # which waits there, whatever becomes of the program
    end = time.monotonic() + job["seconds"]
    text, is_whole = b"", False
    while len(text) < _REPORT and not is_whole and (left := end - time.monotonic()) > 0:
        if select.select([report], [], [], left)[0]:
            piece = os.read(report, _REPORT)
            text += piece
            is_whole = not piece
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if text == key:
        return "passed"
    if not is_whole or (code == -signal.SIGKILL and not text):
        return "timed out"
    if text:
        return f"failed: {text.decode(errors='replace')[:200]}"
    return f"failed: ended with status {code} before its tests were done"


def run(job: dict[str, Any], key_source: int, to_report: int) -> NoReturn:
    """Run a program within its limits; report the key behind it, or its error."""
    # Kept here, since the program may replace them where they are.
    read: Callable[[int, int], bytes] = os.read
    write, leave = os.write, os._exit
    try:
        os.setsid()  # out of the reach of kill(0)
        _check(_LIBC.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        try:
            set_limits(job)
            exec(compile(job["program"], "program.py", "exec"), {})
            text = read(key_source, 64)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}".encode(errors="replace")
        write(to_report, text[: _REPORT // 2])
    finally:
        leave(0)


def set_limits(job: dict[str, Any]) -> None:
    """Limit time, memory and files, and forbid new processes and threads."""
    seconds = int(job["seconds"]) + 2  # of the processor; the one who waits counts more exactly
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_FSIZE, job["disk"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        _, allowed = resource.getrlimit(kind)
        least = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
        resource.setrlimit(kind, (least, least))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    _check(_LIBC.mount(*texts, ctypes.c_ulong(flags), data.encode()))


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


if __name__ == "__main__":
    main()
