"""Elementwise work of a prefill on a CPU: few passes over memory, and the same numbers."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llama.model import RMSNorm, apply_rotary_emb


class Bytes(TorchDispatchMode):
    """Counts the bytes that operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
            self.n += sum(t.nbytes for t in tensors)
        return out


def per_element(function, n: int) -> float:
    with torch.inference_mode(), Bytes() as counted:
        function()
    return counted.n / n


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 21), (torch.bfloat16, 33)])
def test_a_norm_passes_over_memory_few_times(dtype: torch.dtype, most: int) -> None:
    """A failure means that norms pass over memory as often as ``F.rms_norm``'s formula does."""
    norm = RMSNorm(512, 1e-5).to(dtype)
    x = torch.randn(64, 512).to(dtype)
    assert per_element(lambda: norm(x), x.numel()) < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_gives_pytorchs_numbers(dtype: torch.dtype) -> None:
    """A failure means that a prompt's tokens are normed otherwise than a single one."""
    norm = RMSNorm(48, 1e-3).to(dtype)
    norm.weight.data.uniform_(-2, 2)
    x = torch.randn(7, 48).to(dtype) * torch.tensor([1e-3, 1, 30, 1, 1, 1e3, 0])[:, None].to(dtype)
    expected = F.rms_norm(x.double(), (48,), norm.weight.double(), 1e-3)
    rtol = 2e-6 if dtype == torch.float32 else 2**-8
    assert torch.allclose(norm(x).double(), expected, rtol=rtol, atol=1e-30)
    assert norm(x).dtype == norm(x[:1]).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_are_the_same_in_complex_and_in_real_numbers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that compiled steps rotate otherwise than a prefill."""
    x = torch.randn(5, 4, 8).to(dtype)[:, 1:]  # a part of joined heads
    angles = torch.rand(5, 4) * 100
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    in_complex = apply_rotary_emb(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    in_real = apply_rotary_emb(x, table)
    first, second = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    pairs = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    for out in (in_complex, in_real):
        assert out.dtype == dtype
        bound = 1e-5 if dtype == torch.float32 else 0.02
        assert (out.double() - pairs.flatten(-2)).abs().max() < bound


FAULTS = """
import resource, torch
from llama.checkpoint.memory import keep_freed
torch.set_num_threads(1)
keep_freed()
def faults_of_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.empty(16 << 20, dtype=torch.uint8).fill_(1) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults_of_step()
# Until malloc's cache of small pieces is full, those lie between the tensors and keep them apart:
# eight steps took new memory in a thread's arena.
print(min(faults_of_step() for _ in range(20)) / first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_passes_use_memory_that_earlier_ones_freed() -> None:
    """A failure means that the system clears each page that a layer writes: 2 µs for 4 kB."""
    # In a new process: a forked one copies pages that it writes.
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.5  # 1 without
