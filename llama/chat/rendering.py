"""Chat templates as chat formats: the variables that they see, and the ids of what they write."""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llama.chat.layout import ChatFormat
from llama.chat.marks import Marks, clean, cut, with_cut
from llama.chat.notations import MISTRAL, MISTRAL_NAMES, find_notation
from llama.chat.options import NO_OPTIONS, ChatOptions
from llama.chat.prompts import Dialog, Message, check_last, check_messages, content_text
from llama.chat.template import ChatTemplate
from llama.tokenizer import BaseTokenizer


def template_format(templates: Mapping[str, str]) -> ChatFormat:
    """Return the format that a checkpoint's templates describe; each is parsed when it is used.

    Args:
        templates: by name. "tool_use" serves requests with tools, "default" all others.
    """

    @functools.cache
    def parsed(name: str, tokenizer: BaseTokenizer) -> tuple[ChatTemplate, Marks]:
        marks = Marks(tokenizer)
        return ChatTemplate(templates[name], marks), marks

    for_tools = "tool_use" if "tool_use" in templates else "default"
    has_tools = re.search(r"\btools\b", templates[for_tools])
    notation = find_notation(templates[for_tools]) if has_tools else None

    def prompt(
        tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS, /
    ) -> list[int]:
        check_messages(dialog)
        check_last(dialog, options.continue_final_message)
        about_tools = options.offered or any(message.get("tool_calls") for message in dialog)
        template, marks = parsed(for_tools if about_tools else "default", tokenizer)
        short_ids = notation in (MISTRAL, MISTRAL_NAMES)
        messages = [_variables(message, template, short_ids) for message in dialog]
        _name_results(messages)
        if options.continue_final_message:
            _mark_end(messages[-1])
        text = template.render(
            messages,
            add_generation_prompt=not options.continue_final_message,
            tools=clean(list(options.offered)) or None,
            documents=clean(list(options.documents)) if options.documents else None,
            **_special_tokens(tokenizer, marks),
        )
        return marks.encode(cut(text) if options.continue_final_message else text)

    documents = any(re.search(r"\bdocuments\b", source) for source in templates.values())
    source = templates["default"]
    return ChatFormat(prompt, notation=notation, documents=documents, template=source)


def _special_tokens(tokenizer: BaseTokenizer, marks: Marks) -> dict[str, str]:
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return {
        f"{role}_token": marks.mark(tokenizer.token_piece(i)) if i >= 0 else ""
        for role, i in ids.items()
    }


def _variables(message: Message, template: ChatTemplate, short_ids: bool) -> dict[str, Any]:
    """Return a message as a template sees it."""
    seen: dict[str, Any] = clean(dict(message))
    seen.setdefault("content", None)
    if seen["role"] == "developer":
        seen["role"] = "system"
    if isinstance(seen["content"], list) and not template.reads_parts:
        seen["content"] = content_text(seen)
    if short_ids and "tool_call_id" in seen:
        seen["tool_call_id"] = _short_id(seen["tool_call_id"])
    if calls := seen.pop("tool_calls", None):
        seen["tool_calls"] = [_call(call, template, short_ids) for call in calls]
    return seen


def _call(call: Mapping[str, Any], template: ChatTemplate, short_ids: bool) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, unless the template wants JSON."""
    arguments = call["function"].get("arguments") or "{}"
    if isinstance(arguments, str) and not template.joins_arguments:
        with suppress(ValueError):  # of an answer that was cut off
            arguments = clean(json.loads(arguments))
    elif not isinstance(arguments, str) and template.joins_arguments:
        arguments = json.dumps(arguments, ensure_ascii=False)
    call = {**call, "function": {**call["function"], "arguments": arguments}}
    if short_ids and isinstance(call.get("id"), str):
        call["id"] = _short_id(call["id"])
    return call


def _short_id(text: str) -> str:
    """Return the id of a call as Mistral's templates want it: nine letters and digits."""
    if re.fullmatch("[a-zA-Z0-9]{9}", text):
        return text
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:9]


def _name_results(messages: list[dict[str, Any]]) -> None:
    """Give tools' results the name of their function: OpenAI's have the call's id alone."""
    names: dict[str, str] = {}
    for message in messages:
        calls = message.get("tool_calls", ())
        names |= {call["id"]: call["function"]["name"] for call in calls if call.get("id")}
        if message["role"] == "tool" and message.get("tool_call_id") in names:
            message.setdefault("name", names[message["tool_call_id"]])


def _mark_end(message: dict[str, Any]) -> None:
    content = message["content"]
    if isinstance(content, list):
        *others, last = content
        message["content"] = [*others, {**last, "text": with_cut(last["text"])}]
    else:
        message["content"] = with_cut(content)
