"""Tools for chat formats without a place for them, as text in the messages.

The functions are described in the system message, calls are written as ``<tool_call>`` and results
as ``<tool_response>``: the notation of the Hermes models, which others know, too.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from llama.chat.layout import ChatFormat
from llama.chat.notations import HERMES
from llama.chat.options import NO_OPTIONS, ChatOptions
from llama.chat.prompts import UNSAFE_ERROR, Dialog, Message, check_messages, content_text, has_tags
from llama.chat.roles import fold
from llama.tokenizer import BaseTokenizer

_INTRODUCTION = """\
You can call functions to help with the user's request. These are the functions, each with a JSON \
Schema of its arguments:

{functions}

To call a function, write its name and its arguments as JSON between <tool_call> and </tool_call>, \
in this form:

<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>

Its result follows between <tool_response> and </tool_response>. Use it for your answer."""


def with_tools(chat: ChatFormat) -> ChatFormat:
    """Return a chat format that describes tools in the system message."""

    def prompt(
        tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS, /
    ) -> list[int]:
        check_messages(dialog)
        plain = as_text(dialog, options.offered, options.must_call)
        if options.merge_roles:  # results are the user's now
            plain = fold(plain)
        if has_tags(plain, chat.tags) and not has_tags(dialog, chat.tags):
            raise ValueError(f"{UNSAFE_ERROR} It is in a tool, or in a tool's arguments.")
        return chat.prompt(tokenizer, plain, replace(options, tools=None, tool_choice=None))

    return chat._replace(prompt=prompt, notation=HERMES)


def as_text(
    dialog: Dialog, tools: Sequence[Mapping[str, Any]] = (), must_call: bool = False
) -> list[Message]:
    """Return a dialog whose calls and results are texts of the assistant and the user.

    Args:
        dialog: the messages.
        tools: functions to describe in the system message, in OpenAI's form.
        must_call: whether to ask for a call.
    """
    plain: list[Message] = []
    if tools:
        functions = "\n".join(_json(_described(tool["function"])) for tool in tools)
        text = _INTRODUCTION.format(functions=functions)
        text += "\n\nCall a function now." * must_call
        if dialog and dialog[0]["role"] in ("system", "developer"):
            text = f"{content_text(dialog[0])}\n\n{text}".lstrip()
            dialog = dialog[1:]
        plain.append(Message(role="system", content=text))
    after_tool = False  # whose results and the user's next words are one message
    for message in dialog:
        is_tool = message["role"] in ("tool", "ipython")
        if is_tool:
            result = f"<tool_response>\n{content_text(message)}\n</tool_response>"
            message = Message(role="user", content=result)
        if after_tool and message["role"] == "user":
            between = "\n" if is_tool else "\n\n"
            last = content_text(plain[-1])
            plain[-1]["content"] = f"{last}{between}{content_text(message)}"
        elif message.get("tool_calls"):
            calls = [_written(call["function"]) for call in message["tool_calls"]]
            text = "\n".join([*filter(None, [content_text(message)]), *calls])
            plain.append(Message(role="assistant", content=text))
        else:
            plain.append(message)
        after_tool = is_tool
    return plain


def _described(function: Mapping[str, Any]) -> dict[str, Any]:
    return {key: function[key] for key in ("name", "description", "parameters") if key in function}


def _written(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        with suppress(ValueError):  # of an answer that was cut off
            arguments = json.loads(arguments)
    return f"<tool_call>\n{_json({'name': function['name'], 'arguments': arguments})}\n</tool_call>"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
