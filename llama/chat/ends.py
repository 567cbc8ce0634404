"""Where an answer ends, as its chat format writes it."""

from collections.abc import Callable

from llama.chat.layout import ChatFormat
from llama.chat.prompts import Dialog, Message
from llama.tokenizer import BaseTokenizer

_ANSWER = "quartz"  # a word that no format writes
_DIALOG: Dialog = [
    Message(role="user", content="Which stone is it?"),
    Message(role="assistant", content=_ANSWER),
    Message(role="user", content="And this one?"),
]


def answer_ends(chat: ChatFormat, tokenizer: BaseTokenizer) -> frozenset[int | str]:
    """Return the strings and token ids that end an answer, besides the tokenizer's own ends."""
    ids = {tokenizer.step_id, _id_after_answer(chat.prompt, tokenizer)}
    return frozenset({*chat.stop, *(i for i in ids if i is not None)})


def _id_after_answer(
    prompt: Callable[[BaseTokenizer, Dialog], list[int]], tokenizer: BaseTokenizer
) -> int | None:
    """Return the control piece that follows an earlier answer in a prompt.

    There the model has learnt to write it. None where text follows, where a new text begins, or
    where the format doesn't take the dialog.
    """
    try:
        ids = prompt(tokenizer, _DIALOG)
    except (ImportError, TypeError, ValueError):  # which the caller's own dialog meets too
        return None
    controls, begin = set(tokenizer.control_ids.values()), 0
    for i, token in enumerate(ids):
        if token in controls:
            text = tokenizer.decode(ids[begin:i])
            if text.rstrip().endswith(_ANSWER):
                is_begin = token == tokenizer.bos_id != tokenizer.eos_id
                return None if is_begin else token
            begin = i + 1
    return None
