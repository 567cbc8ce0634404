"""Functions that numba has compiled, in memory and on disk.

Compiling those of a model takes some seconds, most of which numba spends in Python. So their
machine code is kept in the user's cache, for the same sources, versions and processor; then numba
isn't even imported.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama.layers.kernels.openmp import openmp

_OLD = 90 * 24 * 3600  # seconds
_OF_OPENMP = {
    "llama_thread_number": "omp_get_thread_num",
    "llama_thread_count": "omp_get_num_threads",
    "llama_barrier": "GOMP_barrier",
}
_EXTERNAL = re.compile(r'^(?:declare [^@]*@"?([\w.$]+)|@"?([\w.$]+)"? = external)', re.MULTILINE)


class Code(NamedTuple):
    """A function of a pointer: its address, a way to call it, and who owns its code."""

    address: int
    call: Any
    owner: object

    @staticmethod
    def at(address: int, owner: object) -> "Code":
        return Code(address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address), owner)


@functools.cache
def has_numba() -> bool:
    """Return whether there is code for this machine: numba, AVX2, and PyTorch's own OpenMP."""
    has_avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if not has_avx2 or not openmp() or importlib.util.find_spec("numba") is None:
        return False
    try:
        if not os.path.isdir(_folder()):  # also where it can't be looked for
            importlib.import_module(f"{__package__}.numba_code")
    except ImportError:  # it doesn't go with another package
        return False
    return True


@functools.cache
def code(module: str, function: str, *arguments: object) -> Code:
    """Return what a function of a module of this package compiles, given some arguments."""
    name = hashlib.sha256(repr((module, function, arguments)).encode()).hexdigest()[:32]
    path = _folder() / name
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _load(path)
    made = getattr(importlib.import_module(f"{__package__}.{module}"), function)(*arguments)
    with contextlib.suppress(OSError, AttributeError):
        _store(path, made)
    return Code.at(made.address, made)


@functools.cache
def add_symbols() -> None:
    """Let compiled code find the functions of PyTorch's OpenMP."""
    from llvmlite import binding

    for name, function in _OF_OPENMP.items():
        address = ctypes.cast(getattr(openmp(), function), ctypes.c_void_p).value
        binding.add_symbol(name, address)


@functools.cache
def _folder() -> Path:
    """Return where code is kept for these sources and versions, and this processor."""
    from llvmlite import binding

    from llama.layers.kernels import compiled

    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("numba_*.py")):
        digest.update(source.read_bytes())
    unlike = ("NUMBA_CACHE_DIR", "NUMBA_DEBUG_CACHE", "NUMBA_NUM_THREADS")  # jobs have their own
    settings = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("NUMBA_") and name not in unlike
    }
    others = (
        sys.version,
        *(metadata.version(package) for package in ("numba", "llvmlite", "numpy")),
        *(binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()),
        *(compiled.BLOCK, compiled.HAS_AMX, compiled.HAS_BF16, compiled.HAS_VNNI, compiled.KEYS),
        *(compiled.LANES, compiled.ROWS, compiled.SPAN, compiled.TILE, compiled.TOKENS),
        sorted(settings.items()),
    )
    digest.update(repr(others).encode())
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(cache):  # there is no home
        cache = os.devnull
    return Path(cache) / "llama" / "code" / digest.hexdigest()[:32]


def _load(path: Path) -> Code:
    """Return the code that a file holds.

    Raises:
        OSError: there is no such file, or somebody else can write it.
        ValueError: it isn't whole.
        KeyError: it calls what isn't there.
    """
    from llvmlite import binding

    head, _, machine_code = _read(path).partition(b"\n")
    about = json.loads(head)
    if about["sha256"] != hashlib.sha256(machine_code).hexdigest():
        raise ValueError(f"{path} isn't whole")
    _provide(about["calls"])
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    return Code.at(engine.get_function_address(about["function"]), engine)


def _read(path: Path) -> bytes:
    """Return what a file holds, if it and its folders below the cache are this user's alone.

    Each is opened in the one above, which nobody else can change.
    """
    place = os.open(path.parents[3], os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in path.parts[-4:]:
            kind = 0 if name == path.name else os.O_DIRECTORY
            above, place = place, os.open(name, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=place)
            os.close(above)
            status = os.fstat(place)
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise PermissionError(f"{name} of {path} isn't this user's alone")
        with open(place, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(place)


def _provide(names: Iterable[str]) -> None:
    """Let code find what it calls.

    Numba's own functions raise errors, which this code doesn't do, and count references to arrays,
    of which it makes none. Where numba isn't imported they are another one, until it defines them.

    Raises:
        KeyError: something isn't there.
    """
    from llvmlite import binding

    add_symbols()
    nothing = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value
    for name in names:
        if name.startswith(("numba_", "NRT_")):
            if not binding.address_of_symbol(name):
                binding.add_symbol(name, nothing)
        elif name not in _OF_OPENMP and not hasattr(ctypes.pythonapi, name):
            raise KeyError(name)


def _store(path: Path, made: Any) -> None:
    """Keep a compiled function."""
    calls = {one or other for one, other in _EXTERNAL.findall(made.inspect_llvm())}
    _, _, (machine_code, _) = made._library.serialize_using_object_code()
    about = {
        "function": made._wrapper_name,
        "calls": sorted(name for name in calls if not name.startswith("llvm.")),
        "sha256": hashlib.sha256(machine_code).hexdigest(),
    }
    path.parents[3].mkdir(parents=True, exist_ok=True)
    for folder in (path.parents[2], path.parents[1]):
        folder.mkdir(mode=0o700, exist_ok=True)
    if not path.parent.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        for other in path.parents[1].iterdir():  # of versions that were replaced
            if time.time() - other.stat().st_mtime > _OLD:
                shutil.rmtree(other, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        whole = Path(directory) / path.name
        whole.write_bytes(json.dumps(about).encode() + b"\n" + machine_code)
        whole.chmod(0o600)
        whole.replace(path)  # which other processes see all at once
