"""The perplexity of a checkpoint on a text: ``python -m llama.perplexity CKPT TEXT_FILE``."""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from llama.cli import dtype_of, progress, run
from llama.generation import TINY, Llama


class Perplexity(NamedTuple):
    """A perplexity with its standard error."""

    value: float
    error: float  # the standard error of the value, if tokens are independent
    n_tokens: int  # that were scored


def perplexity(
    llama: Llama,
    tokens: Sequence[int],
    context: int = 512,
    stride: int = 256,
    progress: Callable[[int], None] = lambda _: None,
) -> Perplexity:
    """Return the exponential of the mean negative log-likelihood of a text's tokens.

    The text is read in windows of ``context`` tokens at intervals of ``stride``. A window scores
    the tokens that no earlier one has scored, so that all but those of the first window have at
    least ``context - stride`` tokens before them. The text's first token isn't scored.

    Args:
        tokens: the text, including a token that begins it; at least 2 tokens.
        context: at most the model's ``max_seq_len``.
        stride: 1 to ``context - 1``: a smaller one takes longer and gives tokens more context.
        progress: called with the number of tokens that have been scored.

    Raises:
        ValueError: the text is too short, or an argument is out of its range.
    """
    longest = llama.model.params.max_seq_len
    if not 2 <= context <= longest:
        raise ValueError(f"context is {context}: expected 2 to max_seq_len, {longest}")
    if not 1 <= stride < context:
        raise ValueError(f"stride is {stride}: expected 1 to {context - 1}, less than the context")
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens: at least 2 are needed to score one")
    starts = range(0, max(len(tokens) - context, 0) + stride, stride)
    scores: list[float] = []
    size = llama.model.params.max_batch_size
    for first in range(0, len(starts), size):
        batch = starts[first : first + size]
        windows = [tokens[begin : begin + context] for begin in batch]
        _, logprobs = llama.generate(windows, 0, logprobs=True, echo=True)
        assert logprobs is not None
        for begin, window_scores in zip(batch, logprobs, strict=True):
            scores += window_scores[len(scores) + 1 - begin :]
        progress(len(scores))
    return summary(scores)


def summary(logprobs: Sequence[float]) -> Perplexity:
    """Return the perplexity of tokens' log-probabilities, at least one."""
    value = math.exp(-statistics.fmean(logprobs))
    error = value * statistics.pstdev(logprobs) / math.sqrt(len(logprobs))
    return Perplexity(value, error, len(logprobs))


def main(
    ckpt_dir: str = str(TINY),
    text_file: str = "-",
    context: int = 512,
    stride: int = 256,
    max_batch_size: int = 4,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    kv_cache_dtype: str | None = None,
) -> None:
    """Print a checkpoint's perplexity on a text.

    Args:
        ckpt_dir: a checkpoint of any format; the embedded one by default.
        text_file: a UTF-8 text; - for the standard input.
        context: tokens of a window.
        stride: tokens from one window to the next.
        max_batch_size: windows in a batch.
        device: cpu, cuda or mps; the fastest available by default.
        dtype: float32, bfloat16 or float16; by default as checkpoint and device suggest.
        quantize: int8, int4 or none; by default as the checkpoint is.
        group_size: how many weights share a scale in int4.
        kv_cache_dtype: int8 for a cache of half the size.
    """
    torch_dtype = dtype_of(dtype)
    data = sys.stdin.buffer.read() if text_file == "-" else Path(str(text_file)).read_bytes()
    llama = Llama.build(
        str(ckpt_dir),
        max_seq_len=context,
        max_batch_size=max_batch_size,
        device=device,
        dtype=torch_dtype,
        quantize=quantize,
        group_size=group_size,
        kv_cache_dtype=kv_cache_dtype,
    )
    text = data.decode("utf-8", errors="replace")
    tokens = llama.tokenizer.encode(text, bos=llama.tokenizer.add_bos, eos=False)
    with progress(len(tokens) - 1, "scoring", "tokens") as show:
        result = perplexity(llama, tokens, context, stride, show)
    print(
        f"perplexity {result.value:.4f} +- {result.error:.4f} "
        f"({result.n_tokens:,} tokens, context {context}, stride {stride})"
    )


if __name__ == "__main__":
    run(main, "llama.perplexity")
