"""The chat format of a family of models, and the layout of a dialog in its pieces."""

from typing import NamedTuple, Protocol

from llama.chat.marks import Marks, clean
from llama.chat.notations import Notation
from llama.chat.options import NO_OPTIONS, ChatOptions
from llama.chat.prompts import Dialog, check_dialog, content_text, refuse_inputs
from llama.tokenizer import BaseTokenizer


class Prompt(Protocol):
    """Returns the prompt for a dialog's next answer, or for the rest of its last message.

    Raises TypeError or ValueError for a dialog that is not well formed (see ``check_dialog``) or
    doesn't fit the format, and for options for which the format has no place.
    """

    def __call__(
        self, tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS, /
    ) -> list[int]: ...


class ChatFormat(NamedTuple):
    """The chat format of a family of models.

    Attributes:
        prompt: makes prompts of dialogs.
        stop: the strings, other than the end of the sequence, that end an answer. A control piece
            of the tokenizer among them is compared as an id, not as text.
        tags: texts that no message may contain; one that does is answered with an error.
        notation: how an answer calls tools; None where the format has no place for tools.
        documents: whether it has a place for ``ChatOptions.documents``.
        name: its name in ``FORMATS``.
        template: what it does with plain dialogs, in Jinja's language, where that can be said.
    """

    prompt: Prompt
    stop: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    notation: Notation | None = None
    documents: bool = False
    name: str = "the checkpoint's own template"
    template: str | None = None


def lay_out(
    tokenizer: BaseTokenizer,
    dialog: Dialog,
    options: ChatOptions,
    *,
    head: str = "",
    system: tuple[str, str] = ("", ""),
    user: str,
    task_input: str = "",
    answer: str,
) -> list[int]:
    """Return the ids of a dialog laid out in a format's pieces.

    Args:
        tokenizer: encodes the text and gives the ``{eos}`` of all pieces.
        dialog: the messages.
        options: whether the last message is continued.
        head: the beginning, with ``{system}`` if the format has a place for it.
        system: the default system texts: for dialogs without and with an ``input``.
        user: a user's turn, ``{user}``, up to the beginning of the answer.
        task_input: the text after a ``{user}`` that has an ``{input}``; "" if the format has none.
        answer: the ``{answer}``, up to the beginning of the next turn.
    """
    check_dialog(dialog, options.continue_final_message)
    if not task_input:
        refuse_inputs(dialog)
    marks = Marks(tokenizer)
    head, user, answer = marks.mark(head), marks.mark(user), marks.mark(answer)
    eos = marks.mark(tokenizer.token_piece(tokenizer.eos_id)) if tokenizer.eos_id >= 0 else ""
    contents = [clean(content_text(message)).strip() for message in dialog]
    inputs = [clean(message.get("input", "")).strip() for message in dialog]

    has_system = dialog[0]["role"] in ("system", "developer")
    text = contents[0] if has_system else system[any(inputs)]
    if "{system}" in head:
        before_user, rendered = "", head.format(system=text, eos=eos) if text else ""
    else:
        before_user, rendered = f"{text}\n\n" if text else "", head

    for i, (message, content) in enumerate(zip(dialog, contents, strict=True)):
        if message["role"] == "user":
            if inputs[i]:
                content += task_input.format(input=inputs[i])
            rendered += user.format(user=before_user + content, eos=eos)
            before_user = ""
        elif message["role"] == "assistant":
            if options.continue_final_message and i == len(dialog) - 1:
                before, place, _ = answer.partition("{answer}")
                answer = before + place if content else before.rstrip(" ")
            rendered += answer.format(answer=content, eos=eos)
    return [tokenizer.bos_id] * tokenizer.add_bos + marks.encode(rendered)
