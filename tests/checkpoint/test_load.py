"""Loading: dtypes, mapped memory, and networks that don't fit."""

import resource
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from processes import forked

from llama import Llama, ModelArgs
from llama.checkpoint import load as load_module
from llama.checkpoint import memory
from llama.checkpoint.rounding import make_scheme
from llama.checkpoint.save import save
from llama.checkpoint.sharding import full_shapes
from llama.generation import TINY
from llama.layers.capability import Capability


def build(path: Path, **more: object) -> Llama:
    return Llama.build(path, max_seq_len=64, max_batch_size=2, device="cpu", **more)


def test_weights_stay_mapped_and_in_their_dtype(checkpoint_dir) -> None:
    path = checkpoint_dir(torch.float32)
    llama = build(path)
    assert llama.model.output.weight.dtype == torch.float32
    assert llama.model.layers[0].attention.cache.k.dtype == torch.float32
    maps = Path("/proc/self/maps")
    if maps.exists():
        address = llama.model.output.weight.data_ptr()
        ranges = [line.split() for line in maps.read_text().splitlines() if str(path) in line]
        bounds = [[int(x, 16) for x in r[0].split("-")] for r in ranges]
        assert any(low <= address < high for low, high in bounds)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_converted(checkpoint_dir, stored: torch.dtype, wanted: torch.dtype) -> None:
    path = checkpoint_dir(stored)
    llama = build(path, dtype=wanted)
    original = torch.load(path / "consolidated.00.pth")
    found = llama.model.state_dict()
    assert found.keys() == original.keys()
    for name, weight in found.items():
        assert weight.dtype == wanted
        assert torch.equal(weight, original[name].to(wanted)), name
    assert llama.model.layers[0].attention.cache.v.dtype == wanted
    assert len(llama.generate([[1, 2]], 3)[0]) == 1


MEMORY = """
import sys, torch
from llama import Llama
from llama.checkpoint.sharding import weight_bytes
from llama.layers.kernels.machine_code import has_numba
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
if has_numba():
    from llama.layers.kernels import numba_rounding
    numba_rounding.round_inputs(True)  # a compiler takes as much whatever the weights' size
before = peak()
llama = Llama.build(sys.argv[1], max_seq_len=64, device="cpu", dtype=torch.bfloat16)
needed = weight_bytes(llama.model.params, torch.bfloat16)
print((peak() - before) / needed)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("stored", "shards"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_mapped_pages_are_released_while_loading(
    tmp_path: Path, stored: torch.dtype, shards: int
) -> None:
    args = ModelArgs(**{**SMALL, "vocab_size": 768, "dim": 1024, "n_layers": 10})
    # Random numbers would take seconds.
    weights = {name: torch.zeros(shape, dtype=stored) for name, shape in full_shapes(args).items()}
    files = {"tokenizer.model": TINY / "tokenizer.model"}
    save([weights], args, tmp_path / "ckpt", shards, files)
    done = forked("-c", MEMORY, str(tmp_path / "ckpt"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.35  # without it about 2


def test_model_parallel_size_must_be_the_number_of_processes() -> None:
    with pytest.raises(ValueError, match=r"is 2, but the number of processes is 1"):
        Llama.build(model_parallel_size=2, device="cpu")


class TestMemory:
    def test_too_long_a_cache_is_refused_with_the_largest_that_fits(self) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(MemoryError, match=r"max_batch_size=100000 can be at most \d+"):
            Llama.build(max_seq_len=10**6, max_batch_size=10**5, device="cpu")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB

    def test_too_large_weights_suggest_a_smaller_dtype_or_more_processes(self, monkeypatch) -> None:
        monkeypatch.setattr(load_module, "device_memory", lambda _: 1_000_000)
        with pytest.raises(MemoryError, match="share them among more GPUs"):
            Llama.build(device="cpu", dtype=torch.float32)
        monkeypatch.setattr(load_module, "device_memory", lambda _: 5_000_000)
        with pytest.raises(MemoryError, match=r"could be torch\.bfloat16"):
            Llama.build(device="cpu", dtype=torch.float32)
        with pytest.raises(MemoryError, match=r"can be at most \d+"):
            Llama.build(device="cpu", dtype=torch.bfloat16)

    def test_what_fits_by_the_message_fits(self, monkeypatch) -> None:
        monkeypatch.setattr(load_module, "device_memory", lambda _: 20_000_000)
        with pytest.raises(MemoryError) as error:
            Llama.build(device="cpu", dtype=torch.bfloat16, max_seq_len=512, max_batch_size=64)
        most = int(str(error.value).split("at most ")[1])
        Llama.build(device="cpu", dtype=torch.bfloat16, max_seq_len=most, max_batch_size=1)
        with pytest.raises(MemoryError):
            Llama.build(device="cpu", dtype=torch.bfloat16, max_seq_len=most + 9, max_batch_size=1)

    def test_ranks_on_other_machines_need_none_of_this_ones(self, monkeypatch) -> None:
        """A failure means that a model on two machines doesn't fit, or that one's memory ends."""
        monkeypatch.setattr(load_module, "device_memory", lambda _: 8_000_000_000)
        args = ModelArgs(**LLAMA_7B, max_seq_len=512, max_batch_size=1)
        cpu = torch.device("cpu")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        load_module.plan_memory(args, torch.bfloat16, cpu, ranks=4)  # half of 13.5 GB
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        with pytest.raises(MemoryError, match=r"weights of 13\.5 GB"):
            load_module.plan_memory(args, torch.bfloat16, cpu, ranks=4)

    def test_the_machine_has_memory(self) -> None:
        assert memory.device_memory(torch.device("cpu")) > 1e9

    def test_limits_of_control_groups_count(self, tmp_path: Path) -> None:
        assert memory.memory_limits(tmp_path) == []
        files = {
            "proc/self/cgroup": "4:memory:/jobs/1\n0::/user/session\n",
            "sys/fs/cgroup/memory/jobs/1/memory.limit_in_bytes": "3000\n",
            "sys/fs/cgroup/user/session/memory.max": "max\n",
            "sys/fs/cgroup/user/memory.max": "2000\n",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        assert sorted(memory.memory_limits(tmp_path)) == [2000, 3000]


LLAMA_7B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "multiple_of": 256}
GPU = torch.device("cuda", 1)


class TestMemoryOfGPUs:
    """Sizes are decided by arithmetic, before anything is allocated."""

    @pytest.fixture
    def free(self, monkeypatch: pytest.MonkeyPatch):
        """Sets how much memory of an H100 is free."""

        def set_free(n_bytes: float) -> None:
            monkeypatch.setattr(load_module, "device_memory", lambda device: int(n_bytes))

        capability = Capability("cuda", (9, 0), (torch.bfloat16,))
        monkeypatch.setattr(Capability, "of", staticmethod(lambda device: capability))
        return set_free

    def plan(self, quantize: str | None = None, ranks: int = 1, **params: int) -> int:
        args = ModelArgs(**LLAMA_7B, **{"max_seq_len": 4096, "max_batch_size": 8, **params})
        forms = make_scheme(quantize).forms(args) if quantize else {}
        return load_module.plan_memory(args, torch.bfloat16, GPU, ranks, forms)

    def test_what_other_processes_hold_is_not_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A failure means that loading ends with CUDA's own error, after minutes."""
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5_000, 80_000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
        assert memory.device_memory(GPU) == 5_200  # of which PyTorch keeps 200 for reuse

    def test_passes_are_as_long_as_a_twentieth_of_the_memory_allows(self, free) -> None:
        found = {}
        for gigabytes, options in ((79, {}), (39, {}), (21, {"max_batch_size": 1})):
            free(gigabytes * 1e9)
            found[gigabytes] = self.plan(**options)
        assert found == {79: 8192, 39: 8192, 21: 4096}
        free(40e9)
        assert self.plan(ranks=8) == 8192  # each of which has a part
        free(11e9)
        assert self.plan("int4", max_batch_size=1) == 2048

    def test_passes_are_shorter_where_weights_and_cache_leave_little(self, free) -> None:
        needed = 2 * 6.738e9 + 2**19 * 4096 * 8
        tokens = []
        for spare in (1.8e9, 1.4e9, 1.2e9):
            free(needed + spare)
            tokens.append(self.plan())
        assert tokens == [4096, 4096, 2048]  # of 33 GB a twentieth is too little for 8192

    def test_errors_say_what_is_free_and_what_to_change(self, free) -> None:
        free(31.5e9)  # which weights and cache alone would fit
        with pytest.raises(MemoryError) as error:
            self.plan()
        message = str(error.value)
        assert "weights of 13.5 GB and a cache of 17.2 GB, with a workspace of 1." in message
        assert "31.5 GB that are free on cuda:1" in message
        most = int(message.split("at most ")[1])
        assert 30_000 < most < 8 * 4096
        assert self.plan(max_seq_len=most // 8) >= 2048
        free(10e9)
        with pytest.raises(MemoryError, match="quantize could be 'int8' or 'int4'"):
            self.plan()

    def test_other_devices_need_no_workspace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        args = ModelArgs(**LLAMA_7B)
        for kind in ("cpu", "mps"):
            tokens = memory.prefill_tokens(args, torch.float32, 1, Capability(kind), 10**12)
            assert tokens == 512
        assert Llama.build(device="cpu").model.prefill_tokens == 512
