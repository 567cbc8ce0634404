"""The web page: chat, completion and infilling with the served model, from this host alone."""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from html import escape
from types import SimpleNamespace
from typing import Any, Protocol, cast

import gradio as gr
from fastapi import FastAPI
from gradio import processing_utils, queueing
from starlette.middleware import Middleware
from starlette.routing import Mount

from llama.chat.prompts import Message, Role, content_text
from llama.sampling import SamplingParams
from llama.server.errors import log_failure
from llama.server.page_input import checked_input
from llama.server.page_security import PageMount, same_origin_only

UPDATE_INTERVAL = 0.08  # seconds between updates of a growing text, which take milliseconds each
MAX_THREADS = 1000  # concurrent texts; Gradio's own limit is 40
HIDDEN: Any = {"show_progress": "hidden", "api_visibility": "private"}

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


class PageBackend(Protocol):
    """The part of the server that the page uses.

    The tasks return async generators of pieces of text. Closing one stops the generation. If one
    raises ``ValueError``, its message is for the user. ``options`` are arguments of
    ``SamplingParams``.
    """

    name: str  # of the model
    chat_format: str  # e.g. "inst"
    infills: bool  # True if the model was trained for infilling
    max_tokens: int  # prompt and answer together, at most
    defaults: SamplingParams  # of the page's settings

    def chat(self, dialog: list[Message], options: Mapping[str, Any]) -> AsyncIterator[str]: ...

    def complete(self, prompt: str, options: Mapping[str, Any]) -> AsyncIterator[str]: ...

    def infill(
        self, prefix: str, suffix: str, options: Mapping[str, Any]
    ) -> AsyncIterator[str]: ...


def mount_page(app: FastAPI, backend: PageBackend) -> FastAPI:
    """Mount the page on an app at ``/``, behind all of the app's own routes.

    Returns:
        The app to serve.
    """
    # A browser may send the URL of a file, which Gradio would fetch.
    processing_utils.async_ssrf_protected_download = _fetch_nothing
    # Gradio prints an event's exception with its message, which may contain a user's text.
    queueing.traceback = SimpleNamespace(print_exc=_log_exception)  # type: ignore[assignment, attr-defined]
    _use_private_directory(app)
    page = gr.Blocks(title=backend.name, analytics_enabled=False)
    page.max_threads = MAX_THREADS
    page.queue(default_concurrency_limit=None, api_open=False)
    # By default Gradio polls every ms (5 % of a core), and recounts all events after each one.
    page._queue.sleep_when_free, page._queue.progress_update_sleep_when_free = 0.02, 1.0
    page._queue.ANALYTICS_MAX_EVENTS = 0
    name, form, most = escape(backend.name), escape(backend.chat_format), backend.max_tokens
    about = f"chat format <b>{form}</b>, context <b>{most:,}</b> tokens"
    with page:
        gr.Markdown(f"<h1>{name}</h1><span>{about}</span>", elem_id="about")
        with gr.Row():
            left = gr.Column(scale=4, min_width=320)
            with gr.Column(scale=1, min_width=260):
                system = gr.Textbox(label="System prompt", info="Of the chat", lines=3)
                at = backend.defaults
                hot, mass = at.temperature, at.top_p
                t = gr.Slider(0, 2, hot, step=0.05, label="Temperature", info="0: most probable")
                p = gr.Slider(0.05, 1, mass, step=0.05, label="Top-p", info="1: all tokens")
                n = gr.Slider(0, most, 0, step=1, label="Length", info="0: as long as fits")
                settings = [t, p, n, *more_settings(at)]
            with left, gr.Tabs():
                with gr.Tab("Chat"):
                    chat_tab(backend, [system, *settings])
                with gr.Tab("Completion"):
                    prompt = gr.Textbox(label="Text to continue", lines=8, elem_classes="code")
                    task_tab(backend.complete, "Continue", [prompt], settings)
                with gr.Tab("Infilling"):
                    if backend.infills:
                        before = gr.Textbox(label="Before", lines=6, elem_classes="code")
                        after = gr.Textbox(label="After", lines=6, elem_classes="code")
                        task_tab(backend.infill, "Fill in", [before, after], settings)
                    else:
                        gr.Markdown(f"{name} cannot infill: it wasn't trained to fill a gap.")

    def inputs(event: int) -> list[Any] | None:
        function = page.fns.get(event)
        return None if function is None or function.fn is None else list(function.inputs)

    middleware = [Middleware(same_origin_only), Middleware(checked_input, events=inputs)]
    theme = gr.themes.Default(
        primary_hue="orange",
        neutral_hue="stone",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    gr.mount_gradio_app(
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
        app_kwargs={"middleware": middleware},
    )
    mounted = app.router.routes.pop()
    assert isinstance(mounted, Mount)
    app.router.routes.append(PageMount("", mounted.app))
    return app


def only_text(content: Any) -> dict[str, str]:
    """Return a message part's text alone; a part could also name a file or a Gradio component."""
    text = getattr(content, "text", None)
    return {"type": "text", "text": text if isinstance(text, str) else ""}


def chat_tab(backend: PageBackend, settings: list[gr.Component]) -> None:
    """Add a dialog, which only the browser stores and sends along with every message."""
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
        event: gr.EventData, typed: str, history: list[dict[str, Any]], system: str, *values: Any
    ) -> AsyncIterator[tuple[Any, Any]]:
        history = [{"role": turn["role"], "content": plain(turn["content"])} for turn in history]
        retried = event._data or {}  # the message to answer again, perhaps edited
        text = plain(retried["value"]) if retried else typed
        if not text.strip():
            yield history, gr.skip()
            return
        turns = [*history[: retried.get("index")], {"role": "user", "content": text}]
        yield turns, gr.Textbox(typed if retried else "", submit_btn=False, stop_btn=True)
        content = ""
        try:
            pieces = backend.chat(dialog(system, turns), sampling_options(*values))
            async with aclosing(accumulate(pieces)) as contents:
                async for content in contents:
                    reply = [{"role": "assistant", "content": content}] if content else []
                    yield [*turns, *reply], gr.skip()
        except Exception as error:
            show_warning(error)
            if not content:  # restore the state before the message was sent
                yield history, typed if turns[-1] in history else typed or text

    inputs = [box, chat, *settings]
    running = gr.on([box.submit, chat.retry, chat.edit], answer, inputs, [chat, box], **HIDDEN)
    running.then(lambda: gr.Textbox(submit_btn=True, stop_btn=False), None, box, **HIDDEN)
    gr.on([box.stop, chat.clear], None, cancels=running, **HIDDEN)


def task_tab(
    run: Callable[..., AsyncIterator[str]],
    verb: str,
    texts: list[gr.Textbox],
    settings: list[gr.Component],
) -> None:
    """Add the buttons and the result of a task, below its texts."""
    with gr.Row():
        go = gr.Button(verb, variant="primary", scale=0, min_width=160)
        stop = gr.Button("Stop", variant="stop", scale=0, min_width=160, visible=False)
    result = gr.Textbox(
        label="Result", lines=6, buttons=["copy"], interactive=False, elem_classes="code"
    )

    async def answer(*values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
        yield "", gr.Button(visible=False), gr.Button(visible=True)
        try:
            n_texts = len(texts)
            pieces = run(*values[:n_texts], sampling_options(*values[n_texts:]))
            async with aclosing(accumulate(pieces)) as results:
                async for text in results:
                    yield text, gr.skip(), gr.skip()
        except Exception as error:
            show_warning(error)

    running = go.click(answer, [*texts, *settings], [result, go, stop], **HIDDEN)
    running.then(lambda: [gr.Button(visible=v) for v in (True, False)], None, [go, stop], **HIDDEN)
    stop.click(None, cancels=running, **HIDDEN)


def more_settings(at: SamplingParams) -> list[gr.Component]:
    """Add the settings that few need, in the order in which ``sampling_options`` takes them."""
    with gr.Accordion("More", open=False):
        return [
            gr.Slider(0, 200, at.top_k, step=1, label="Top-k", info="0: all tokens"),
            gr.Slider(0, 1, at.min_p, step=0.01, label="Min-p", info="0: all tokens"),
            gr.Slider(
                0.5, 2, at.repetition_penalty, step=0.01, label="Repetition penalty", info="1: none"
            ),
            gr.Slider(-2, 2, 0, step=0.05, label="Presence penalty", info="0: none"),
            gr.Slider(-2, 2, 0, step=0.05, label="Frequency penalty", info="0: none"),
            # With a value: closed, they would send null.
            gr.Textbox("", label="Seed", info="A whole number; empty for another each time"),
            gr.Textbox("", label="Stop strings", info="One a line", lines=2, elem_classes="code"),
            gr.Textbox("", label="JSON schema", info="Of the answer", lines=3, elem_classes="code"),
        ]


def sampling_options(
    temperature: float,
    top_p: float,
    length: float,
    top_k: float,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    seed: str,
    stops: str,
    schema: str,
) -> dict[str, Any]:
    """Return the page's settings as fields of ``SamplingParams``.

    Raises:
        ValueError: the seed or the schema can't be read.
    """
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "max_gen_len": int(length) or None,
        "top_k": int(top_k),
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "stop": [line for line in stops.splitlines() if line],
    }
    try:
        options["seed"] = int(seed) if seed.strip() else None
        form = json.loads(schema) if schema.strip() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"The JSON schema isn't JSON: {error}.") from None
    except ValueError:
        raise ValueError(f"The seed is {seed!r}: expected a whole number.") from None
    if form is not None:
        options["response_format"] = {"type": "json_schema", "json_schema": {"schema": form}}
    return options


def plain(content: object) -> str:
    """Return the text of a message's content, which Gradio passes as a string, a part or parts."""
    if isinstance(content, dict):
        content = content.get("text")
    if isinstance(content, list | tuple):
        return "".join(plain(part) for part in content)
    return content if isinstance(content, str) else ""


def dialog(system: str, turns: Sequence[dict[str, str]]) -> list[Message]:
    """Return the messages to answer, without empty ones; unanswered ones are joined to the next."""
    messages: list[Message] = []
    for turn in ({"role": "system", "content": system}, *turns):
        role, content = cast(Role, turn["role"]), turn["content"]
        if content.strip():
            if messages and messages[-1]["role"] == role:
                content = content_text(messages.pop()) + "\n\n" + content
            messages.append({"role": role, "content": content})
    return messages


async def accumulate(pieces: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """Yield the text so far, at intervals and at the end."""
    text = shown = ""

    async def read() -> None:
        nonlocal text
        async with aclosing(cast(AsyncGenerator[str, None], pieces)):
            async for piece in pieces:
                text += piece

    reader, n_waits = asyncio.create_task(read()), 0
    try:
        while not (await asyncio.wait([reader], timeout=UPDATE_INTERVAL))[0]:
            n_waits += 1
            # Gradio notices only with an update that the browser has disconnected.
            if text != shown or n_waits % 25 == 0:
                shown = text
                yield text
        await reader
        yield text
    finally:
        reader.cancel()
        await asyncio.wait([reader])


def _use_private_directory(app: FastAPI) -> None:
    """Give Gradio a temporary directory that only this user can read, until ``app`` shuts down."""
    directory = tempfile.TemporaryDirectory(prefix="llama-page-")
    os.environ["GRADIO_TEMP_DIR"] = directory.name
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def with_directory(app: FastAPI) -> AsyncIterator[Any]:
        with directory:
            async with lifespan(app) as state:
                yield state

    app.router.lifespan_context = with_directory


def _log_exception() -> None:
    error = sys.exc_info()[1]
    if error is not None:
        log_failure(error)


async def _fetch_nothing(url: str, cache_dir: str) -> str:
    raise ValueError("nothing is fetched from elsewhere")


def show_warning(error: Exception) -> None:
    """Show an error at the side of the page; Gradio's own errors cover the text."""
    message = str(error)
    if not isinstance(error, ValueError):
        log_failure(error)
        message = "The server failed. See its log."
    gr.Warning(escape(message))
