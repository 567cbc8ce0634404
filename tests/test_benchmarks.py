"""The benchmarks measure what they say: the same weights in every format, and honest arithmetic."""

import sys
from pathlib import Path

import pytest
import torch

from llama import ModelArgs
from llama.formats import open_checkpoint
from llama.sharding import full_shapes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import engines
import speed

SMALL = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=768, multiple_of=32)


@pytest.mark.parametrize("engine", ["llama", "transformers", "llama.cpp"])
def test_every_engine_gets_the_same_weights(engine: str, tmp_path: Path) -> None:
    tensors = speed.random_weights(SMALL)
    path = tmp_path / ("model.gguf" if engine == "llama.cpp" else "model")
    speed.WRITERS[engine](SMALL, tensors, path)
    found = open_checkpoint(path)
    for name in full_shapes(SMALL):
        read = found.rank_part(name, SMALL, 0, 1)
        assert torch.equal(read.to(torch.bfloat16), tensors[name]), name


def test_a_worker_measures_this_library(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(engines, "PROMPT", 40)
    monkeypatch.setattr(engines, "NEW", 8)
    monkeypatch.setattr(engines, "prompt_of", lambda n, seed=0: [seed % 700 + 1] * n)
    threads = torch.get_num_threads()
    speed.write_meta(SMALL, speed.random_weights(SMALL), tmp_path / "model")
    found = engines.measure("llama", str(tmp_path / "model"), start=0.0)
    torch.set_num_threads(threads)
    assert all(value > 0 for value in found.values())


def test_fractions_and_ratios() -> None:
    # What a token reads and calculates with: all weights but the embedding, of which it is a row.
    weights = sum(torch.Size(s).numel() for s in full_shapes(speed.SHAPES["110M"]).values())
    read = weights - 32000 * 768
    ours = {"prefill_tokens_per_s": 100.0, "decode_tokens_per_s": 10.0}
    more = {"first_token_s": 1.0, "peak_bytes": 1e9}
    results = {
        "limits": {"bandwidth": 2 * read * 20.0, "peak": 2 * (read - 32000 * 768) * 400.0},
        "engines": {
            "llama": {**ours, **more},
            "llama.cpp": {"prefill_tokens_per_s": 50.0, "decode_tokens_per_s": 20.0, **more},
        },
    }
    lines = speed.table("110M", results).splitlines()
    assert "| llama | 100 | 0.25 | 10.0 | 0.50 |" in lines[4]
    assert lines[5].endswith("| 2.00 x | 0.50 x |")
