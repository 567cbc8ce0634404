"""Compiled functions on disk: the next process has them without numba, and no others."""

import os
import subprocess
import sys
from pathlib import Path

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


def run(cache: Path, code: str = RUN, **more: str) -> list[str]:
    """Run all in a process of its own, and return what it prints; "numba" is its last line."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "2", **more}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
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
    # Code that isn't whole, and code that others could have written, is compiled again.
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert run(tmp_path) == first
    assert run(tmp_path) == second
    for place in (folder.parent, next(folder.iterdir())):
        mode = place.stat().st_mode
        place.chmod(0o777)
        assert run(tmp_path) == first
        place.chmod(mode)
    # Another setting's is another's; what is old goes then.
    os.utime(folder, (0, 0))
    assert run(tmp_path, NUMBA_OPT="1", NUMBA_NUM_THREADS="1")[2:] == first[2:]
    [other] = folder.parent.iterdir()
    assert other.name != folder.name


def test_code_is_kept_whatever_mask_files_have(tmp_path: Path) -> None:
    """A failure means that users whose files their group may write compile at each start."""
    code = "import os; os.umask(0o002)\n" + RUN
    assert run(tmp_path, code)[-1] == "True"
    assert run(tmp_path, code)[-1] == "False"


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


def test_without_a_place_for_it_code_is_compiled(tmp_path: Path) -> None:
    """A failure means that a user without a home can't load a model."""
    (tmp_path / "llama").write_text("a file")
    assert run(tmp_path)[2:] == ["True", "True"]
    assert run(Path(), HOME="relative")[2:] == ["True", "True"]
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

    monkeypatch.setattr(Path, "stat", refuse)
    machine_code.has_numba.cache_clear()
    assert machine_code.has_numba()


def test_a_function_is_one_for_the_process() -> None:
    code = machine_code.code("numba_tokens", "to_float32")
    assert machine_code.code("numba_tokens", "to_float32") is code
    x = torch.arange(2048).view(4, 512).bfloat16()
    out = torch.zeros(4, 512)
    by_rows(code, len(x), x.data_ptr(), out.data_ptr(), *x.shape)
    assert torch.equal(out, x.float())
