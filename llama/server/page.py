"""The web page: chat, completion and infilling with the served model, from this host alone."""

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from html import escape
from types import SimpleNamespace
from typing import Any, Protocol, cast

import gradio as gr
from fastapi import FastAPI
from gradio import processing_utils, queueing
from starlette.middleware import Middleware

from llama.chat.prompts import Message, Role
from llama.server.errors import log_failure
from llama.server.own_host import own_host
from llama.server.page_input import checked_input

INTERVAL = 0.08  # seconds between two views of a growing text, each of which costs milliseconds
MAX_RUNNING = 1000  # texts that grow at once; Gradio's own limit is 40
QUIET: Any = {"show_progress": "hidden", "api_visibility": "private"}

CSS = """
.gradio-container > .main { padding: 16px clamp(12px, 3vw, 32px) 8px; }
#about .prose { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 16px; }
#about h1 { margin: 0; font-size: 24px; overflow-wrap: anywhere; }
#chat { height: calc(100dvh - 196px) !important; min-height: 260px; }
#chat .bot.message { background: none; border: none; box-shadow: none; padding-left: 0; }
#chat .edit-textarea { min-width: min(60vw, 420px); }
.code textarea { font-family: var(--font-mono); }
@media (max-width: 640px) { #chat { height: calc(100dvh - 216px) !important; } }
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


def mount_page(app: FastAPI, talk: Talk) -> FastAPI:
    """Add the page to an app at ``/``, where it takes all paths that no earlier route takes.

    Returns the app to serve.
    """
    # What a browser sends may name a file elsewhere, which Gradio would fetch.
    processing_utils.async_ssrf_protected_download = _fetch_nothing
    # What fails in an event would be printed with its values, which are a user's words.
    queueing.traceback = SimpleNamespace(print_exc=_log)  # type: ignore[assignment, attr-defined]
    _own_folder(app)
    page = gr.Blocks(title=talk.name, analytics_enabled=False)
    page.max_threads = MAX_RUNNING
    page.queue(default_concurrency_limit=None, api_open=False)
    # By default Gradio polls each ms, 5 % of a core, and counts all events up after each.
    page._queue.sleep_when_free, page._queue.progress_update_sleep_when_free = 0.02, 1.0
    page._queue.ANALYTICS_MAX_EVENTS = 0
    name, form, most = escape(talk.name), escape(talk.chat_format), talk.max_tokens
    about = f"chat format <b>{form}</b>, context <b>{most:,}</b> tokens"
    with page:
        gr.Markdown(f"<h1>{name}</h1><span>{about}</span>", elem_id="about")
        with gr.Row():
            left = gr.Column(scale=4, min_width=320)
            with gr.Column(scale=1, min_width=260):
                system = gr.Textbox(label="System prompt", info="Of the chat", lines=3)
                t = gr.Slider(0, 2, 0.6, step=0.05, label="Temperature", info="0: the likeliest")
                p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="1: all tokens")
                n = gr.Slider(0, most, 0, step=1, label="Length", info="0: as long as fits")
            with left, gr.Tabs():
                with gr.Tab("Chat"):
                    chat_tab(talk, [system, t, p, n])
                with gr.Tab("Completion"):
                    prompt = gr.Textbox(label="Text to continue", lines=8, elem_classes="code")
                    task_tab(talk.complete, "Continue", [prompt], [t, p, n])
                with gr.Tab("Infilling"):
                    if talk.infills:
                        before = gr.Textbox(label="Before", lines=6, elem_classes="code")
                        after = gr.Textbox(label="After", lines=6, elem_classes="code")
                        task_tab(talk.infill, "Fill in", [before, after], [t, p, n])
                    else:
                        gr.Markdown(f"{name} cannot infill: it wasn't trained to fill a gap.")

    def inputs(event: int) -> list[Any] | None:
        found = page.fns.get(event)
        return None if found is None or found.fn is None else list(found.inputs)

    theme = gr.themes.Default(
        primary_hue="orange",
        neutral_hue="stone",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return gr.mount_gradio_app(
        app,
        page,
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        theme=theme.set(body_background_fill="*neutral_50", block_shadow="none"),
        css=CSS,
        app_kwargs={"middleware": [Middleware(own_host), Middleware(checked_input, events=inputs)]},
    )


def only_text(content: Any) -> dict[str, str]:
    """A part of a message, which could name a file or a component of Gradio's to make."""
    text = getattr(content, "text", None)
    return {"type": "text", "text": text if isinstance(text, str) else ""}


def chat_tab(talk: Talk, settings: list[gr.Component]) -> None:
    """A dialog, which the browser alone keeps and sends along with every message."""
    chat = gr.Chatbot(
        placeholder="Ask something to begin.",
        show_label=False,
        editable="user",
        buttons=["copy"],
        elem_id="chat",
    )
    chat._preprocess_content = only_text  # type: ignore[assignment, method-assign]
    box = gr.Textbox(
        label="Message",
        placeholder="Message",
        show_label=False,
        autofocus=True,
        submit_btn=True,
        elem_id="message",
    )

    async def answer(
        typed: str,
        history: list[dict[str, Any]],
        system: str,
        temperature: float,
        top_p: float,
        length: int,
        event: gr.EventData,
    ) -> AsyncIterator[tuple[Any, Any]]:
        before = [{"role": turn["role"], "content": plain(turn["content"])} for turn in history]
        again = event._data or {}  # the message to answer again, perhaps edited
        text = plain(again["value"]) if again else typed
        if not text.strip():
            yield before, gr.skip()
            return
        turns = [*before[: again.get("index")], {"role": "user", "content": text}]
        yield turns, gr.Textbox(typed if again else "", submit_btn=False, stop_btn=True)
        content = ""
        try:
            pieces = talk.chat(dialog(system, turns), temperature, top_p, int(length) or None)
            async with aclosing(growing(pieces)) as contents:
                async for content in contents:
                    said = [{"role": "assistant", "content": content}] if content else []
                    yield [*turns, *said], gr.skip()
        except Exception as error:
            tell(error)
            if not content:  # as if it had not been sent
                yield before, typed if turns[-1] in before else typed or text

    inputs = [box, chat, *settings]
    running = gr.on([box.submit, chat.retry, chat.edit], answer, inputs, [chat, box], **QUIET)
    running.then(lambda: gr.Textbox(submit_btn=True, stop_btn=False), None, box, **QUIET)
    gr.on([box.stop, chat.clear], None, cancels=running, **QUIET)


def task_tab(
    run: Callable[..., AsyncIterator[str]],
    verb: str,
    texts: list[gr.Textbox],
    settings: list[gr.Component],
) -> None:
    """The buttons and the result of a task whose texts are above them."""
    with gr.Row():
        go = gr.Button(verb, variant="primary", scale=0, min_width=160)
        stop = gr.Button("Stop", variant="stop", scale=0, min_width=160, visible=False)
    result = gr.Textbox(
        label="Result", lines=6, buttons=["copy"], interactive=False, elem_classes="code"
    )

    async def answer(*values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
        yield "", gr.Button(visible=False), gr.Button(visible=True)
        try:
            pieces = run(*values[:-1], int(values[-1]) or None)
            async with aclosing(growing(pieces)) as results:
                async for text in results:
                    yield text, gr.skip(), gr.skip()
        except Exception as error:
            tell(error)

    running = go.click(answer, [*texts, *settings], [result, go, stop], **QUIET)
    running.then(lambda: [gr.Button(visible=v) for v in (True, False)], None, [go, stop], **QUIET)
    stop.click(None, cancels=running, **QUIET)


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
        if content.strip():
            if messages and messages[-1]["role"] == role:
                content = messages.pop()["content"] + "\n\n" + content
            messages.append({"role": role, "content": content})
    return messages


async def growing(pieces: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """The text so far, every now and then and at the end."""
    text = seen = ""

    async def read() -> None:
        nonlocal text
        async with aclosing(cast(AsyncGenerator[str, None], pieces)):
            async for piece in pieces:
                text += piece

    reading, waits = asyncio.create_task(read()), 0
    try:
        while not (await asyncio.wait([reading], timeout=INTERVAL))[0]:
            waits += 1
            if text != seen or waits % 25 == 0:  # Gradio then notices that its reader has gone
                seen = text
                yield text
        await reading
        yield text
    finally:
        reading.cancel()
        await asyncio.wait([reading])


def _own_folder(app: FastAPI) -> None:
    """Give Gradio a temporary directory that only this user reads, until ``app`` shuts down."""
    folder = tempfile.TemporaryDirectory(prefix="llama-page-")
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def with_folder(app: FastAPI) -> AsyncIterator[Any]:
        with folder:
            async with lifespan(app) as state:
                yield state

    app.router.lifespan_context = with_folder


def _log() -> None:
    error = sys.exc_info()[1]
    if error is not None:
        log_failure(error)


async def _fetch_nothing(url: str, cache_dir: str) -> str:
    raise ValueError("nothing is fetched from elsewhere")


def tell(error: Exception) -> None:
    """Show an error beside the page, where Gradio's own errors would cover the text."""
    message = str(error)
    if not isinstance(error, ValueError):
        log_failure(error)
        message = "The server failed. Its log tells why."
    gr.Warning(escape(message))
