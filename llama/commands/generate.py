"""Continue texts and fill in the middle: ``python -m llama complete`` and ``infill``."""

import sys
from collections.abc import Iterable

from llama.commands.chat import CONTROL_CHARACTERS, broadcast_text
from llama.commands.flags import BuildFlags, SamplingFlags
from llama.generation import Llama
from llama.parallel import print_once, rank

FILL = "<FILL>"
GREEDY = SamplingFlags(temperature=0.0)


def complete(*prompts: str, build: BuildFlags, sampling: SamplingFlags) -> None:
    """Continue texts, and print the continuations as they are generated.

    Args:
        prompts: the texts; without any, the standard input is one.
    """
    llama = Llama.build(**vars(build), max_batch_size=1)
    for prompt in prompts or [_standard_input()]:
        _show(llama.text_completion_stream(prompt, **vars(sampling)))
        print_once()


def infill(*prompts: str, build: BuildFlags, sampling: SamplingFlags = GREEDY) -> None:
    """Replace the <FILL> of texts, and print them as they are generated.

    Args:
        prompts: texts with one <FILL> each; without any, the standard input is one.
        ckpt_dir: a checkpoint trained for infilling; the embedded one by default.

    Raises:
        ValueError: a text has no <FILL>, or more than one.
    """
    for prompt in prompts:
        _split(prompt)  # to find mistakes before the model is loaded
    llama = Llama.build(**vars(build), max_batch_size=1)
    for prompt in prompts or [_standard_input()]:
        prefix, suffix = _split(prompt)
        _show([prefix])
        _show(llama.text_infilling_stream(prefix, suffix, **vars(sampling)))
        _show([suffix if suffix.endswith("\n") else f"{suffix}\n"])


def _split(prompt: str) -> tuple[str, str]:
    prefix, fill, suffix = prompt.partition(FILL)
    if not fill or FILL in suffix:
        raise ValueError(f"{prompt!r} has {prompt.count(FILL)} times {FILL}: expected it once")
    return prefix, suffix


def _standard_input() -> str:
    """Return the text of rank 0's standard input, on every rank."""
    if rank() > 0:
        return broadcast_text()
    if sys.stdin.isatty():
        print("type a text; Ctrl-D ends it", file=sys.stderr)
    return broadcast_text(sys.stdin.read())


def _show(pieces: Iterable[str]) -> None:
    """Print pieces as they arrive; without control characters in a terminal."""
    for piece in pieces:
        print_once(piece.translate(CONTROL_CHARACTERS) if sys.stdout.isatty() else piece, end="")
