"""Orders of roles that clients send and formats can't hold, folded into ones that they can."""

from collections.abc import Iterator
from typing import Any, cast

from llama.chat.layout import ChatFormat
from llama.chat.options import ChatOptions
from llama.chat.prompts import Dialog, Message, check_messages, content_text
from llama.tokenizer import BaseTokenizer

_SYSTEM = ("system", "developer")


def prompt_tokens(
    chat: ChatFormat, tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions
) -> list[int]:
    """Return a dialog as a prompt, with its roles folded and its beginning cut off as options say.

    Raises:
        TypeError, ValueError: the dialog isn't well formed, or the format can't hold it.
    """
    prompt = _whole_prompt(chat, tokenizer, dialog, options)
    return prompt if options.max_prompt_tokens is None else prompt[-options.max_prompt_tokens :]


def _whole_prompt(
    chat: ChatFormat, tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions
) -> list[int]:
    if not options.merge_roles:
        return chat.prompt(tokenizer, dialog, options)
    refused = None
    for folded in _foldings(dialog):
        try:
            return chat.prompt(tokenizer, folded, options)
        except ValueError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _foldings(dialog: Dialog) -> Iterator[list[Message]]:
    """Yield a dialog as it is closest to the one given, then as more and more formats hold it."""
    check_messages(dialog)
    folded = fold(dialog)
    yield folded
    n_system = int(folded[0]["role"] == "system")
    # A greeting answers an empty message.
    if folded[n_system]["role"] == "assistant":
        folded.insert(n_system, Message(role="user", content=""))
        yield folded
    if n_system:
        system, first, *others = folded
        yield [_joined(system, first, role="user"), *others]


def fold(dialog: Dialog) -> list[Message]:
    """Return a dialog with one system message, which is first, and without two equal roles in turn.

    The system messages at the beginning become one; a later one becomes the user's text in its
    place, since it is about what is said there. Messages of one role in a row are joined by a
    blank line, except for tools' results and answers with calls.
    """
    folded: list[Message] = []
    for message in dialog:
        role: Any = "system" if message["role"] in _SYSTEM else message["role"]
        if role == "system" and any(m["role"] != "system" for m in folded):
            role = "user"
        message = cast(Message, {**message, "role": role})
        last = folded[-1] if folded else None
        has_calls = any(each and each.get("tool_calls") for each in (message, last))
        if last is not None and last["role"] == role != "tool" and not has_calls:
            folded[-1] = _joined(last, message, role)
        else:
            folded.append(message)
    if folded and folded[-1]["role"] == "system":
        folded.append(Message(role="user", content=""))
    return folded


def _joined(first: Message, second: Message, role: Any) -> Message:
    texts = [content_text(first), content_text(second)]
    content = "\n\n".join(text for text in texts if text)
    inputs = [text for message in (first, second) if (text := message.get("input"))]
    joined = {**first, **second, "role": role, "content": content}
    if inputs:
        joined["input"] = "\n\n".join(inputs)
    return cast(Message, joined)
