"""What a browser sends to the page, checked before Gradio sees it."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import gradio as gr
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class _Sent(BaseModel):
    model_config = ConfigDict(strict=True)  # what isn't named here is left out


class _Part(_Sent):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[_Part], Field(max_length=1000, fail_fast=True)]


class _Turn(_Sent):
    role: Literal["user", "assistant"]
    content: Content


class _Edit(_Sent):
    index: int = Field(ge=0)
    value: Content


Value = str | float | Annotated[list[_Turn], Field(max_length=1000, fail_fast=True)]


class _Join(_Sent):
    """An event of the page, with the values of its inputs."""

    data: Annotated[list[Value], Field(max_length=10, fail_fast=True)]
    fn_index: int
    session_hash: str
    trigger_id: int | None = None
    event_data: _Edit | None = None


class _Cancel(_Sent):
    event_id: str
    session_hash: str
    fn_index: int


def checked_input(app: ASGIApp, events: Callable[[int], list[Any] | None]) -> ASGIApp:
    """ASGI middleware: lets no message pass but the page's own, and none that names a file.

    Gradio would copy any file of this machine that a value names, whatever the component: its own
    check works only in an app that was launched, which a mounted one never is.

    Args:
        events: gives the input components of an event, or None where there is no such event.
    """

    def checked(path: str, body: bytes) -> bytes:
        message = _parse(body)
        sent = (_Join if path.endswith("/join") else _Cancel).model_validate(message)
        if isinstance(sent, _Join):
            inputs = events(sent.fn_index)
            if inputs is None or len(inputs) != len(sent.data):
                raise ValueError("the page has no such event")
            if not all(map(_fits, inputs, sent.data)):
                raise ValueError("a value isn't one of its component's")
        return sent.model_dump_json().encode()

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        try:
            body = checked(scope["path"], await Request(scope, receive).body())
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
        return json.loads(body, object_hook=_without_files)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("the message is not JSON") from None


def _without_files(value: dict[str, Any]) -> dict[str, Any]:
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
    wrong = isinstance(error, ValidationError)  # whose text holds the message
    return JSONResponse({"detail": "not a message of the page" if wrong else str(error)}, 400)
