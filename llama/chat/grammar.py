"""Grammars that hold an answer to calls of known functions, with arguments of their schemas.

They are written in Lark's language as ``llguidance`` reads it, where ``%json`` embeds a schema.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from llama.chat.notations import HERMES, LLAMA, MISTRAL, Notation
from llama.chat.options import ChatOptions
from llama.errors import WrongForm

# As models write JSON in their training, and without free white space, in which answers get lost.
_JSON = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": True,
}


# Keywords beside which ``properties`` aren't all properties.
_OPEN = {"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties"}


def calls_grammar(
    notation: Notation, options: ChatOptions, response_format: Mapping[str, Any] | None
) -> str | None:
    """Return the grammar of an answer that may, or has to, call functions; None if it is free.

    An answer is held to it if a call is required, if a function is ``strict``, or if other answers
    have a form of their own. Functions that aren't strict get any arguments where a call isn't
    required.

    Raises:
        ValueError: the answer's form can't stand beside calls.
    """
    functions = [tool["function"] for tool in options.offered]
    is_strict = any(function.get("strict") is True for function in functions)
    form = None if options.must_call else _form(response_format)
    if not options.must_call and not is_strict and form is None:
        return None
    rules = []
    for i, function in enumerate(functions):
        held = options.must_call or form is not None or function.get("strict") is True
        schema = {"type": "object", **((held and function.get("parameters")) or {})}
        if held and not function.get("parameters"):
            schema |= {"properties": {}, "additionalProperties": False}
        if "properties" in schema and not _OPEN & schema.keys():
            # A function takes no arguments but its own, and small models make up more and more.
            schema.setdefault("additionalProperties", False)
        rules.append(f"arguments_{i}: %json {_dumped(schema)}")
    rules += _calls(notation, [function["name"] for function in functions], options)
    if options.must_call:
        start = "calls"
    elif form is not None:
        start = "calls | form"
        rules.append(f"form: %json {_dumped(form)}")
    else:
        start, text = _free(notation)
        rules += text
    return "\n".join([f"start: {start}", *rules])


def _form(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the JSON Schema of an answer without calls; None if it is free."""
    kind = None if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    schema = response_format.get("json_schema")
    if kind == "json_schema" and isinstance(schema, Mapping):
        return schema["schema"] if isinstance(schema.get("schema"), Mapping) else {}
    raise WrongForm(
        f"response_format of the type {kind!r} can't stand beside tools: leave one of them out, or "
        "set tool_choice to 'none' or 'required'"
    )


def _calls(notation: Notation, names: list[str], options: ChatOptions) -> list[str]:
    """Return the rules of ``calls``: one call or more, without text before."""
    if notation is HERMES or notation is LLAMA or notation is MISTRAL:
        key = f", {json.dumps(notation.arguments)}: "
        texts = [f'{{"name": {json.dumps(name, ensure_ascii=False)}{key}' for name in names]
        calls = [f'{_text(text)} arguments_{i} "}}"' for i, text in enumerate(texts)]
    else:
        calls = [f"{_text(f'{name}[ARGS]')} arguments_{i}" for i, name in enumerate(names)]
    repeated = "*" * options.parallel_tool_calls or "~0"
    one = f"call: {' | '.join(calls)}"
    if notation is HERMES:
        following, end = _text("\n<tool_call>\n"), _text("\n</tool_call>")
        rest = f"more: {_text(chr(10))} call {end} ({following} call {end}){repeated}"
        return [one, f"calls: {_text(notation.begin)} more", rest]
    if notation is LLAMA:
        return [one, "calls: call"]
    if notation is MISTRAL:
        rest = f'more: "[" call (", " call){repeated} "]"'
    else:
        rest = f"more: call ({_text(notation.begin)} call){repeated}"
    return [one, f"calls: {_text(notation.begin)} more", rest]


def _free(notation: Notation) -> tuple[str, list[str]]:
    """Return the start of a grammar of text or calls, and its rules."""
    mark = re.escape(notation.begin)
    if notation is LLAMA:  # whose calls are the whole answer
        return "calls | TEXT", [rf"TEXT: /(?s:.*)/ & ~/(?s:\s*(\{{|{mark}).*)/"]
    return "TEXT | before more", [
        f"before[lazy]: /(?s:.*){mark}/",
        f"TEXT: /(?s:.*)/ & ~/(?s:.*{mark}.*)/",
    ]


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")  # no character there


def _dumped(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _JSON})
