"""Checks of what a browser sends to the page, before Gradio reads it."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import gradio as gr
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class _Input(BaseModel):
    model_config = ConfigDict(strict=True)  # other fields are dropped


class _Part(_Input):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[_Part], Field(max_length=1000, fail_fast=True)]


class _Turn(_Input):
    role: Literal["user", "assistant"]
    content: Content


class _Edit(_Input):
    index: int = Field(ge=0)
    value: Content


Value = str | float | Annotated[list[_Turn], Field(max_length=1000, fail_fast=True)]


class _Join(_Input):
    """An event of the page, with the values of its inputs."""

    data: Annotated[list[Value], Field(max_length=20, fail_fast=True)]
    fn_index: int
    session_hash: str
    trigger_id: int | None = None
    event_data: _Edit | None = None


class _Cancel(_Input):
    event_id: str
    session_hash: str
    fn_index: int


def checked_input(app: ASGIApp, events: Callable[[int], list[Any] | None]) -> ASGIApp:
    """Wrap an ASGI app: refuse all messages but the page's own, and those that name a file.

    Gradio copies any file of this machine that a value names, for every component: its own check
    works only in a launched app, not in a mounted one.

    Args:
        events: returns the input components of an event, or None for an unknown event.
    """

    def validate(path: str, body: bytes) -> bytes:
        message = _parse(body)
        parsed = (_Join if path.endswith("/join") else _Cancel).model_validate(message)
        if isinstance(parsed, _Join):
            inputs = events(parsed.fn_index)
            if inputs is None or len(inputs) != len(parsed.data):
                raise ValueError("the page has no such event")
            if not all(map(_fits, inputs, parsed.data)):
                raise ValueError("a value isn't one of its component's")
        return parsed.model_dump_json().encode()

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        try:
            body = validate(scope["path"], await Request(scope, receive).body())
        except ClientDisconnect:
            return
        except (HTTPException, ValueError) as error:
            await _refusal(error)(scope, receive, send)
            return
        parts = iter([body])

        async def replay() -> Message:
            for part in parts:
                return {"type": "http.request", "body": part, "more_body": False}
            return await receive()

        await app(scope, replay, send)

    return serve


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body, object_hook=_refuse_files)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("the message is not JSON") from None


def _refuse_files(value: dict[str, Any]) -> dict[str, Any]:
    if "path" in value:
        raise ValueError("the page takes no files")
    return value


def _fits(component: Any, value: object) -> bool:
    if isinstance(component, gr.Slider):
        return isinstance(value, float) and component.minimum <= value <= component.maximum
    return isinstance(value, list if isinstance(component, gr.Chatbot) else str)


def _refusal(error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
    is_invalid = isinstance(error, ValidationError)  # whose text contains the message
    return JSONResponse({"detail": "not a message of the page" if is_invalid else str(error)}, 400)
