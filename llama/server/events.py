"""Answers on their way out, whole or as events; either ends when the client is gone."""

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
    """An answer that is complete, built in a thread: its scores may be many."""
    text = await asyncio.to_thread(lambda: build().model_dump_json().encode())
    return Response(text, media_type="application/json")


class EventResponse(StreamingResponse):
    """Server-sent events; ``close`` is called at their end, whatever ends them."""

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
    """What comes of answers, as events.

    Args:
        event: makes a piece an event.
        last: makes an event for the end, if there is to be one.
        scored: whether events hold scores, which may be many: a thread makes them then.
    """

    def told(piece: Piece) -> bytes:
        return _data(event(piece))

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(answers.pieces()) as pieces:
                async for piece in pieces:
                    yield await asyncio.to_thread(told, piece) if scored else told(piece)
            if last is not None:
                yield _data(last())
        except ApiError as error:  # the status has been sent
            yield b"data: " + bytes(JSONResponse(error.body()).body) + b"\n\n"
        yield _DONE

    return EventResponse(events(), answers.close)


async def collect(request: Request, answers: Answers) -> list[tuple[str, FinishReason]]:
    """The texts, and why each ends. Raises ``ApiError``, also where the client is gone."""
    texts = [""] * len(answers.jobs)
    finishes: list[FinishReason] = [None] * len(texts)

    async def gather() -> None:
        async with aclosing(answers.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.number] += piece.text
                finishes[piece.number] = piece.finish

    try:
        await unless_gone(request, gather())
    finally:
        answers.close()
    return list(zip(texts, finishes, strict=True))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives, unless the client hangs up: then it is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hangs_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has closed the connection")
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hangs_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _data(event: BaseModel) -> bytes:
    return b"data: " + event.model_dump_json().encode() + b"\n\n"
