"""The web page: chat, completion and infilling with the served model, from this host alone."""

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from html import escape
from typing import Any, Protocol, cast

import gradio as gr
from fastapi import FastAPI
from starlette import types
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from llama.prompts import Message, Role

INTERVAL = 0.08  # seconds between two views of a growing text, each of which costs milliseconds
MAX_RUNNING = 1000  # texts being written at once; Gradio's own limit is 40

# What the page asks Gradio for. Gradio offers more: uploads, files, the description of an API.
NEEDED = re.compile(
    r"/|/(assets|static)/.+|/theme\.css|/favicon\.ico|/gradio_api/(queue/(join|data)|cancel|reset)"
)
FOREIGN = re.compile(rb'<(?:meta (?:property="og|name="twitter)|link rel="manifest")[^>]*>\s*')
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",
}
CSS = """
"""


class Talk(Protocol):
    """What the page needs of the server.

    The tasks return async generators of pieces of text. Closing one stops the generation, and a
    ``ValueError`` that one raises holds a message for the user. ``max_tokens`` is how long an
    answer may get, None for as long as fits.
    """

    name: str  # the model's
    chat_format: str  # how dialogs are written, e.g. "inst"
    infills: bool  # whether the model was trained for infilling
    max_tokens: int  # prompt and answer together, at most

    def chat(
        self, dialog: list[Message], temperature: float, top_p: float, max_tokens: int | None
    ) -> AsyncIterator[str]: ...

    def complete(
        self, prompt: str, temperature: float, top_p: float, max_tokens: int | None
    ) -> AsyncIterator[str]: ...

    def infill(
        self, prefix: str, suffix: str, temperature: float, top_p: float, max_tokens: int | None
    ) -> AsyncIterator[str]: ...


class OwnHost:
    """ASGI middleware: serves of Gradio what the page needs, and lets it ask no other host."""

    def __init__(self, app: types.ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        if scope["type"] == "http" and not NEEDED.fullmatch(scope["path"]):
            await PlainTextResponse("Not Found", 404)(scope, receive, send)
            return
        start: types.Message = {}

        async def send_own(message: types.Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                start.update(message)
                if scope["path"] == "/":  # wait for its body
                    return
            elif message["type"] == "http.response.body" and scope["path"] == "/":
                message["body"] = FOREIGN.sub(b"", message.get("body", b""))
                MutableHeaders(scope=start)["content-length"] = str(len(message["body"]))
                await send(start)
            await send(message)

        await self.app(scope, receive, send_own)


def plain(content: object) -> str:
    """The text of a message's content, which Gradio gives as a text, a part or several parts."""
    if isinstance(content, dict):
        content = content.get("text")
    if isinstance(content, list | tuple):
        return "".join(plain(part) for part in content)
    return content if isinstance(content, str) else ""


def dialog(system: str, turns: Sequence[dict[str, str]]) -> list[Message]:
    """The messages to answer: none is empty, and unanswered ones are part of the next."""
    messages: list[Message] = []
    for turn in ({"role": "system", "content": system}, *turns):
        role, content = cast(Role, turn["role"]), turn["content"]
        if messages and messages[-1]["role"] == role and content.strip():
            content = messages.pop()["content"] + "\n\n" + content
        if content.strip():
            messages.append({"role": role, "content": content})
    return messages


async def growing(pieces: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """The text so far, now and then and at the end; errors of the request as Gradio's."""
    text, due = "", 0.0
    try:
        async with aclosing(cast(AsyncGenerator[str, None], pieces)):
            async for piece in pieces:
                text += piece
                if time.monotonic() >= due:
                    yield text
                    due = time.monotonic() + INTERVAL
    except ValueError as error:
        raise gr.Error(escape(str(error)), title="No answer", print_exception=False) from None
    yield text


def chat_tab(talk: Talk, limits: Callable[..., Any]) -> None:
    pass
