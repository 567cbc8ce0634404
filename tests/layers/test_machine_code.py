"""Compiled functions on disk: the next process has them without numba, and no others."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from llama.layers.kernels import machine_code
from llama.layers.kernels.openmp import by_rows

pytestmark = pytest.mark.usefixtures("needs_numba")

# Three kinds: of rows, with what raises errors in Python, and in OpenMP's team.
RUN = """
import sys, torch
from llama.layers.kernels import graphs, openmp
from llama.layers.kernels.compiled import attend, rms_norm
from llama.layers.kernels.machine_code import code, has_numba
from llama.layers.batch import RaggedBatch
from llama.layers.kv_cache import KVCache
torch.set_num_threads(2)
assert has_numba()
generator = torch.Generator().manual_seed(0)
x = torch.randn(40, 512, generator=generator).bfloat16()
print(rms_norm(x, torch.ones(512).bfloat16(), 1e-5).float().sum().item())
cache = KVCache((1, 2, 64, 64), torch.bfloat16, torch.device("cpu"), False, False)
for part in (cache.k, cache.v):
    part.normal_(generator=generator)
q = torch.randn(1, 8, 64, generator=generator).bfloat16()
batch = RaggedBatch(torch.tensor([0]), torch.tensor([40]), ())
print(attend(q, cache, batch).float().sum().item())
y, out = x.clone(), torch.zeros_like(x)
openmp.recording.calls = calls = []
graphs._by_rows(code("numba_tokens", "add"), out, x, y)
openmp.recording.calls = None
out.zero_()
graphs._Replay(calls)()
print(torch.equal(out, x + y))
print("numba" in sys.modules)
"""


def run(cache: Path) -> list[str]:
    """Run all in a process of its own, and return what it prints; "numba" is its last line."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_next_process_needs_no_numba(tmp_path: Path) -> None:
    """A failure means that each start compiles for seconds, or computes something else."""
    first, second = run(tmp_path), run(tmp_path)
    assert first[2:] == ["True", "True"]
    assert second == [*first[:3], "False"]
    [folder] = (tmp_path / "llama" / "code").iterdir()
    assert len(list(folder.iterdir())) == 4  # and no temporary ones
    assert folder.stat().st_mode & 0o077 == 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache, in which no code lies yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine_code._folder.cache_clear()
    yield tmp_path
    machine_code._folder.cache_clear()


def is_compiled(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether a function is compiled, rather than read from the cache; it works."""
    imported: list[str] = []

    def import_module(name: str) -> ModuleType:
        imported.append(name)
        return importlib.import_module(name)

    with monkeypatch.context() as patch:
        patch.setattr(machine_code, "importlib", SimpleNamespace(import_module=import_module))
        function = machine_code.code.__wrapped__("numba_tokens", "add")
    x = torch.arange(2048).view(4, 512).bfloat16()
    out = torch.zeros_like(x)
    by_rows(function, len(x), x.data_ptr(), x.data_ptr(), out.data_ptr(), *x.shape)
    assert torch.equal(out, x + x)
    return bool(imported)


def test_code_that_was_harmed_is_compiled_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that code is run which isn't whole, or which others could have written."""
    assert is_compiled(monkeypatch)
    folder = machine_code._folder()
    [path] = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert is_compiled(monkeypatch)
    assert not is_compiled(monkeypatch)
    for place in (folder.parent, path):
        mode = place.stat().st_mode
        place.chmod(0o777)
        assert is_compiled(monkeypatch)
        place.chmod(mode)
    assert not is_compiled(monkeypatch)


def test_another_settings_code_is_anothers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that a setting has no effect, or that old code is kept for ever."""
    assert is_compiled(monkeypatch)
    folder = machine_code._folder()
    os.utime(folder, (0, 0))
    machine_code._folder.cache_clear()
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    assert machine_code._folder() == folder  # each job has its own
    machine_code._folder.cache_clear()
    monkeypatch.setenv("NUMBA_OPT", "1")
    assert machine_code._folder() != folder
    assert is_compiled(monkeypatch)
    assert list(folder.parent.iterdir()) == [machine_code._folder()]


def test_code_is_kept_whatever_mask_files_have(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that users whose files their group may write compile at each start."""
    mask = os.umask(0o002)
    try:
        assert is_compiled(monkeypatch)
        assert not is_compiled(monkeypatch)
    finally:
        os.umask(mask)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "llama" / "code" / "folder" / "file"
    path.parent.mkdir(parents=True)
    for place in (path.parents[2], path.parents[1], path.parent):
        place.chmod(0o700)
    path.write_bytes(b"code")
    path.chmod(0o600)
    assert machine_code._read(path) == b"code"
    path.rename(path.with_name("other"))
    path.symlink_to("other")
    with pytest.raises(OSError, match="symbolic links"):
        machine_code._read(path)


def test_without_a_place_for_it_code_is_compiled(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that a user without a home can't load a model."""
    (cache / "llama").write_text("a file")
    assert machine_code.has_numba.__wrapped__()
    assert is_compiled(monkeypatch)
    assert is_compiled(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "relative")
    machine_code._folder.cache_clear()
    assert machine_code.has_numba.__wrapped__()
    assert is_compiled(monkeypatch)
    assert not Path("relative").exists()


@pytest.mark.parametrize(
    ("name", "is_there"), [("sqrtf", True), ("numba_do_raise", True), ("no_such_function", False)]
)
def test_code_that_calls_what_is_missing_is_not_loaded(name: str, is_there: bool) -> None:
    """LLVM would end the process."""
    if is_there:
        machine_code._provide([name])
    else:
        with pytest.raises(KeyError, match=name):
            machine_code._provide([name])


def test_a_cache_that_cannot_be_looked_into_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that such a user, as in many a container, can't load a model."""

    def refuse(self: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    machine_code._folder()
    monkeypatch.setattr(Path, "stat", refuse)
    machine_code.has_numba.cache_clear()
    assert machine_code.has_numba()


def test_a_function_is_one_for_the_process() -> None:
    assert machine_code.code("numba_tokens", "add") is machine_code.code("numba_tokens", "add")
