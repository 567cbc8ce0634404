"""Checkpoint directories: any number of shards, real layouts, clear answers to broken ones."""

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import make_model

from llama import Llama, ModelArgs, checkpoint, inspection, parallel, sharding
from llama.convert import convert
from llama.generation import TINY


def build(path: Path, **more: object) -> Llama:
    return Llama.build(path, max_seq_len=64, max_batch_size=2, device="cpu", **more)


def edit(path: Path, name: str = "consolidated.00.pth", **changes: object) -> None:
    """Replace tensors of a shard; None removes one."""
    tensors = {**torch.load(path / name), **{k.replace("__", "."): v for k, v in changes.items()}}
    torch.save({k: v for k, v in tensors.items() if v is not None}, path / name)


def test_weights_stay_mapped_and_in_their_dtype(checkpoint_dir) -> None:
    path = checkpoint_dir(torch.float32)
    llama = build(path)
    assert llama.model.output.weight.dtype == torch.float32
    assert llama.model.layers[0].attention.cache_k.dtype == torch.float32
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
    for name, parameter in llama.model.named_parameters():
        assert parameter.dtype == wanted
        assert torch.equal(parameter, original[name].to(wanted)), name
    assert llama.model.layers[0].attention.cache_v.dtype == wanted
    assert len(llama.generate([[1, 2]], 3)[0]) == 1


def test_derived_rotary_tensors_are_ignored(checkpoint_dir) -> None:
    path = checkpoint_dir()
    expected = build(path).generate([[1, 5, 9]], 20, temperature=0)
    edit(
        path,
        rope__freqs=torch.ones(4),
        layers__0__attention__inner_attention__rope__freqs=torch.ones(4),
        layers__1__self_attn__rotary_emb__inv_freq=torch.ones(4),
    )
    assert build(path).generate([[1, 5, 9]], 20, temperature=0) == expected


def test_the_tokenizer_is_found_in_the_parent(checkpoint_dir, tmp_path: Path) -> None:
    path = checkpoint_dir()
    (path / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert build(path).tokenizer.n_words == 768
    assert build(path, tokenizer_path=TINY / "tokenizer.model").tokenizer.n_words == 768
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.model or tokenizer\.json in"):
        build(path)


def test_a_relative_directory_is_fine(checkpoint_dir, monkeypatch) -> None:
    path = checkpoint_dir()
    monkeypatch.chdir(path)
    (path / "tokenizer.model").rename(path.parent / "tokenizer.model")
    assert build(Path(".")).tokenizer.n_words == 768


def test_vocab_size_of_minus_one_is_the_tokenizers(checkpoint_dir) -> None:
    path = checkpoint_dir()
    params = json.loads((path / "params.json").read_text())
    (path / "params.json").write_text(json.dumps({**params, "vocab_size": -1}))
    assert build(path).model.params.vocab_size == 768


def test_a_padded_vocabulary_never_yields_ids_without_a_piece(checkpoint_dir) -> None:
    llama = build(checkpoint_dir(vocab_size=800))
    with torch.inference_mode():
        llama.model.output.weight[768:] *= 100  # the padding would win every draw
    rows, _ = llama.generate([[1, 2]] * 4, 30, temperature=1.5, top_p=1.0)
    assert all(token < 768 for row in rows for token in row)


class TestShards:
    @pytest.mark.parametrize("variant", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1}])
    def test_any_number_of_shards_is_the_same_model(self, checkpoint_dir, variant) -> None:
        path = checkpoint_dir(**variant)
        whole = build(path).model.state_dict()
        for n in (1, 2, 4, 8):
            out = path.parent / f"shards{n}"
            checkpoint.reshard(str(path), str(out), model_parallel_size=n)
            assert len(list(out.glob("*.pth"))) == n
            for name, tensor in build(out).model.state_dict().items():
                assert torch.equal(tensor, whole[name]), name
            back = path.parent / f"back{n}"
            checkpoint.reshard(str(out), str(back), model_parallel_size=1)
            again = torch.load(back / "consolidated.00.pth")
            assert again.keys() == whole.keys()
            assert all(torch.equal(again[name], whole[name]) for name in whole)

    def test_shards_hold_what_the_published_ones_hold(self, checkpoint_dir) -> None:
        path = checkpoint_dir(n_kv_heads=2)
        checkpoint.reshard(str(path), str(path.parent / "two"), model_parallel_size=2)
        whole = torch.load(path / "consolidated.00.pth")
        second = torch.load(path.parent / "two" / "consolidated.01.pth")
        columns = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0}
        rows = {"wo": 1, "w2": 1, "tok_embeddings": 1}
        for name, tensor in whole.items():
            dim = {**columns, **rows}.get(name.split(".")[-2])
            expected = tensor if dim is None else tensor.chunk(2, dim)[1]
            assert torch.equal(second[name], expected), name

    def test_a_vocabulary_that_does_not_divide(self, checkpoint_dir) -> None:
        path = checkpoint_dir(vocab_size=769)
        checkpoint.reshard(str(path), str(path.parent / "two"), model_parallel_size=2)
        sizes = [
            torch.load(path.parent / "two" / f"consolidated.0{i}.pth")["output.weight"].shape[0]
            for i in (0, 1)
        ]
        assert sizes == [385, 384]
        whole, two = build(path).model, build(path.parent / "two").model
        assert torch.equal(whole.output.weight, two.output.weight)

    def test_the_command_line_and_python_save(self, checkpoint_dir, tmp_path: Path) -> None:
        path = checkpoint_dir()
        command = [sys.executable, "-m", "llama.checkpoint", "reshard", str(path)]
        done = subprocess.run(
            [*command, str(tmp_path / "out"), "--model_parallel_size", "2"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "wrote" in done.stderr
        assert "Warning" not in done.stderr
        assert build(tmp_path / "out").tokenizer.n_words == 768
        model = build(path).model
        checkpoint.save([model.state_dict()], model.params, tmp_path / "saved", 4)
        (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
        for name, tensor in build(tmp_path / "saved").model.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])

    def test_nothing_is_overwritten_and_nothing_half_written_stays(
        self, checkpoint_dir, tmp_path: Path, monkeypatch
    ) -> None:
        path = checkpoint_dir()
        with pytest.raises(FileExistsError, match="is there already"):
            checkpoint.reshard(str(path), str(path))
        with pytest.raises(ValueError, match="3 parts can't be made of 8 heads"):
            checkpoint.reshard(str(path), str(tmp_path / "three"), model_parallel_size=3)

        def full(done: int) -> None:
            raise OSError("No space left on device")

        model = build(path).model
        with pytest.raises((OSError, RuntimeError), match="No space"):
            checkpoint.save([model.state_dict()], model.params, tmp_path / "out", progress=full)
        assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize("n", [3, 0, -2, 16, 1.5])
def test_sizes_that_do_not_fit_are_listed(n: int) -> None:
    model = make_model(n_kv_heads=2)
    with pytest.raises(ValueError, match=r"possible are 1, 2, 4, 8$|expected a whole number"):
        sharding.check_model_parallel_size(model.params, n)


MEMORY = """
import sys, torch
from llama import Llama
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before = peak()
llama = Llama.build(sys.argv[1], max_seq_len=64, device="cpu", dtype=torch.bfloat16)
needed = sum(p.nbytes for p in llama.model.parameters())
print((peak() - before) / needed)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("stored", "shards"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_mapped_pages_are_released_while_loading(
    checkpoint_dir, stored: torch.dtype, shards: int
) -> None:
    path = checkpoint_dir(stored, dim=1024, n_layers=10)
    if shards > 1:
        checkpoint.reshard(str(path), str(path.parent / "shards"), model_parallel_size=shards)
        path = path.parent / "shards"
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.35  # without it about 2


def test_model_parallel_size_must_be_the_number_of_processes() -> None:
    with pytest.raises(ValueError, match=r"is 2, but the number of processes is 1"):
        Llama.build(model_parallel_size=2, device="cpu")


class Harmful:
    """Unpickled without care it would write a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    checkpoint_dir, tmp_path: Path
) -> None:
    path, marker = checkpoint_dir(), tmp_path / "ran"
    edit(path, norm__weight=Harmful(marker))
    with pytest.raises(ValueError, match=r"is refused: its pickle names (posix|nt) system"):
        build(path)
    assert not marker.exists()
    torch.load(path / "consolidated.00.pth", weights_only=False)  # the test's own file is harmful
    assert marker.exists()


class TestMemory:
    def test_too_long_a_cache_is_told_with_what_would_fit(self) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(MemoryError, match=r"max_batch_size=100000 can be at most \d+"):
            Llama.build(max_seq_len=10**6, max_batch_size=10**5, device="cpu")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB

    def test_too_large_weights_suggest_a_smaller_dtype_or_more_processes(self, monkeypatch) -> None:
        monkeypatch.setattr(parallel, "device_memory", lambda _: 1_000_000)
        with pytest.raises(MemoryError, match="share them among more GPUs"):
            Llama.build(device="cpu", dtype=torch.float32)
        monkeypatch.setattr(parallel, "device_memory", lambda _: 5_000_000)
        with pytest.raises(MemoryError, match=r"could be torch\.bfloat16"):
            Llama.build(device="cpu", dtype=torch.float32)
        with pytest.raises(MemoryError, match=r"can be at most \d+"):
            Llama.build(device="cpu", dtype=torch.bfloat16)

    def test_what_fits_by_the_message_fits(self, monkeypatch) -> None:
        monkeypatch.setattr(parallel, "device_memory", lambda _: 20_000_000)
        with pytest.raises(MemoryError) as error:
            Llama.build(device="cpu", dtype=torch.bfloat16, max_seq_len=512, max_batch_size=64)
        most = int(str(error.value).split("at most ")[1])
        Llama.build(device="cpu", dtype=torch.bfloat16, max_seq_len=most, max_batch_size=1)
        with pytest.raises(MemoryError):
            Llama.build(device="cpu", dtype=torch.bfloat16, max_seq_len=most + 9, max_batch_size=1)

    def test_the_machine_has_memory(self) -> None:
        assert parallel.device_memory(torch.device("cpu")) > 1e9

    def test_limits_of_control_groups_count(self, tmp_path: Path) -> None:
        assert parallel.memory_limits(tmp_path) == []
        files = {
            "proc/self/cgroup": "4:memory:/jobs/1\n0::/user/session\n",
            "sys/fs/cgroup/memory/jobs/1/memory.limit_in_bytes": "3000\n",
            "sys/fs/cgroup/user/session/memory.max": "max\n",
            "sys/fs/cgroup/user/memory.max": "2000\n",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        assert sorted(parallel.memory_limits(tmp_path)) == [2000, 3000]


class TestInspection:
    def test_it_tells_what_a_checkpoint_is(self, checkpoint_dir, capsys) -> None:
        path = checkpoint_dir(torch.float16)
        checkpoint.reshard(str(path), str(path.parent / "two"), model_parallel_size=2)
        inspection.inspect(str(path.parent / "two"), max_seq_len=1000, max_batch_size=10)
        out = capsys.readouterr().out
        assert "205,120 in float16" in out
        assert "dim 64, 2 layers, 8 heads, 8 key/value heads" in out
        assert "files        2 of" in out
        assert "768 pieces" in out
        assert "max_batch_size=10, max_seq_len=1000" in out
        assert "unknown" in out
        assert "no damage found" in out
        assert "only the weight files could be checked" in out

    @pytest.mark.parametrize(
        ("folder", "params", "expected"),
        [
            ("llama-2-7b-chat", {}, "llama-2-7b-chat by its folder's name (7B"),
            ("CodeLlama-34b", {}, "CodeLlama-34b by its folder's name (7B"),
            ("somewhere", {}, "LLaMA or Llama 2 7B"),
            ("somewhere", {"rope_theta": 1e6}, "Code Llama 7B"),
            ("somewhere", {"dim": 8192, "n_layers": 80, "n_heads": 64}, "LLaMA 65B"),
            (
                "somewhere",
                {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8},
                "Llama 2 70B",
            ),
            ("somewhere", {"dim": 512}, "unknown"),
        ],
    )
    def test_families(self, folder: str, params: dict, expected: str) -> None:
        args = ModelArgs(vocab_size=32000, **params)
        assert inspection.identify(Path(folder), args, None).startswith(expected)

    def test_other_formats_are_described_too(self, tmp_path: Path, capsys) -> None:
        convert(str(TINY), str(tmp_path / "hf"), "hf")
        inspection.inspect(str(tmp_path / "hf"))
        out = capsys.readouterr().out
        assert "1,918,656 in bfloat16" in out
        assert "files        1 of 0.00 GB" in out
        assert "768 pieces" in out
        assert "this format has no checksums" in out
        (tmp_path / "hf" / "config.json").write_text("{}")
        with pytest.raises(SystemExit):
            inspection.inspect(str(tmp_path / "hf"))
        assert "PROBLEM: " in capsys.readouterr().out

    def test_damaged_bytes_that_load_are_found(self, checkpoint_dir, capsys) -> None:
        path = checkpoint_dir()
        file = path / "consolidated.00.pth"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1  # in the middle of a tensor
        file.write_bytes(content)
        build(path)
        with pytest.raises(SystemExit):
            inspection.inspect(str(path))
        assert "PROBLEM" in capsys.readouterr().out

    def test_the_checklist_is_checked(self, checkpoint_dir, capsys) -> None:
        path = checkpoint_dir()
        digest = hashlib.md5((path / "params.json").read_bytes()).hexdigest()
        (path / "checklist.chk").write_text(f"{digest}  params.json\n\n")
        assert inspection.verify(path) == []
        with open(path / "params.json", "a") as file:
            file.write(" ")
        assert "params.json differs" in inspection.verify(path)[0]
        (path / "checklist.chk").write_text(f"{digest}  gone.pth\n{digest}  ../x\nwhat\n")
        found = inspection.verify(path)
        assert len(found) == 3
        assert "gone.pth is missing" in found[0]
        (path / "checklist.chk").unlink()
        (path / "tokenizer_checklist.chk").write_text(f"{digest}  tokenizer.model\n")
        assert "tokenizer.model differs" in inspection.verify(path)[0]

    def test_the_command_line(self, checkpoint_dir) -> None:
        command = [sys.executable, "-m", "llama.checkpoint"]
        good = subprocess.run([*command, str(TINY)], capture_output=True, text=True)
        assert (good.returncode, "no damage found" in good.stdout) == (0, True)
        bad = subprocess.run([*command, "/nowhere"], capture_output=True, text=True)
        assert (bad.returncode, "Traceback" in bad.stderr) == (1, False)
        assert "no checkpoint directory at /nowhere" in bad.stdout


class TestBroken:
    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint directory at .*nowhere"):
            build(tmp_path / "nowhere")

    @pytest.mark.parametrize("missing", [[2], [3], [1, 2, 3]])
    def test_missing_shards_are_named(self, checkpoint_dir, missing: list[int]) -> None:
        path = checkpoint_dir()
        checkpoint.reshard(str(path), str(path.parent / "four"), model_parallel_size=4)
        for number in missing:
            os.remove(path.parent / "four" / f"consolidated.0{number}.pth")
        with pytest.raises(FileNotFoundError, match=rf"consolidated\.0{missing[0]}\.pth is miss"):
            build(path.parent / "four")

    def test_files_that_would_take_more_memory_than_their_size(
        self, checkpoint_dir, tmp_path: Path
    ) -> None:
        path = checkpoint_dir()
        file = path / "consolidated.00.pth"
        huge = b"\x80\x02cbuiltins\nbytearray\nJ\x00\x94\x35\x77\x85R."  # bytearray(2 * 10**9)
        with zipfile.ZipFile(file) as archive:
            entries = {e.filename: archive.read(e) for e in archive.infolist()}
        for compression, replaced, message in (
            (zipfile.ZIP_STORED, huge, "names builtins bytearray"),
            (zipfile.ZIP_DEFLATED, None, "is compressed"),
            (zipfile.ZIP_STORED, bytes(17_000_000), "far too large"),
        ):
            with zipfile.ZipFile(file, "w", compression) as archive:
                for name, content in entries.items():
                    is_pickle = name.endswith("data.pkl") and replaced is not None
                    archive.writestr(name, replaced if is_pickle else content)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with pytest.raises(ValueError, match=f"is refused: .*{message}"):
                build(path)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB

    def test_a_full_machine_is_not_taken_for_a_bad_file(self, checkpoint_dir, monkeypatch) -> None:
        path = checkpoint_dir()

        def full(*_: object, **__: object) -> None:
            raise RuntimeError("unable to mmap 100 bytes: Cannot allocate memory (12)")

        monkeypatch.setattr(torch, "load", full)
        with pytest.raises(MemoryError, match="no address space"):
            build(path)

    def test_saving_what_is_no_whole_network(self, checkpoint_dir, tmp_path: Path) -> None:
        model = build(checkpoint_dir()).model
        half = {name: tensor[: len(tensor) // 2] for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match="in part 0 has the shape"):
            checkpoint.save([half], model.params, tmp_path / "out")

    def test_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="has no weights"):
            build(tmp_path)

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            (None, "no .*params.json"),
            ("{", "not JSON"),
            ("[1]", "holds a list"),
            ("[" * 100_000, "not JSON"),
            ('{"dim": ' + "9" * 5000 + "}", "not JSON"),
            ({"use_scaled_rope": True}, "unknown key 'use_scaled_rope'"),
            ({"dim": 65}, "heads of an even size"),
            ({"dim": -64}, "dim is -64"),
            ({"dim": "64"}, "dim is '64'"),
            ({"n_heads": True}, "n_heads is True"),
            ({"n_kv_heads": 3}, "no multiple of n_kv_heads 3"),
            ({"norm_eps": 0}, "norm_eps is 0"),
            ({"rope_theta": None}, "rope_theta is None"),
            ({"vocab_size": 100}, "another model's tokenizer"),
            ({"dim": 2**40}, "dim is larger than any model's"),
            ({"n_layers": 10**9}, r"describes [\d,]+ parameters, but .* holds"),
            ({"rope_theta": float("nan")}, "rope_theta is nan"),
            ({"vocab_size": 1000}, r"tok_embeddings.weight in .* has the shape \(768, 64\)"),
            ({"n_layers": 3}, r"lacks layers\.2\.attention"),
            ({"n_layers": 1}, r"has the unexpected layers\.1\.attention"),
            ({"multiple_of": 512}, r"feed_forward.w1.weight in .* has the shape \(192, 64\)"),
        ],
    )
    def test_hyper_parameters(self, checkpoint_dir, params: object, message: str) -> None:
        path = checkpoint_dir()
        file = path / "params.json"
        if params is None:
            file.unlink()
        elif isinstance(params, str):
            file.write_text(params)
        else:
            file.write_text(json.dumps({**json.loads(file.read_text()), **params}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            build(path)

    def test_tensors(self, checkpoint_dir) -> None:
        for number, (changes, message) in enumerate(
            [
                ({"norm__weight": None}, r"lacks norm\.weight"),
                ({"lm_head__weight": torch.ones(1)}, r"has the unexpected lm_head\.weight"),
                ({"norm__weight": torch.ones(63)}, r"norm\.weight in .* has the shape \(63,\)"),
                ({"output__weight": torch.ones(64)}, r"output\.weight in"),
                (
                    {"norm__weight": torch.ones(64).to_sparse()},
                    "names torch._utils _rebuild_sparse",
                ),
                ({"norm__weight": torch.ones(64).int()}, "not a plain floating-point tensor"),
            ]
        ):
            path = checkpoint_dir(name=f"ckpt{number}")
            edit(path, **changes)
            with pytest.raises(ValueError, match=message):
                build(path)

    def test_files_that_are_no_checkpoints(self, checkpoint_dir) -> None:
        path = checkpoint_dir()
        file = path / "consolidated.00.pth"
        good = file.read_bytes()
        for content, message in (
            (b"", "is empty"),
            (b"\n<!DOCTYPE html><html>", "is a web page"),
            (good[: len(good) // 2], "is damaged or no checkpoint"),
            (b"x" * 1000, "is no checkpoint"),
        ):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=rf"consolidated\.00\.pth {message}"):
                build(path)
        torch.save(torch.load(io.BytesIO(good)), file, _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match="is in PyTorch's old format"):
            build(path)
        torch.save([1, 2], file)
        with pytest.raises(ValueError, match="expected a dictionary of named tensors"):
            build(path)
