"""Meta's directories: real layouts are read, broken ones are answered clearly."""

import io
import json
import os
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.checkpoint.save import reshard, save
from llama.generation import TINY


def build(path: Path, **more: object) -> Llama:
    return Llama.build(path, max_seq_len=64, max_batch_size=2, device="cpu", **more)


def edit(path: Path, name: str = "consolidated.00.pth", **changes: object) -> None:
    """Replace tensors of a shard; None removes one."""
    tensors = {**torch.load(path / name), **{k.replace("__", "."): v for k, v in changes.items()}}
    torch.save({k: v for k, v in tensors.items() if v is not None}, path / name)


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


class TestBroken:
    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint directory at .*nowhere"):
            build(tmp_path / "nowhere")

    @pytest.mark.parametrize("missing", [[2], [3], [1, 2, 3]])
    def test_missing_shards_are_named(self, checkpoint_dir, missing: list[int]) -> None:
        path = checkpoint_dir()
        reshard(str(path), str(path.parent / "four"), model_parallel_size=4)
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
            save([half], model.params, tmp_path / "out")

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
            ({"use_scaled": True}, "unknown key 'use_scaled'"),
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

    def test_a_pickle_that_calls_a_value_is_refused(self, checkpoint_dir) -> None:
        """A failure means that PyTorch spells out gigabytes of numbers in an error."""
        path = checkpoint_dir()
        file = path / "consolidated.00.pth"
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
        name = next(entry for entry in entries if entry.endswith("data.pkl"))
        at = entries[name].index(b"Q")  # a storage, behind which its tensor's offset would stand
        entries[name] = entries[name][: at + 1] + b")R" + entries[name][at + 1 :]
        with zipfile.ZipFile(file, "w") as archive:
            for entry, content in entries.items():
                archive.writestr(entry, content)
        with pytest.raises(ValueError, match="its pickle calls a value"):
            build(path)

    def test_a_pickle_that_makes_a_storage_is_refused(self, checkpoint_dir) -> None:
        """A failure means that a file of bytes takes gigabytes of memory."""
        path = checkpoint_dir()
        file = path / "consolidated.00.pth"
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
        name = next(entry for entry in entries if entry.endswith("data.pkl"))
        entries[name] = b"\x80\x02ctorch.storage\nUntypedStorage\nJ\x00\x00\x00\x40\x85R."
        with zipfile.ZipFile(file, "w") as archive:
            for entry, content in entries.items():
                archive.writestr(entry, content)
        with pytest.raises(ValueError, match="its pickle calls a value"):
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
