"""Which turns of a conversation are forgotten when the context is full, once the user agrees."""

from collections.abc import Callable
from contextlib import suppress

from llama.chat.prompts import Dialog, Message, content_text
from llama.errors import printable


def split_turns(dialog: Dialog) -> list[list[Message]]:
    """Return the system prompt, or an empty list, then the turns, each begun by the user."""
    turns: list[list[Message]] = [[]]
    for message in dialog:
        if message["role"] == "user":
            turns.append([])
        turns[-1].append(message)
    return turns


def without_oldest(dialog: Dialog, n_oldest: int) -> list[Message]:
    """Return a dialog without its first turns; the system prompt stays."""
    turns = split_turns(dialog)
    return [message for turn in (turns[0], *turns[n_oldest + 1 :]) for message in turn]


def n_to_forget(dialog: Dialog, n_tokens: Callable[[Dialog], int], most: int) -> int:
    """Return how many of the oldest turns don't fit; 0 if forgetting them doesn't help.

    Args:
        n_tokens: returns the number of a dialog's tokens.
        most: tokens of prompt and answer together, of which a quarter is left to the answer.
    """
    n_earlier = len(split_turns(dialog)) - 2  # the last one is to be answered
    for n in range(1, n_earlier + 1):
        if n_tokens(without_oldest(dialog, n)) <= most * 3 // 4:
            return n
    return n_earlier if n_tokens(without_oldest(dialog, n_earlier)) < most else 0


def agrees(ask: Callable[[str], str]) -> bool:
    """Return whether the user agrees that turns are forgotten; Ctrl-C and Ctrl-D are a no."""
    typed = ""
    with suppress(EOFError, KeyboardInterrupt):
        typed = ask("Forget them and go on? [y/N] ")
    return typed.strip().lower() in ("y", "yes")


def names_of_turns(dialog: Dialog, n: int) -> str:
    """Return the beginnings of the first turns, one a line."""
    turns = split_turns(dialog)[1 : n + 1]
    return "\n".join(f"- {printable(content_text(turn[0]), 70)}" for turn in turns)
