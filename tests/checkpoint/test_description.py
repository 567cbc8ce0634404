"""Descriptions by ``python -m llama.checkpoint`` of checkpoints, adapters and anything else."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import write_gguf
from hf_files import make_hf, save_hf, write_adapter
from safetensors.torch import load_file, save_file

from llama.checkpoint import inspection, open_checkpoint
from llama.checkpoint.description import _files, describe
from llama.convert import convert
from llama.generation import TINY

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_hf(make_hf(), path)
    return path


def told(path: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[dict, str]:
    """A path's description as an object, which is checked, and as lines."""
    found = describe(path)
    for json_wanted in (True, False):
        try:
            inspection.inspect(str(path), json=json_wanted, **options)
        except SystemExit as status:
            assert status.code == 1 and found["problems"]
        else:
            assert not found["problems"]
        out = capsys.readouterr().out
        if json_wanted:
            assert json.loads(out).keys() == {*found, "checksums"}
    return found, out


def test_a_directory_of_transformers(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failure means that a number or a name in the description is wrong."""
    found, lines = told(saved, capsys)
    assert (found["format"], found["family"], found["problems"]) == ("hf", "llama", [])
    assert found["shape"] == {
        **{"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "head_dim": 8},
        **{"hidden_dim": 160, "vocab_size": 768, "max_seq_len": 128, "rope_theta": 10000.0},
        **{"rope_scaling": None, "tie_word_embeddings": False, "labels": None},
    }
    assert found["dtypes"] == {"float32": 1.0}
    assert found["files"]["bytes"] == (saved / "model.safetensors").stat().st_size
    tokenizer = found["tokenizer"]
    assert (tokenizer["kind"], tokenizer["pieces"], tokenizer["ends"]) == (
        *("sentencepiece", 768),
        ["</s>"],
    )
    assert found["chat_format"] == {"name": "inst", "templates": []}
    assert found["adapters"]["modules"]["k_proj"] == {"in": 64, "out": 16, "max_rank": 16}
    assert "PREFIX_TUNING" in found["adapters"]["kinds"] and found["adapters"]["mergeable"]
    assert found["adapters"]["modules"].keys() >= {"down_proj", "embed_tokens", "lm_head"}
    assert "of the family llama" in lines and "k_proj 64→16" in lines and "128 positions" in lines


def test_memory_is_told_for_each_number_of_processes(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure means that someone who divides a network among GPUs is told wrong sizes."""
    memory = describe(saved, max_seq_len=100, max_batch_size=3)["memory"]
    assert [*memory["processes"]] == ["1", "2", "4", "8"]
    n_parameters = sum(p.numel() for p in make_hf().parameters())
    one, four = memory["processes"]["1"], memory["processes"]["4"]
    assert one == {"weights": 4 * n_parameters, "cache": 4 * 2 * (2 * 2 * 8) * 100 * 3}
    assert four["cache"] == one["cache"] // 2  # of two heads one is left
    assert one["weights"] / 4 < four["weights"] < one["weights"] / 3
    lines = told(saved, capsys)[1]
    assert "4 processes, each:" in lines and "16 processes" not in lines
    assert memory["dtype"] == "float32" and "in float32:" in lines


def test_memory_of_half_precision_is_counted_as_such(tmp_path: Path) -> None:
    """A failure means that a model seems to need twice the memory that it does."""
    model = save_hf(make_hf().half(), tmp_path)
    memory = describe(tmp_path)["memory"]
    assert memory["dtype"] == "bfloat16"
    assert memory["processes"]["1"]["weights"] == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"do_sample": true, "temperature": NaN}', "temperature is nan"),
        ('{"do_sample": true, "top_p": Infinity}', "top_p is inf"),
        ('{"do_sample": true, "top_k": "many"}', "top_k is 'many'"),
        ("[]", "no object of JSON|generation_config"),
    ],
)
def test_sampling_that_makes_no_sense_is_a_problem(
    text: str, message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure means that a program gets no JSON for a file that holds none either."""
    path = shutil.copytree(saved, tmp_path / "model")
    (path / "generation_config.json").write_text(text)
    found, lines = told(path, capsys)
    assert found["sampling"] is None and found["parameters"]
    assert re.search(message, " ".join(found["problems"]))
    assert "PROBLEM: " in lines and "sampling " not in lines


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], 1),
        (["one-of-many.gguf"], 0),
        (["[b]*-of-00001.gguf"], 0),
    ],
)
def test_files_of_a_gguf_checkpoint(names: list[str], given: int, tmp_path: Path) -> None:
    """A failure means that a model in parts, or with a name like one, has no files or bytes."""
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_bytes(b"12345")
    (tmp_path / "bb-of-00001.gguf").write_bytes(b"another model's")
    checkpoint = open_checkpoint(TINY)
    assert _files(paths[given], checkpoint) == {"count": len(paths), "bytes": 5 * len(paths)}


def test_stored_types_of_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failure means that a quantised file is taken for one of full precision."""
    write_gguf(tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    found, lines = told(tmp_path / "m.gguf", capsys)
    assert (found["format"], found["quantization"]) == ("gguf", "Q8_0")
    assert found["dtypes"]["Q8_0"] > 0.95 and found["dtypes"]["F32"] < 0.05
    assert "quantised    Q8_0" in lines and "no tokenizer" in lines
    kinds = {"ffn_up": gguf.GGMLQuantizationType.Q5_0}
    write_gguf(tmp_path / "mixed.gguf", gguf.GGMLQuantizationType.Q4_1, kinds=kinds)
    found = told(tmp_path / "mixed.gguf", capsys)[0]
    up = 2 * 96 * 64
    total = 2 * 60 * 64 + 2 * (3 * 96 * 64 + 96 * 2 * 64) + 5 * 64
    assert found["quantization"] == "Q4_1, Q5_0" and found["adapters"]["mergeable"]
    assert found["dtypes"]["Q5_0"] == round(up / total, 4)


def test_weights_that_this_library_quantised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure means that merging adapters is offered to codes, which can't take them."""
    convert(str(TINY), str(tmp_path / "int8"), quantize="int8")
    found, lines = told(tmp_path / "int8", capsys)
    assert found["quantization"] == "int8"
    assert found["dtypes"]["int8"] > 0.5
    assert (found["adapters"]["kinds"][0], found["adapters"]["mergeable"]) == ("LORA", False)
    assert "on call alone: quantised weights" in lines and "but for int8:" in lines


def test_an_adapter(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failure means that an adapter's directory is an error in place of a description."""
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    write_adapter(make_hf(), tmp_path / "lora", options)
    config = tmp_path / "lora" / "adapter_config.json"
    text = json.loads(config.read_text())
    config.write_text(json.dumps({**text, "base_model_name_or_path": "org/base"}))
    found, lines = told(tmp_path / "lora", capsys)
    adapter = found["adapter"]
    assert (adapter["kind"], adapter["base"], adapter["task"]) == ("LORA", "org/base", "CAUSAL_LM")
    assert (adapter["rank"], adapter["alpha"], adapter["tensors"]) == (3, 6, 8)
    assert sorted(adapter["modules"]) == ["q_proj", "v_proj"]
    assert "LORA for org/base, rank 3, alpha 6, of " in lines
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is damaged (" in told(tmp_path / "lora", capsys)[0]["problems"][0]
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is a Git LFS pointer" in told(tmp_path / "lora", capsys)[0]["problems"][0]
    weights.unlink()
    assert "no adapter_model.safetensors" in told(tmp_path / "lora", capsys)[0]["problems"][0]
    config.write_text("[")
    assert "no object of JSON" in told(tmp_path / "lora", capsys)[0]["problems"][0]


def test_what_is_not_read_is_still_described(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure means that of a quantised model nothing but its refusal is told."""
    path = shutil.copytree(saved, tmp_path / "gptq")
    config = json.loads((path / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "exl2"}}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.qweight"] = torch.zeros(100_000, dtype=torch.int32)
    save_file(tensors, path / "model.safetensors")
    found, lines = told(path, capsys)
    assert "quantised with exl2" in found["problems"][0]
    assert (found["family"], found["quantization"]) == ("llama", "exl2")
    assert (found["shape"]["dim"], found["shape"]["n_layers"]) == (64, 2)
    assert 0.3 < found["dtypes"]["I32"] < 0.6 and found["tokenizer"]["pieces"] == 768
    assert "family llama" in lines and "PROBLEM: " in lines and "no damage" not in lines


def test_what_is_odd_is_told(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failure means that a warning while opening, or a surprise, doesn't reach the reader."""
    path = shutil.copytree(saved, tmp_path / "model")
    (path / "pytorch_model.bin").write_bytes(b"x")
    opened = inspection.describe

    def warn(*args: Any) -> Any:
        logging.getLogger("llama.checkpoint.hf").warning("a strange\nthing")
        return load_tokenizer(*args)

    from llama.checkpoint.description import load_tokenizer

    monkeypatch.setattr("llama.checkpoint.description.load_tokenizer", warn)
    found = opened(path)
    assert "a strange?thing" in found["warnings"]
    assert "pytorch_model.bin beside model.safetensors is not read" in found["warnings"]
    assert "odd          a strange?thing" in told(path, capsys)[1]
    assert not logging.getLogger("llama").handlers


def test_a_larger_embedding_than_vocabulary_is_odd(tmp_path: Path) -> None:
    """A failure means that nobody learns of rows which no text has."""
    save_hf(make_hf(vocab_size=800), tmp_path)
    assert any("has 800 rows and the tokenizer 768" in w for w in describe(tmp_path)["warnings"])


def test_a_damaged_tokenizer_hides_nothing_else(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure means that a fault of the text keeps the weights' description back."""
    path = shutil.copytree(saved, tmp_path / "model")
    (path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    found, _ = told(path, capsys)
    assert "tokenizer.model is a Git LFS pointer" in found["problems"][0]
    assert found["parameters"] and found["memory"] and found["tokenizer"] is None


def test_every_key_is_documented(saved: Path, tmp_path: Path) -> None:
    """A failure means that a program's author doesn't find a key, or finds one that is gone."""
    found = describe(saved)
    table = DOCS.read_text(encoding="utf-8").split("### Inspection", 1)[1].split("\n### ", 1)[0]
    documented = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(documented) == sorted([*found, "checksums"])
