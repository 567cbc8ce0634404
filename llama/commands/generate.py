"""Texts continued and filled in: ``python -m llama complete`` and ``python -m llama infill``."""

import sys
from collections.abc import Iterable

from llama.cli import dtype_of
from llama.commands.chat import SHOWN, share
from llama.generation import TINY, Llama
from llama.parallel import print_once, rank

HOLE = "<FILL>"


def complete(
    *prompts: str,
    ckpt_dir: str = str(TINY),
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_gen_len: int | None = None,
    adapter: str | tuple[str, ...] = (),
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    seed: int = 1,
) -> None:
    """Continue texts, and print what comes next as it is written.

    Args:
        prompts: the texts; without any, what the standard input holds.
        ckpt_dir: a checkpoint of any format; the embedded one by default.
        tokenizer_path: its tokenizer, where it doesn't bring its own.
        temperature: 0 for the likeliest token each time.
        top_p: the probability that the tokens to choose from have together.
        max_seq_len: tokens of a prompt and what comes next together, at most.
        max_gen_len: tokens of what comes next, at most.
        adapter: a LoRA adapter's directory, or several with commas between them.
        device: cpu, cuda or mps; the quickest that there is by default.
        dtype: float32, bfloat16 or float16; by default what suits checkpoint and device.
        quantize: int8 or int4, for weights of as many bits.
        seed: of what is sampled.
    """
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size=1,
        seed=seed,
        device=device,
        dtype=dtype_of(dtype),
        adapter=adapter,
        quantize=quantize,
    )
    for prompt in prompts or [_standard_input()]:
        _show(llama.text_completion_stream(prompt, temperature, top_p, max_gen_len))
        print_once()


def infill(
    *prompts: str,
    ckpt_dir: str = str(TINY),
    tokenizer_path: str | None = None,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_gen_len: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    seed: int = 1,
) -> None:
    """Print texts whose <FILL> the model replaces, as it is written.

    Args:
        prompts: texts with one <FILL> each; without any, what the standard input holds.
        ckpt_dir: a checkpoint trained for infilling; the embedded one by default.
        tokenizer_path: its tokenizer, where it isn't beside the weights.
        temperature: 0 for the likeliest token each time.
        top_p: the probability that the tokens to choose from have together.
        max_seq_len: tokens of a text, at most.
        max_gen_len: tokens of what is filled in, at most.
        device: cpu, cuda or mps; the quickest that there is by default.
        dtype: float32, bfloat16 or float16; by default what suits checkpoint and device.
        quantize: int8 or int4, for weights of as many bits.
        seed: of what is sampled.

    Raises:
        ValueError: a text has no <FILL>, or more than one.
    """
    for prompt in prompts:
        _parts(prompt)  # mistakes come before the model is loaded
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size=1,
        seed=seed,
        device=device,
        dtype=dtype_of(dtype),
        quantize=quantize,
    )
    for prompt in prompts or [_standard_input()]:
        prefix, suffix = _parts(prompt)
        pieces = llama.text_infilling_stream(prefix, suffix, temperature, top_p, max_gen_len)
        _show([prefix])
        _show(pieces)
        _show([suffix if suffix.endswith("\n") else f"{suffix}\n"])


def _parts(prompt: str) -> tuple[str, str]:
    prefix, hole, suffix = prompt.partition(HOLE)
    if not hole or HOLE in suffix:
        raise ValueError(f"{prompt!r} has {prompt.count(HOLE)} times {HOLE}: expected it once")
    return prefix, suffix


def _standard_input() -> str:
    """Return what rank 0's standard input holds, on every rank."""
    if rank() > 0:
        return share()
    if sys.stdin.isatty():
        print("type a text; Ctrl-D ends it", file=sys.stderr)
    return share(sys.stdin.read())


def _show(pieces: Iterable[str]) -> None:
    """Print pieces as they come; a terminal gets no control characters."""
    for piece in pieces:
        print_once(piece.translate(SHOWN) if sys.stdout.isatty() else piece, end="")
