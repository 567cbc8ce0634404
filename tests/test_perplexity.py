"""Perplexity: what transformers computes on the same windows, and what the command prints."""

import math
import random
from pathlib import Path

import pytest
import torch
from conftest import make_model
from hf_files import as_transformers
from processes import forked

from llama import Llama
from llama.perplexity import perplexity


@pytest.fixture(scope="module")
def llama(tiny_tokenizer) -> Llama:
    return Llama(make_model(n_kv_heads=2, vocab_size=768, max_batch_size=3), tiny_tokenizer)


def by_transformers(model: torch.nn.Module, ids: list[int], context: int, stride: int) -> float:
    """The way of its documentation, token by token rather than window by window."""
    losses: list[float] = []
    previous = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = torch.tensor([ids[begin:end]])
        with torch.no_grad():
            logprobs = model(window).logits[0].log_softmax(-1)
        for position in range(max(previous, 1), end):
            losses.append(-float(logprobs[position - begin - 1, ids[position]]))
        previous = end
        if end == len(ids):
            break
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(
    ("length", "context", "stride"),
    [(300, 128, 64), (300, 128, 127), (129, 64, 1), (40, 128, 64), (128, 128, 32), (2, 2, 1)],
)
def test_it_equals_transformers(llama: Llama, length: int, context: int, stride: int) -> None:
    rng = random.Random(length)
    ids = [1, *(rng.randrange(768) for _ in range(length - 1))]
    seen: list[int] = []
    found = perplexity(llama, ids, context, stride, seen.append)
    assert found.n_tokens == length - 1 == seen[-1]
    assert seen == sorted(seen)
    expected = by_transformers(as_transformers(llama.model), ids, context, stride)
    assert found.value == pytest.approx(expected, rel=1e-4)


def test_a_text_that_is_sure_has_a_perplexity_of_one(llama: Llama, monkeypatch) -> None:
    monkeypatch.setattr(llama, "generate", lambda w, *_, **__: (w, [[0.0] * len(r) for r in w]))
    assert perplexity(llama, [1] * 200, 64, 32) == (1.0, 0.0, 199)


def test_mistakes_are_named(llama: Llama) -> None:
    for arguments, message in (
        (([1, 2, 3], 129, 5), "context is 129: expected 2 to max_seq_len, 128"),
        (([1, 2, 3], 64, 64), "stride is 64: expected 1 to 63"),
        (([1], 64, 32), "the text has 1 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity(llama, *arguments)


@pytest.mark.slow
def test_the_command_prints_it(tiny: Llama, tmp_path: Path) -> None:
    text = "Once upon a time there was a fox. The fox was red.\n" * 12
    (tmp_path / "text.txt").write_text(text)
    command = ["-m", "llama.perplexity", "--dtype", "float32", "--context", "64"]
    command += ["--stride", "32", "--device", "cpu", "--text_file"]
    command.append(str(tmp_path / "text.txt"))
    done = forked(*command)
    assert done.returncode == 0, done.stderr
    ids = tiny.tokenizer.encode(text, bos=True, eos=False)
    expected = perplexity(tiny, ids, 64, 32)
    assert done.stdout.startswith(f"perplexity {expected.value:.4f} +- ")
    assert f"({len(ids) - 1:,} tokens, context 64, stride 32)" in done.stdout
