"""Responses, whole or as server-sent events; both end when the client disconnects."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from llama.server.answers import Answers, Piece
from llama.server.errors import ApiError
from llama.server.schemas import ErrorAnswer

FIRST_COMMENT = 1.0  # seconds: some proxies pass no headers on before there is a body
COMMENT_INTERVAL = 5.0  # seconds of silence; proxies cut off a stream after 30 or more
COMMENT = b": waiting\n\n"

T = TypeVar("T")


async def json_response(build: Callable[[], BaseModel]) -> Response:
    """Return a complete answer, built in a thread, as it may have many log-probabilities."""
    text = await asyncio.to_thread(lambda: build().model_dump_json().encode())
    return Response(text, media_type="application/json")


class EventResponse(StreamingResponse):
    """Server-sent events, and comments while there are none, by which proxies see a live stream.

    Args:
        close: called at their end, whatever the reason.
    """

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.close = close

    async def stream_response(self, send: Send) -> None:
        lock, last_sent, is_open = asyncio.Lock(), time.monotonic(), True

        waiting = {"type": "http.response.body", "body": COMMENT, "more_body": True}

        async def send_and_note(message: Message) -> None:
            nonlocal last_sent, is_open
            async with lock:
                await send(message)
                last_sent, is_open = time.monotonic(), message.get("more_body", True)

        async def comment() -> None:
            nonlocal last_sent
            interval = FIRST_COMMENT
            while is_open:
                await asyncio.sleep(last_sent + interval - time.monotonic())
                async with lock:  # a client that reads slowly needs no comment
                    if is_open and time.monotonic() >= last_sent + interval:
                        await send(waiting)
                        last_sent, interval = time.monotonic(), COMMENT_INTERVAL

        comments = asyncio.ensure_future(comment())
        try:
            await super().stream_response(send_and_note)
        finally:
            comments.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


def _nothing() -> Iterable[BaseModel]:
    return ()


def _error(error: ApiError) -> Iterable[BaseModel]:
    return [ErrorAnswer.model_validate(error.body())]


@dataclass(frozen=True)
class Events:
    """The events of a stream.

    Args:
        piece: makes those of a piece of text; in a thread if there are log-probabilities, which
            may be many.
        first, last: make those before all pieces and after them.
        failed: makes those of an error, after which there are no others.
        is_enough: returns after each piece whether it was the last one that is wanted.
        done: is sent at the end.
    """

    piece: Callable[[Piece], Iterable[BaseModel]]
    first: Callable[[], Iterable[BaseModel]] = _nothing
    last: Callable[[], Iterable[BaseModel]] = _nothing
    failed: Callable[[ApiError], Iterable[BaseModel]] = _error
    is_enough: Callable[[], bool] = lambda: False
    done: bytes = b"data: [DONE]\n\n"
    is_scored: bool = False


def stream(answers: Answers, events: Events) -> EventResponse:
    """Return answers as server-sent events."""

    def encode(piece: Piece) -> bytes:
        return _data(events.piece(piece))

    async def blocks() -> AsyncGenerator[bytes, None]:
        try:
            yield _data(events.first())
            async with aclosing(answers.pieces()) as pieces:
                async for piece in pieces:
                    scored = events.is_scored
                    yield await asyncio.to_thread(encode, piece) if scored else encode(piece)
                    if events.is_enough():
                        break
            yield _data(events.last())
        except ApiError as error:  # the status has been sent
            yield _data(events.failed(error))
        yield events.done

    async def without_empty_blocks() -> AsyncGenerator[bytes, None]:
        async with aclosing(blocks()) as found:
            async for block in found:
                if block:
                    yield block

    return EventResponse(without_empty_blocks(), answers.close)


async def soon(answer: Coroutine[Any, Any, Response], is_stream: bool | None) -> Response:
    """Return an answer or, of a stream that isn't begun soon, one that begins with comments.

    It may wait for a guard that reads the prompt, or for the form of an answer to be compiled. An
    error is an event then, as the status has been sent.
    """
    if not is_stream:
        return await answer
    task = asyncio.ensure_future(answer)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # if nobody waits
    try:
        await asyncio.wait({task}, timeout=COMMENT_INTERVAL)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if task.done():
        return task.result()

    async def blocks() -> AsyncGenerator[bytes, None]:
        try:
            response = await task
        except ApiError as error:
            yield _data(_error(error))
            return
        assert isinstance(response, EventResponse)
        async for block in response.body_iterator:
            assert isinstance(block, bytes)
            yield block

    def close() -> None:
        if not task.done():
            task.cancel()
        elif not task.cancelled() and task.exception() is None:
            response = task.result()
            assert isinstance(response, EventResponse)
            response.close()

    return EventResponse(blocks(), close)


async def collect(request: Request, answers: Answers) -> list[Piece]:
    """Return each answer as one piece.

    Raises:
        ApiError: the request failed, or the client has disconnected.
    """
    whole = [Piece(number, "", 0, None) for number in range(len(answers.jobs))]

    async def gather() -> None:
        async with aclosing(answers.pieces()) as pieces:
            async for piece in pieces:
                text = whole[piece.number].text + piece.text
                whole[piece.number] = piece._replace(text=text)

    try:
        await unless_disconnected(request, gather())
    finally:
        answers.close()
    counts = [len(job.sequence.tokens) for job in answers.jobs]
    return [piece._replace(n_tokens=n) for piece, n in zip(whole, counts, strict=True)]


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
    finally:
        is_late = not task.done()
        for each in (task, disconnect):
            each.cancel()
        results = await asyncio.gather(task, disconnect, return_exceptions=True)
        # Before Python 3.12 ``wait_for`` returns what was ready when it was cancelled.
        if is_late and isinstance(results[0], Answers):
            results[0].close()
    raise ApiError(499, "the client has closed the connection")


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _data(events: Iterable[BaseModel]) -> bytes:
    """Return server-sent events, which have a name if they have a ``type``."""
    lines = []
    for event in events:
        kind = getattr(event, "type", None)
        lines += [f"event: {kind}\n".encode()] if kind else []
        lines += [b"data: ", event.model_dump_json().encode(), b"\n\n"]
    return b"".join(lines)
