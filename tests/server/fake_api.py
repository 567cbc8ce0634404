"""A server of the public API whose answers a test writes; it notes all that it is asked."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from llama.server.config import ServerConfig
from llama.server.errors import ApiError, ContextLengthExceeded, add_error_handlers
from llama.server.schemas import CompletionRequest
from llama.server.schemas_chat import ChatRequest
from llama.server.schemas_tokens import TokenizeRequest

META = {
    "description": "Llama, 1.1 billion parameters",
    "chat_format": "inst",
    "precision": "bfloat16",
    "n_params": 1_100_048_384,
    "infills": True,
    "chats": True,
    "tools": True,
    "top_logprobs": 20,
    "sampling": {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    },
}


@dataclass(frozen=True)
class Answer:
    """The answer to one request for text.

    Args:
        pieces: the texts of its events, which are its tokens too.
        calls: names and arguments, as JSON, of the tools that it calls.
        finish: the reason; of calls it is "tool_calls".
        waits_at: how many pieces come before it waits for ``FakeApi.go``.
        dies_at: how many pieces come before the connection breaks.
        fails_at: how many pieces come before an event tells an error.
        pause: seconds between pieces.
    """

    pieces: Sequence[str]
    calls: Sequence[tuple[str, str]] = ()
    finish: str = "stop"
    waits_at: int | None = None
    dies_at: int | None = None
    fails_at: int | None = None
    pause: float = 0


@dataclass
class FakeApi:
    """The answers to come, and the requests that came.

    Requests have the form that the real server demands: any other is refused as there.

    Attributes:
        answers: taken one after another by requests for text; an ``ApiError`` refuses one. Without
            any the n-th request is answered ``Answer n, as text.``
        refusals: errors by path, of all requests to it: ``{"/tokenize": ApiError(...)}``.
        key: demanded as ``Authorization: Bearer``, if not empty.
        max_model_len: in tokens, which are words here, and four more to each message.
        asked: paths and bodies of all requests with a body, in their order.
        go: lets answers that wait go on, once it is set.
        closed: set by the end of an answer whose reader has gone.
    """

    answers: list[Answer | ApiError] = field(default_factory=list)
    refusals: dict[str, ApiError] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=lambda: {**META, "sampling": {**META["sampling"]}})
    key: str = ""
    max_model_len: int = 2048
    asked: list[tuple[str, Any]] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)
    n_answers: int = 0

    # What the page takes of a service.
    name = "tiny-llama"
    config = ServerConfig(model_name=name)

    def bodies(self, path: str = "/v1/chat/completions") -> list[Any]:
        return [body for asked, body in self.asked if asked == path]

    def dialogs(self) -> list[list[tuple[str, str]]]:
        """Roles and texts of all dialogs that were to be answered."""
        return [[(m["role"], m["content"]) for m in body["messages"]] for body in self.bodies()]

    def reset(self) -> None:
        """Forget all, and end the answers that wait."""
        self.go.set()
        self.__init__()  # type: ignore[misc]

    def take(self) -> Answer:
        self.n_answers += 1
        default = Answer((f"Answer {self.n_answers}, ", "as ", "text."))
        found = self.answers.pop(0) if self.answers else default
        if isinstance(found, ApiError):
            raise found
        return found

    def check(self, request: Request) -> None:
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        given = request.headers.get("authorization", "")
        if self.key and given != f"Bearer {self.key}":
            raise ApiError(401, "an API key is needed: send it as 'Authorization: Bearer KEY'")
        if path in self.refusals:
            raise self.refusals[path]

    async def note(self, request: Request) -> Any:
        body = await request.json()
        self.asked.append((request.url.path, body))
        self.check(request)
        return body


def n_tokens(value: Any) -> int:
    """Return the number of a text's tokens, or a dialog's."""
    if isinstance(value, str):
        return len(value.split())
    return sum(4 + len((message.get("content") or "").split()) for message in value)


def fake_app(api: FakeApi) -> FastAPI:
    """Return the app, without a page."""
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/v1/models")
    async def models(request: Request) -> Any:
        api.check(request)
        model = {"id": api.name, "object": "model", "created": 0, "owned_by": "llama"}
        more = {"root": api.name, "parent": None, "max_model_len": api.max_model_len}
        return {"object": "list", "data": [model | more | {"meta": api.meta}]}

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok", "active": 0, "waiting": 0}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Any:
        sent = await api.note(request)
        count = n_tokens(
            next(sent[key] for key in ("messages", "prompt", "content") if key in sent)
        )
        return {"count": count, "max_model_len": api.max_model_len, "tokens": [0] * count}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        sent = await api.note(request)
        return respond(api, sent, n_tokens(sent["messages"]), "messages")

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        sent = await api.note(request)
        return respond(api, sent, n_tokens(sent["prompt"]), "prompt")

    return app


def respond(api: FakeApi, body: Mapping[str, Any], n_prompt: int, asked: str) -> Response:
    if n_prompt >= api.max_model_len:
        raise ContextLengthExceeded(api.max_model_len, n_prompt, 0, asked)
    assert body.get("stream"), "the page takes streams alone"
    events = stream(api, api.take(), body, n_prompt, is_chat=asked == "messages")
    return StreamingResponse(events, media_type="text/event-stream")


async def stream(
    api: FakeApi, answer: Answer, body: Mapping[str, Any], n_prompt: int, is_chat: bool
) -> AsyncIterator[bytes]:
    go, closed, is_whole = api.go, api.closed, False  # reset gives the next test others
    try:
        for i, piece in enumerate([*answer.pieces, ""]):
            is_last = i == len(answer.pieces)
            while i == answer.waits_at and not go.is_set():
                await asyncio.sleep(0.01)
            if i == answer.dies_at:
                raise ConnectionAbortedError("the connection breaks")
            if i == answer.fails_at:
                yield data(ApiError(500, "the server failed: see its log").body())
                break
            await asyncio.sleep(answer.pause)
            if not is_last:
                make = chat_choice if is_chat else text_choice
                yield chunk(make(piece, body))
        else:
            for choice in ends(answer, is_chat):
                yield chunk(choice)
            if (body.get("stream_options") or {}).get("include_usage"):
                n = len(answer.pieces)
                counts = {"prompt_tokens": n_prompt, "completion_tokens": n}
                details = {"prompt_tokens_details": {"cached_tokens": 0}}
                usage = counts | {"total_tokens": n_prompt + n} | details
                yield data({"id": "1", "model": api.name, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"
        is_whole = True
    finally:
        if not is_whole:
            closed.set()


def ends(answer: Answer, is_chat: bool) -> list[dict[str, Any]]:
    """Return the choices after the text: calls, piece by piece, and the reason."""
    if not is_chat:
        return [{"index": 0, "text": "", "finish_reason": answer.finish}]
    deltas: list[dict[str, Any]] = []
    for i, (name, arguments) in enumerate(answer.calls):
        call = {"index": i, "id": f"call_{i}", "type": "function", "function": {"name": name}}
        half = len(arguments) // 2
        deltas.append({"tool_calls": [call]})
        for part in (arguments[:half], arguments[half:]):
            deltas.append({"tool_calls": [{"index": i, "function": {"arguments": part}}]})
    reason = "tool_calls" if answer.calls else answer.finish
    last = {"index": 0, "delta": {}, "finish_reason": reason}
    return [*({"index": 0, "delta": delta} for delta in deltas), last]


def chat_choice(piece: str, body: Mapping[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": piece}}
    if body.get("logprobs"):
        top = [
            {"token": piece if i == 0 else f"other {i}", "logprob": -0.25 - i, "bytes": None}
            for i in range(body.get("top_logprobs") or 0)
        ]
        found = {"token": piece, "logprob": -0.25, "bytes": None, "top_logprobs": top}
        choice["logprobs"] = {"content": [found], "refusal": None}
    return choice


def text_choice(piece: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"index": 0, "text": piece, "logprobs": None, "finish_reason": None}


def chunk(choice: Mapping[str, Any]) -> bytes:
    found = {"logprobs": None, "finish_reason": None, "stop_reason": None}
    return data({"id": "1", "created": 0, "model": "tiny-llama", "choices": [found | choice]})


def data(event: Any) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()
