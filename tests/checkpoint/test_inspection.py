"""The description of a checkpoint and the verification of its files."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from processes import forked

from llama import Llama, ModelArgs
from llama.checkpoint import inspection
from llama.checkpoint.save import reshard
from llama.convert import convert
from llama.generation import TINY


def build(path: Path, **more: object) -> Llama:
    return Llama.build(path, max_seq_len=64, max_batch_size=2, device="cpu", **more)


class TestInspection:
    def test_a_checkpoint_is_described(self, checkpoint_dir, capsys) -> None:
        path = checkpoint_dir(torch.float16)
        reshard(str(path), str(path.parent / "two"), model_parallel_size=2)
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
            ("somewhere", {"rope_theta": 1e6, "hidden_dim": 14336}, "Mistral 7B"),
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
        recommended = {"eos_token_id": 2, "do_sample": True, "temperature": 0.7, "top_k": 20}
        (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(recommended))
        inspection.inspect(str(tmp_path / "hf"))
        out = capsys.readouterr().out
        assert "ends         </s>\nsampling     temperature=0.7, top_p=1.0, top_k=20\n" in out
        assert "1,918,656 in bfloat16" in out
        assert "files        1 of 3.84 MB" in out
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
        # As Llama 3.2's are written, which name a file that isn't fetched.
        lines = f"{digest}  ./params.json\n{digest}  ./orig_params.json\n"
        (path / "checklist.chk").write_text(lines)
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

    @pytest.mark.parametrize("checksums", [True, False])
    def test_checksums_are_compared_unless_they_are_not_wanted(
        self, checksums: bool, checkpoint_dir, capsys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failure means that a quick look at a large checkpoint reads all of it."""
        read = []
        monkeypatch.setattr(inspection, "verify", lambda path: read.append(path) or [])
        inspection.inspect(str(checkpoint_dir()), checksums=checksums)
        assert len(read) == checksums
        assert ("checksums were not compared" in capsys.readouterr().out) != checksums

    @pytest.mark.slow
    def test_the_command_line(self) -> None:
        bad = forked("-m", "llama.checkpoint", "/nowhere")
        assert (bad.returncode, "Traceback" in bad.stderr) == (1, False)
        assert "no checkpoint directory at /nowhere" in bad.stdout

    @pytest.mark.slow
    def test_a_program_reads_json_alone(self, tmp_path: Path, capsys) -> None:
        """A failure means that something else than the object is printed, or success is told."""
        inspection.inspect(str(TINY), json=True)
        assert json.loads(capsys.readouterr().out)["problems"] == []
        bad = forked("-m", "llama.checkpoint", str(tmp_path / "gone"), "--json")
        assert (bad.returncode, len(json.loads(bad.stdout)["problems"])) == (1, 1)
