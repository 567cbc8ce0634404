"""AMX's instructions as functions, so that the code which uses them runs on other processors."""

# mypy: ignore-errors

import ctypes
import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from llvmlite import ir

from llama.layers.kernels import compiled, machine_code, tiles
from llama.layers.kernels.numba_code import (
    FLOAT,
    I64,
    Vectors,
    bfloat16,
    pointer,
    thread_number,
)

_REGISTERS, _BYTES, _CONFIG, _THREADS = 8, 16 * 64, 64, 16
_SIZE = _CONFIG + _REGISTERS * _BYTES
_memory = ctypes.create_string_buffer(_THREADS * _SIZE)
_START = ctypes.addressof(_memory)


@numba.njit
def _rows(register):
    """Return how many rows a register has, as this thread has configured it."""
    config = numba.carray(pointer(_START + thread_number() * _SIZE), (_CONFIG,), np.uint8)
    return config[48 + register]


@numba.njit
def _place(register):
    return _START + thread_number() * _SIZE + _CONFIG + register * _BYTES


def _function(n_arguments):
    return numba.cfunc(numba.void(*[numba.int64] * n_arguments))


@_function(1)
def _configure(place):
    given = numba.carray(pointer(place), (_CONFIG,), np.uint8)
    config = numba.carray(pointer(_START + thread_number() * _SIZE), (_CONFIG,), np.uint8)
    config[:] = given


@_function(1)
def _keep(place):
    config = numba.carray(pointer(_START + thread_number() * _SIZE), (_CONFIG,), np.uint8)
    numba.carray(pointer(place), (_CONFIG,), np.uint8)[:] = config


@_function(1)
def _clear(register):
    numba.carray(pointer(_place(register)), (_BYTES,), np.uint8)[:] = 0


@_function(3)
def _load(register, place, pitch):
    own = numba.carray(pointer(_place(register)), (16, 64), np.uint8)
    for row in range(_rows(register)):
        own[row] = numba.carray(pointer(place + row * pitch), (64,), np.uint8)


@_function(3)
def _store(register, place, pitch):
    own = numba.carray(pointer(_place(register)), (16, 64), np.uint8)
    for row in range(_rows(register)):
        numba.carray(pointer(place + row * pitch), (64,), np.uint8)[:] = own[row]


@_function(3)
def _multiply_halves(total, first, second):
    sums = numba.carray(pointer(_place(total)), (16, 16), FLOAT)
    x = numba.carray(pointer(_place(first)), (16, 16, 2), np.uint16)
    w = numba.carray(pointer(_place(second)), (16, 16, 2), np.uint16)
    for row in range(_rows(total)):
        for k in range(16):
            for output in range(16):
                for i in range(2):
                    sums[row, output] += bfloat16(x[row, k, i]) * bfloat16(w[k, output, i])


@_function(3)
def _multiply_bytes(total, first, second):
    sums = numba.carray(pointer(_place(total)), (16, 16), np.int32)
    x = numba.carray(pointer(_place(first)), (16, 16, 4), np.uint8)
    w = numba.carray(pointer(_place(second)), (16, 16, 4), np.int8)
    for row in range(_rows(total)):
        for k in range(16):
            for output in range(16):
                for i in range(4):
                    sums[row, output] += np.int32(x[row, k, i]) * np.int32(w[k, output, i])


_INSTRUCTIONS = {
    "x86.ldtilecfg": _configure,
    "x86.sttilecfg": _keep,
    "x86.tilezero": _clear,
    "x86.tileloadd64": _load,
    "x86.tileloaddt164": _load,
    "x86.tilestored64": _store,
    "x86.tdpbf16ps": _multiply_halves,
    "x86.tdpbusd": _multiply_bytes,
}
_call = Vectors.call


def _call_fake(self, name, result, *args):
    if name not in _INSTRUCTIONS:
        return _call(self, name, result, *args)
    build = self.build
    numbers = [
        build.ptrtoint(arg, I64)
        if isinstance(arg.type, ir.PointerType)
        else arg
        if arg.type == I64
        else build.zext(arg, I64)
        for arg in args
    ]
    kind = ir.FunctionType(ir.VoidType(), [I64] * len(numbers))
    function = build.inttoptr(I64(_INSTRUCTIONS[name].address), kind.as_pointer())
    return build.call(function, numbers)


@functools.cache
def _compiled(module, function, *arguments):
    return getattr(importlib.import_module(module), function)(*arguments)


class _Module:
    """A module whose functions compile what has these instructions, once for all tests."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, function):
        return functools.partial(_compiled, self._name, function)


def _missing(path):
    raise FileNotFoundError(path)


@contextmanager
def processor() -> Iterator[None]:
    """Have a processor with AMX, whose code isn't kept for other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Vectors, "call", _call_fake)
        patch.setattr(machine_code, "importlib", SimpleNamespace(import_module=_Module))
        patch.setattr(machine_code, "_load", _missing)
        patch.setattr(machine_code, "_store", lambda path, made: None)
        for module in (compiled, tiles):
            patch.setattr(module, "HAS_AMX", True)
        machine_code.code.cache_clear()
        try:
            yield
        finally:
            machine_code.code.cache_clear()
