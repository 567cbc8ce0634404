"""Responses, whole or as server-sent events; both end when the client disconnects."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from llama.server.answers import Answers, Piece
from llama.server.errors import ApiError
from llama.server.schemas import FinishReason

T = TypeVar("T")

_DONE = b"data: [DONE]\n\n"


async def json_response(build: Callable[[], BaseModel]) -> Response:
    """Return a complete answer, built in a thread, as it may have many log-probabilities."""
    text = await asyncio.to_thread(lambda: build().model_dump_json().encode())
    return Response(text, media_type="application/json")


class EventResponse(StreamingResponse):
    """Server-sent events; ``close`` is called at their end, whatever the reason."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def stream(
    answers: Answers,
    event: Callable[[Piece], BaseModel],
    last: Callable[[], BaseModel] | None,
    scored: bool,
) -> EventResponse:
    """Return answers as server-sent events.

    Args:
        event: makes an event of a piece.
        last: makes an additional last event; None for none.
        scored: events contain log-probabilities, which may be many: they are made in a thread.
    """

    def encode(piece: Piece) -> bytes:
        return _data(event(piece))

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(answers.pieces()) as pieces:
                async for piece in pieces:
                    yield await asyncio.to_thread(encode, piece) if scored else encode(piece)
            if last is not None:
                yield _data(last())
        except ApiError as error:  # the status has been sent
            yield b"data: " + bytes(JSONResponse(error.body()).body) + b"\n\n"
        yield _DONE

    return EventResponse(events(), answers.close)


async def collect(request: Request, answers: Answers) -> list[tuple[str, FinishReason]]:
    """Return the texts and their finish reasons.

    Raises:
        ApiError: the request failed, or the client has disconnected.
    """
    texts = [""] * len(answers.jobs)
    finishes: list[FinishReason] = [None] * len(texts)

    async def gather() -> None:
        async with aclosing(answers.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.number] += piece.text
                finishes[piece.number] = piece.finish

    try:
        await unless_disconnected(request, gather())
    finally:
        answers.close()
    return list(zip(texts, finishes, strict=True))


async def unless_disconnected(request: Request, coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``coroutine``, which is cancelled if the client disconnects.

    Raises:
        ApiError: the client has disconnected.
    """
    task = asyncio.ensure_future(coroutine)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has closed the connection")
    finally:
        for each in (task, disconnect):
            each.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _data(event: BaseModel) -> bytes:
    return b"data: " + event.model_dump_json().encode() + b"\n\n"
