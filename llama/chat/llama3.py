"""Llama 3's dialogs, as Meta's own code writes them.

Source: https://github.com/meta-llama/llama-models (models/llama3/chat_format.py, tool_utils.py)
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llama.chat.options import NO_OPTIONS, ChatOptions
from llama.chat.prompts import (
    Dialog,
    check_dialog,
    check_last,
    check_messages,
    content_text,
    refuse_inputs,
)
from llama.tokenizer import BaseTokenizer
from llama.tokenizers.added import around_controls

_START, _END, _EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
_PYTHON = "<|python_tag|>"
_ROLES = {"developer": "system", "tool": "ipython"}
# The tools that Llama 3.1 knows by itself, whose calls are written as code.
_SEARCHES = ("brave_search", "wolfram_alpha", "photogen")
_INTERPRETER = "code_interpreter"


def is_llama3(tokenizer: BaseTokenizer) -> bool:
    """Return whether a vocabulary has the control pieces of Llama 3's dialogs."""
    return {_START, _END, _EOT} <= tokenizer.control_ids.keys()


def llama3_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    r"""Return a dialog in Llama 3's format.

    <|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSYSTEM<|eot_id|>
    <|start_header_id|>user<|end_header_id|>\n\nUSER<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\n\nANSWER<|eot_id|>…

    Messages keep the white space around them. A call of a tool follows the answer's text, as JSON;
    its result has the role ``ipython``.
    """
    _check(dialog, options)
    refuse_inputs(dialog)
    is_own = is_llama3(tokenizer)
    controls = tokenizer.control_ids if is_own else {}
    parts: list[str | int] = []

    def begin(role: str) -> None:
        parts.extend((controls.get(_START, _START), role, controls.get(_END, _END), "\n\n"))

    for message in dialog:
        begin(_ROLES.get(message["role"], message["role"]))
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        if calls and calls[0]["name"] == _INTERPRETER:
            parts.append(controls.get(_PYTHON, _PYTHON))
        parts += [content_text(message), *map(_written, calls), controls.get(_EOT, _EOT)]
    if options.continue_final_message:
        parts.pop()
    else:
        begin("assistant")
    if not is_own:  # to which the marks are words
        parts = ["".join(map(str, parts))]
    spelled = {i: piece for piece, i in controls.items()}
    parts = around_controls(parts, tokenizer, spelled)
    # Each text is encoded by itself, as in Meta's code.
    return [tokenizer.bos_id] * tokenizer.add_bos + tokenizer.encode_parts(parts)


def _check(dialog: Dialog, options: ChatOptions) -> None:
    """Raise an error unless messages alternate.

    Tools' results, and what the user says after them, count as one message of the user.
    """
    check_messages(dialog)
    check_last(dialog, options.continue_final_message)
    turns: list[Any] = []
    was_result = False
    for message in dialog:
        is_result = message["role"] in ("tool", "ipython")
        if not was_result or (not is_result and message["role"] != "user"):
            role = "user" if is_result else message["role"]
            plain = {key: value for key, value in message.items() if key != "tool_calls"}
            turns.append({**plain, "role": role, "content": content_text(message)})
        was_result = is_result
    check_dialog(turns, options.continue_final_message)


def _written(function: Mapping[str, Any]) -> str:
    """Return a call as the model writes it."""
    name, arguments = function["name"], function.get("arguments") or "{}"
    if isinstance(arguments, str):
        with suppress(ValueError):  # of an answer that was cut off
            arguments = json.loads(arguments)
    if isinstance(arguments, Mapping):
        if name in _SEARCHES and "query" in arguments:
            return f'{name}.call(query="{arguments["query"]}")'
        if name == _INTERPRETER and "code" in arguments:
            return str(arguments["code"])
    return json.dumps({"type": "function", "name": name, "parameters": arguments})
